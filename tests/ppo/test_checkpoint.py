"""Checkpoints by themselves: what they hold, what is refused and offered instead, what a failed save leaves."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ppo_fast.ppo import checkpoint
from ppo_fast.ppo.checkpoint import CheckpointError, Checkpoints, Position
from ppo_fast.ppo.ranks import Ranks
from ppo_fast.ppo.state import Saved, State, load_random_state, random_state

CONFIG = {"seed": 3, "output_dir": "here", "resume": "auto", "objective": {"kl_coef": 0.1, "lam": 0.95}}


class Weights:
    """A part with one shared tensor and one of the rank's own."""

    def __init__(self, value: float, size: int = 100) -> None:
        self.shared_tensor, self.own_tensor = torch.full((size,), value), torch.full((3,), -value)
        self.number = value / 3

    def shared_state(self) -> dict[str, State]:
        return {"weights": State({"w": self.shared_tensor}, {"third": self.number})}

    def own_state(self) -> dict[str, State]:
        return {"shard": State({"s": self.own_tensor}), "empty": State(numbers={"drawn": 7})}

    def load_state(self, saved: Saved) -> None:
        self.shared_tensor, self.number = (
            saved.shared("weights").tensors["w"],
            saved.shared("weights").numbers["third"],
        )
        self.own_tensor = saved.own("shard").tensors["s"]
        assert saved.own("empty").numbers == {"drawn": 7}


