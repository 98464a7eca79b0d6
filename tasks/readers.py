"""Readers of files. Each yields one record after the other, so that a file of any size is read in flat memory.

A record comes with the line on which it ends, from 1 (in Parquet: its row), for messages.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from support.errors import InputError

Records = Iterator[tuple[int, dict]]  # (line, record)

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
CONLL_SUFFIXES = (".conll", ".txt", ".bio", ".iob", ".iob2")


class Row(NamedTuple):
    """A text, or a pair of texts, with its label."""

    line: int
    text: str
    pair: str | None
    label: str


def read_rows(path: Path, columns: Sequence[Any]) -> Iterator[Row]:
    """Yields text, pair and label of each row of a TSV, CSV, JSONL or Parquet file.

    columns: names of the text, pair and label columns (pair may be None), or, for a TSV without header, numbers from 0.
    Raises: InputError naming file and line for a file that is missing, empty, damaged, not UTF-8 or without a column.
    """
    check_file(path, SUFFIXES)
    reader = {".tsv": read_tsv, ".csv": read_csv, ".parquet": read_parquet}.get(path.suffix.lower(), read_jsonl)
    required = [name for name in columns if name is not None]
    empty = True
    for line, record in read_records(path, reader, required):
        empty = False
        cells = [None if name is None else record.get(name) for name in columns]
        cells[2] = None if cells[2] is None or not str(cells[2]).strip() else str(cells[2]).strip()
        for name, cell in zip(columns, cells):
            if cell is None and name in required:
                raise InputError(f"{path}, line {line}: no value in the column {name!r}")
        if not all(is_text(cell) for name, cell in zip(columns[:2], cells) if name is not None):
            raise InputError(f"{path}, line {line}: the text is not a string of valid characters")
        yield Row(line, *cells)
    if empty:
        raise InputError(f"{path}: holds no examples")


def check_file(path: Path, suffixes: Sequence[str] = ()) -> None:
    """Raises InputError if there is no such file, or if its name has none of these endings."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if suffixes and path.suffix.lower() not in suffixes:
        raise InputError(f"{path}: unknown kind of file; expected {', '.join(suffixes)}")


def read_records(path: Path, reader: Callable[[Path, Sequence[Any]], Records], columns: Sequence[Any] = ()) -> Records:
    """Yields what the reader yields. Raises: InputError, naming the last good line, where the file cannot be read."""
    line = 0
    try:
        for line, record in reader(path, columns):
            yield line, record
    except UnicodeDecodeError as error:
        raise InputError(f"{_after(path, line)}: not UTF-8 ({error.reason}); convert the file first") from None
    except (OSError, csv.Error) as error:
        raise InputError(f"{_after(path, line)}: not readable ({error})") from None


def _after(path: Path, line: int) -> str:
    return f"{path}, after line {line}" if line else str(path)


# ----------------------------------------------------------------------------------------------------------------------
# One reader for each kind of file: (path, the columns that each record must have) -> (line, record)


def read_tsv(path: Path, columns: Sequence[Any]) -> Records:
    """GLUE's TSV: quotes are ordinary characters, and a byte-order mark may stand first.

    Columns that are numbers say that the file has no header line.
    """
    header: list[Any] | None = None
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            cells = line.rstrip("\r\n").split("\t")
            if header is None:
                if any(isinstance(name, int) for name in columns):
                    header = list(range(len(cells)))
                else:
                    header = cells
                    _check_columns(path, columns, header)
                    continue
            if cells == [""]:
                continue
            if len(cells) != len(header):
                raise InputError(f"{path}, line {number}: {len(cells)} columns, expected {len(header)}")
            yield number, dict(zip(header, cells))


def read_csv(path: Path, columns: Sequence[Any]) -> Records:
    """CSV with a header line."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(2**31 - 1)
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        if header:
            _check_columns(path, columns, header)
        for cells in reader:
            if cells and len(cells) != len(header):
                raise InputError(
                    f"{path}, line {reader.line_num}: {len(cells)} columns, expected {len(header)}; "
                    "put cells that hold commas in quotes"
                )
            if cells:
                yield reader.line_num, dict(zip(header, cells))


def read_jsonl(path: Path, columns: Sequence[Any] = ()) -> Records:
    """One JSON object a line. Blank lines are skipped."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not JSON ({error}); expected one object per line") from None
            if not isinstance(record, dict):
                raise InputError(f"{path}, line {number}: expected a JSON object")
            _check_columns(path, columns, list(record), number)
            yield number, record


def read_parquet(path: Path, columns: Sequence[Any] = ()) -> Records:
    """The rows of a Parquet file: these columns of them, or all where none is named."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        file = parquet.ParquetFile(path)
        _check_columns(path, columns, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=1024, columns=list(columns) or None):
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def parquet_has(path: Path, column: str) -> bool:
    """Whether a Parquet file has a column; False for a damaged file, of which `read_parquet` says what is wrong."""
    from pyarrow import ArrowException, parquet

    try:
        return column in parquet.read_schema(path).names
    except ArrowException:
        return False


def read_conll(path: Path, columns: Sequence[Any] = ()) -> Records:
    """CoNLL: a word a line, its tag in the last column, blank lines between sentences.

    Yields {"words": [...], "labels": [...]} for each sentence, without labels where the file has words alone. Columns
    are separated by tabs, or, in a line without tabs, by blanks. "-DOCSTART-" lines count as blank lines, and
    "# key = value" lines are comments. `columns` is not used: the file's columns have no names.
    """
    rows: list[list[str]] = []  # the cells of the sentence's lines
    count, first_line = 0, 0  # how many columns the file has, and the line that shows it
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(chain(file, [""]), 1):  # the blank line at the end closes the last sentence
            line = line.rstrip(" \t\n")
            if line.startswith("# ") and " = " in line:
                continue
            if not line or line.startswith("-DOCSTART-"):
                if rows:
                    tags = {"labels": [row[-1] for row in rows]} if count > 1 else {}
                    yield number - 1, {"words": [row[0] for row in rows]} | tags
                rows = []
                continue
            # Between tabs a word may hold blanks. Other white space, such as a no-break space, separates no columns.
            cells = [cell.strip(" ") for cell in line.split("\t")] if "\t" in line else re.split(" +", line.lstrip(" "))
            if not count:
                count, first_line = len(cells), number
            if len(cells) != count:
                raise InputError(
                    f"{path}, line {number}: {len(cells)} columns, expected {count} as in line {first_line}; "
                    "give the word first and its tag last, or words alone throughout"
                )
            if not cells[0]:
                raise InputError(f"{path}, line {number}: no word before the tag; expected the word first")
            rows.append(cells)


def _check_columns(path: Path, columns: Sequence[Any], present: list[str], line: int = 1) -> None:
    for name in columns:
        if name not in present:
            names = ", ".join(map(repr, present[:20])) or "none"
            raise InputError(
                f"{path}, line {line}: no column {name!r} but {names}; "
                "without --task, name the columns of your own data with --text-column, --pair-column and --label-column"
            )


# ----------------------------------------------------------------------------------------------------------------------
# Values


def is_text(value: Any) -> bool:
    """Whether a value is a string that UTF-8 can hold. JSON can spell others."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def is_number(text: str) -> bool:
    """Whether a text spells a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def label_order(name: str) -> tuple[int, float, str]:
    """A sorting key for labels: numbers by value, then names.

    >>> sorted(["b", "10", "9", "a"], key=label_order)
    ['9', '10', 'a', 'b']
    """
    return (0, float(name), name) if is_number(name) else (1, 0.0, name)
