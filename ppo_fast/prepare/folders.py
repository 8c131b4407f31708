"""Output folders and files that are either absent or complete: nothing half-written under its final name."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def refuse_non_empty(folder: str | Path, name: str = "output") -> Path:
    """Check that `folder` may be written, and return it as a path.

    Args:
        folder: the folder a command is about to fill; it may be absent or empty.
        name: the option that the folder came from, for the message.

    Raises:
        ValueError: the folder holds something, or the path is a file.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{name}: {path} is a file, expected a folder that is absent or empty")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{name}: {path} is not empty; name another folder or remove it first")
    return path


@contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """Yield an empty sibling of `folder` to write into; when the block ends well it takes the final name.

    A process killed in the block leaves `<folder>.partial`, which the next call clears; `folder` itself
    appears by one rename, so its presence means that everything in it was written.
    """
    target = Path(folder)
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    yield partial
    # POSIX rename replaces an empty folder and refuses a full one: nothing that exists is ever overwritten.
    partial.rename(target)


def write_whole(path: Path, text: str) -> None:
    """Write a text file (UTF-8) under a temporary name and rename it: it is never seen half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
