import pytest

from ppo_fast.prepare.folders import refuse_non_empty, staged, write_whole


def test_a_folder_that_holds_something_is_refused_and_kept(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"output: .* is not empty"):
        refuse_non_empty(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        refuse_non_empty(tmp_path / "file")


def test_absent_and_empty_folders_are_welcome(tmp_path):
    assert refuse_non_empty(str(tmp_path)) == tmp_path
    assert refuse_non_empty(tmp_path / "new") == tmp_path / "new"
    assert not (tmp_path / "new").exists()


def test_a_block_that_fails_leaves_nothing_under_the_name_and_the_next_one_starts_clean(tmp_path):
    def fail():
        with staged(tmp_path / "out") as folder:
            (folder / "half").write_text("")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not (tmp_path / "out").exists()
    with staged(tmp_path / "out") as folder:
        (folder / "whole").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]


def test_a_full_folder_that_appeared_meanwhile_is_not_overwritten(tmp_path):
    def write():
        with staged(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("")

    with pytest.raises(OSError, match="not empty"):
        write()
    assert (tmp_path / "out" / "theirs").exists()


def test_a_file_is_replaced_whole(tmp_path):
    write_whole(tmp_path / "new" / "a.txt", "één\n")
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "één\n"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]
