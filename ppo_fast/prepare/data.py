"""Reading of jsonl and csv files, with errors that name the file, the line and the key."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read_jsonl(path: str | Path, required: Sequence[Sequence[str]]) -> list[Row]:
    """Read a file of one JSON object a line.

    Args:
        path: the file, UTF-8; lines of white space alone are skipped.
        required: alternatives, each a set of keys that makes a row usable, e.g.
            `[("prompt", "response"), ("text",)]`; every row must hold all keys of at least one of them.

    Returns:
        The objects in the order of the file, other keys included.

    Raises:
        FileNotFoundError: there is no such file. ValueError: a line is not a JSON object, or lacks the keys
        (the message names file, line and keys); or the
            file holds no rows.
    """
    rows = list(_checked(Path(path), _json_lines(_existing(path)), required))
    return _non_empty(Path(path), rows)


def read_csv(path: str | Path, required: Sequence[Sequence[str]]) -> list[Row]:
    """Read a csv file with a header line, every value a string; arguments and errors as `read_jsonl`."""
    # utf-8-sig: spreadsheets write a byte order mark, which would become part of the first column's name.
    with _existing(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            header = reader.fieldnames or []
            twice = next((name for name in header if header.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"{path}: line 1: has the column {twice!r} twice")
            rows = list(_checked(Path(path), ((reader.line_num, row) for row in reader), required))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: after line {reader.line_num}: not UTF-8 ({error.reason})") from error
        except csv.Error as error:
            raise ValueError(f"{path}: after line {reader.line_num}: not csv ({error})") from error
    return _non_empty(Path(path), rows)


def read_rows(path: str | Path, required: Sequence[Sequence[str]]) -> list[Row]:
    """Read a `.csv` file with `read_csv` and any other with `read_jsonl`."""
    return (read_csv if Path(path).suffix == ".csv" else read_jsonl)(path, required)


def strings(path: str | Path, rows: list[Row], key: str) -> list[str]:
    """The value of `key` in every row, which must be text and not blank.

    Raises:
        ValueError: a value is of another type or blank; the message names file, row and key.
    """
    for number, row in enumerate(rows, start=1):
        value = row[key]
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f"{path}: row {number}: {key!r} is {_short(value)}, expected text that is not blank"
            )
    return [row[key] for row in rows]


def _existing(path: str | Path) -> Path:
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{file}: is a folder, expected a file")
    if file.exists() and not file.is_file():
        raise ValueError(f"{file}: is no regular file")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    return file


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    # Bytes, decoded a line at a time: a wrong byte is then reported with its line, and U+2028 ends no line.
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            row = json.loads(text, object_pairs_hook=_keys_once)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: line {number}: not UTF-8 ({error.reason})") from error
        except RecursionError as error:
            raise ValueError(f"{path}: line {number}: nested too deep") from error
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}: line {number}: not JSON ({error.msg}, column {error.colno})"
            ) from error
        except ValueError as error:  # a key twice, or a number of more digits than Python reads
            raise ValueError(f"{path}: line {number}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number}: {_short(row)}, expected a JSON object")
        yield number, row


def _keys_once(pairs: list[tuple[str, Any]]) -> Row:
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"has the key {twice!r} twice")
    return dict(pairs)


def _checked(
    path: Path, numbered: Iterator[tuple[int, Row]], required: Sequence[Sequence[str]]
) -> Iterator[Row]:
    for number, row in numbered:
        if not any(all(row.get(key) is not None for key in keys) for keys in required):
            wanted = " or ".join("{" + ", ".join(keys) + "}" for keys in required)
            got = ", ".join(str(key) for key in row)
            raise ValueError(f"{path}: line {number}: has keys {{{got}}}, expected {wanted}")
        yield row


def _non_empty(path: Path, rows: list[Row]) -> list[Row]:
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    return rows


def _short(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
