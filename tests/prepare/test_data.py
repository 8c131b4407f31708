import pytest

from ppo_fast.prepare.data import read_csv, read_jsonl, read_rows

PAIR = [("chosen", "rejected")]


def test_rows_come_in_order_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "é\\u2028x"}\n\n  \n{"text": "b", "more": 1}\n', encoding="utf-8")
    assert read_jsonl(path, [("text",)]) == [{"text": "é\u2028x"}, {"text": "b", "more": 1}]


def test_a_raw_line_separator_inside_a_string_ends_no_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one\u2028two"}\n', encoding="utf-8")
    assert read_jsonl(path, [("text",)]) == [{"text": "one\u2028two"}]


def test_either_set_of_keys_will_do(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p", "response": "r"}\n{"text": "t"}\n')
    assert len(read_jsonl(path, [("prompt", "response"), ("text",)])) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"chosen": "a", "rejected": "b"}\n{"chosen": "a"\n', r"a\.jsonl: line 2: not JSON .*column"),
        ('{"chosen": "a"}\n', r"line 1: has keys \{chosen\}, expected \{chosen, rejected\}"),
        ('{"chosen": "a", "rejected": null}\n', r"line 1: has keys"),
        ("[1, 2]\n", r"line 1: list \[1, 2\], expected a JSON object"),
        ("\n", "holds no rows"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_jsonl(path, PAIR)


def test_a_wrong_byte_is_named_with_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        read_jsonl(path, [("text",)])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl: no such file"):
        read_jsonl(tmp_path / "nowhere.jsonl", PAIR)


def test_csv_has_the_same_rows_and_the_same_errors(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('chosen,rejected\n"a, b",c\nd,e\n')
    assert read_rows(path, PAIR) == [{"chosen": "a, b", "rejected": "c"}, {"chosen": "d", "rejected": "e"}]
    with pytest.raises(ValueError, match=r"line 2: has keys \{chosen, rejected\}, expected \{text\}"):
        read_csv(path, [("text",)])


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfprompt,score\nhello,1\n")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "hello"}\n')
    for name in ("a.csv", "a.jsonl"):
        assert read_rows(tmp_path / name, [("prompt",)])[0]["prompt"] == "hello"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"prompt\nok\n\xff\n", "a.csv: after line .*: not UTF-8"),
        ("a.csv", b"prompt\n" + b"x" * 200_000 + b"\n", "a.csv: after line .*: not csv"),
        ("a.jsonl", b"[" * 200_000, "a.jsonl: line 1: nested too deep"),
    ],
)
def test_files_broken_in_other_ways(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / name, [("prompt",)])


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder, expected a file"):
        read_rows(tmp_path, [("prompt",)])