def make(root: Path, keep: int = 2, config: dict[str, Any] = CONFIG) -> Checkpoints:
    return Checkpoints(root, config=config, keep=keep)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three saves, two of them kept."""
    made = make(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        made.save(Position(step), [Weights(float(step))])
    return tmp_path / "checkpoints"


def values(root: Path, resume: str = "auto", **options: Any) -> float:
    """Load what `resume` asks for, check that it is consistent, and return its value."""
    made, part = make(root, **options), Weights(0.0)
    folder = made.find(resume)
    assert folder is not None
    made.load(folder, [part])
    value = float(part.shared_tensor[0])
    assert part.number == value / 3  # JSON keeps every bit of a float
    assert part.own_tensor.tolist() == [-value] * 3
    return value


def test_saves_the_newest_and_keeps_so_many(root: Path) -> None:
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_000002", "step_000003"]
    assert (root / "latest").read_text() == "step_000003\n"
    assert values(root) == 3.0
    assert values(root, str(root / "step_000002")) == 2.0
    assert make(root).find("never") is None
    assert make(root.parent / "elsewhere").find("auto") is None
    files = {str(path.relative_to(root)) for path in (root / "step_000003").rglob("*") if path.is_file()}
    assert files == {
        f"step_000003/{name}"
        for name in (
            "manifest.json",
            "state.json",
            "weights.safetensors",
            "rank_0000/state.json",
            "rank_0000/shard.safetensors",
        )
    }


def test_positions_sort_as_a_run_goes() -> None:
    positions = [Position(2), Position(2, 1), Position(2, 10), Position(3), Position(1_000_000)]
    assert sorted(positions, key=lambda position: position) == positions
    assert [Position.of(position.name) for position in positions] == positions
    assert Position.of("step_2") is None
    assert Position.of("step_000002.partial") is None


def test_a_position_that_is_held_is_not_written_again(root: Path) -> None:
    made = make(root)
    made.load(root / "step_000003", [Weights(0.0)])
    before = (root / "step_000003" / "manifest.json").stat().st_mtime_ns
    made.save(Position(3), [Weights(9.0)])
    assert (root / "step_000003" / "manifest.json").stat().st_mtime_ns == before


def test_going_on_from_an_older_one_gives_up_the_newer(root: Path) -> None:
    made = make(root)
    made.load(root / "step_000002", [Weights(0.0)])
    assert (
        values(root) == 2.0
    )  # `latest` moved back: a kill before the next save does not return to the future
    made = make(root)
    made.load(root / "step_000002", [Weights(0.0)])
    made.save(Position(2, 5), [Weights(2.5)])
    assert sorted(path.name for path in root.iterdir()) == [
        "latest",
        "step_000002",
        "step_000002_update_0005",
    ]
    made.save(Position(3), [Weights(30.0)])
    assert values(root) == 30.0


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "file",
    [
        "manifest.json",
        "state.json",
        "weights.safetensors",
        "rank_0000/state.json",
        "rank_0000/shard.safetensors",
    ],
)
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_torn_checkpoint_is_refused_by_the_files_name_and_the_one_before_offered(
    root: Path, file: str, damage: Callable[[Path], None]
) -> None:
    path = root / "step_000003" / file
    damage(path)
    part = Weights(0.0)
    made = make(root)
    with pytest.raises(CheckpointError) as caught:
        made.load(made.find("auto") or root, [part])
    assert str(caught.value).startswith(str(path))
    assert f"resume={root / 'step_000002'} goes on from there" in str(caught.value)
    assert float(part.shared_tensor[0]) == 0.0  # nothing was restored
    assert values(root, str(root / "step_000002")) == 2.0
    assert values(root) == 2.0


def test_where_no_other_is_whole_none_is_offered(root: Path) -> None:
    for step in (2, 3):
        flip(root / f"step_00000{step}" / "weights.safetensors")
    with pytest.raises(CheckpointError, match="No other checkpoint of this run is whole"):
        values(root)


@pytest.mark.parametrize("content", [b"", b"step_000009\n", b"../step_000003\n", b"\xff\xfe", b"step_3"])
def test_a_latest_that_names_nothing(root: Path, content: bytes) -> None:
    (root / "latest").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"latest names .*resume=.*step_000003 goes on from there"):
        values(root)
    (root / "latest").unlink()
    assert values(root) == 3.0


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({**CONFIG, "objective": {"kl_coef": 0.2, "lam": 0.95}}, r"\(objective.kl_coef\)"),
        ({**CONFIG, "seed": 4, "steps": 5}, r"\(seed, steps\)"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_by_the_fields_name(
    root: Path, config: dict[str, Any], field: str
) -> None:
    with pytest.raises(
        CheckpointError, match=r"step_000003/manifest.json: of a run with other settings " + field
    ):
        values(root, config=config)
    assert values(root, config={**CONFIG, "output_dir": "moved", "resume": "x"}) == 3.0


def edit_manifest(root: Path, **changes: Any) -> None:
    path = root / "step_000003" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "has format 1, this version reads format 2"),
        ({"ranks": 2}, "written by 2 ranks, expected 1"),
        ({"files": {"weights.safetensors": 5}}, "says nothing of 'weights.safetensors'"),
        ({"config": None}, "has no 'config'"),
        ({"config_sha256": "0"}, "of a run with other settings .config_sha256"),
    ],
)
def test_foreign_manifests(root: Path, changes: dict[str, Any], message: str) -> None:
    edit_manifest(root, **changes)
    with pytest.raises(CheckpointError, match=r"step_000003/manifest.json: " + message):
        values(root)


@pytest.mark.parametrize("resume", ["/", "no/such", "step_000003", "{root}/step_000009", "{root}"])
def test_paths_that_are_no_checkpoint_of_the_run(root: Path, resume: str) -> None:
    with pytest.raises(CheckpointError, match="resume is "):
        make(root).find(resume.format(root=root))


def test_other_versions_or_threads_are_told(root: Path) -> None:
    path = root / "step_000003" / "manifest.json"
    made_with = json.loads(path.read_text())["made_with"]
    assert made_with["threads"] == str(torch.get_num_threads())
    assert made_with["torch"] == torch.__version__
    assert make(root).load(root / "step_000003", [Weights(0.0)]) == []
    edit_manifest(root, made_with={**made_with, "threads": "64"})
    (note,) = make(root).load(root / "step_000003", [Weights(0.0)])
    assert note.startswith("threads was '64' when step_000003 was written")


def test_random_numbers_go_on_where_they_were() -> None:
    def draw() -> tuple[Tensor, list[float], list[float]]:
        return torch.rand(5), [random.gauss(0, 1) for _ in range(3)], numpy.random.randn(3).tolist()

    draw()  # an odd number of normal draws: each generator then holds the second of a pair
    state = random_state()
    first = draw()
    load_random_state(State(state.tensors, json.loads(json.dumps(state.numbers))))
    second = draw()
    assert torch.equal(first[0], second[0])
    assert first[1:] == second[1:]


def test_a_save_that_breaks_off_anywhere_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every forced write, rename and deletion of a save fails in turn; what is then there resumes to whole state."""
    calls, fail_at = 0, 0

    def failing(function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fail_at:
                raise KeyboardInterrupt  # not an error that the code handles: the process is as good as dead
            return function(*args, **kwargs)

        return wrapper

    for name in ("fsync", "replace", "rename"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    monkeypatch.setattr(shutil, "rmtree", failing(shutil.rmtree))
    seen = set()
    for attempt in range(1, 100):
        root = tmp_path / str(attempt)
        calls, fail_at = 0, 0
        made = make(root, keep=1)
        made.save(Position(1), [Weights(1.0)])
        calls, fail_at = 0, attempt
        try:
            made.save(Position(2), [Weights(2.0)])
        except KeyboardInterrupt:
            seen.add(values(root, keep=1))
            again = make(root, keep=1)
            again.load(again.find("auto") or root, [Weights(0.0)])
            again.save(Position(3), [Weights(3.0)])  # what the dead one left is in nobody's way
            assert values(root, keep=1) == 3.0
            assert not list(root.glob(".*"))
        else:
            break
    assert attempt > 12
    assert seen == {1.0, 2.0}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system takes root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_the_old_checkpoint_whole_and_is_named(small_disk: Path) -> None:
    root = small_disk / "checkpoints"
    made = make(root)
    made.save(Position(1), [Weights(1.0)])
    with pytest.raises(OSError, match=r"checkpoint was not written, the disk is full; step_000001 is whole"):
        made.save(Position(2), [Weights(2.0, size=100_000)])
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_000001"]
    assert values(root) == 1.0
    made.save(Position(2), [Weights(2.0)])  # with room again, the same object saves
    assert values(root) == 2.0


FILE_TOO_LARGE = """
import resource, sys, torch
from pathlib import Path
from ppo_fast.ppo.checkpoint import Checkpoints, Position
from ppo_fast.ppo.state import State
class Part:
    def __init__(self, size): self.size = size
    def shared_state(self): return {"weights": State({"w": torch.zeros(self.size)})}
    def own_state(self): return {}
made = Checkpoints(Path(sys.argv[1]), config={}, keep=1)
made.save(Position(1), [Part(10)])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    made.save(Position(2), [Part(10_000)])
except OSError as error:
    print(error)
"""


def test_a_file_that_the_system_refuses_is_named(tmp_path: Path) -> None:
    """A process of its own: a limit on the size of files would hold for the rest of the suite."""
    done = subprocess.run(
        [sys.executable, "-c", FILE_TOO_LARGE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "a file could not be written; step_000001 is whole" in done.stdout
    assert "File too large" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000001"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 20_000


def test_a_rank_that_cannot_write_stops_all_of_them(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from a rank whose own files were written: the vote says that another's were not."""
    made = make(root)
    votes = iter([True, False])
    monkeypatch.setattr(Ranks, "all", lambda self, flag: flag and next(votes))
    with pytest.raises(OSError, match="another rank could not write its files"):
        made.save(Position(4), [Weights(4.0)])
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_000002", "step_000003"]


def test_each_rank_writes_its_own_and_the_first_the_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks in one process, the second's save run inside of the first's: what each must write is then there."""

    class Two(Ranks):
        def __init__(self, index: int) -> None:
            self.together, self.index, self.count = False, index, 2

    first, second = (Checkpoints(tmp_path, config=CONFIG, keep=1, ranks=Two(index)) for index in (0, 1))
    write, publish = Checkpoints._write, Checkpoints._publish

    def both(self: Checkpoints, partial: Path, parts: Any) -> None:
        write(self, partial, parts)
        if self is first:
            write(second, partial, [Weights(5.0)])

    monkeypatch.setattr(Checkpoints, "_write", both)
    monkeypatch.setattr(Checkpoints, "_publish", publish)
    folder = first.save(Position(1), [Weights(4.0)])
    assert load_file(folder / "weights.safetensors")["w"][0] == 4.0
    shards = [load_file(folder / f"rank_000{index}" / "shard.safetensors")["s"][0].item() for index in (0, 1)]
    assert shards == [-4.0, -5.0]
    part = Weights(0.0)
    second.load(folder, [part])
    assert (float(part.shared_tensor[0]), float(part.own_tensor[0])) == (4.0, -5.0)
    flip(folder / "rank_0001" / "shard.safetensors")
    with pytest.raises(CheckpointError, match="rank_0001/shard.safetensors"):
        second.load(folder, [part])
    monkeypatch.setattr(Two, "all", lambda self, flag: False)  # what the first rank hears of it
    with pytest.raises(CheckpointError, match="another rank cannot use its part of it"):
        first.load(folder, [part])
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="written by 2 ranks, expected 1"):
        values(tmp_path)


def test_nothing_is_a_pickle() -> None:
    source = Path(checkpoint.__file__).read_text()
    assert "pickle" not in source.replace("nothing pickled", "")
    assert "torch.save" not in source
