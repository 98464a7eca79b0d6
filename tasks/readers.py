"""Readers of files. Each yields one record after the other, so that a file of any size is read in flat memory.

A record comes with the line on which it ends, from 1 (in Parquet: its row), for messages.
"""

from __future__ import annotations

import csv
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from support.errors import InputError, plural
from support.files import is_utf8, open_text

Records = Iterator[tuple[int, dict]]  # (line, record)

NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
LARGEST = 3.4e38  # about the largest number of float32
TORN = object()  # the key of a record that has too few columns: what is wrong with it
SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
# Comments before a sentence: "# text = ...", "# newpar", "# id 12 domain=en".
COMMENT = re.compile(r"#\s+((newdoc|newpar)\b|id\s.*=|\S.* = )")
CONLL_SUFFIXES = (".conll", ".txt", ".bio", ".iob", ".iob2")


class Row(NamedTuple):
    """A text, or a pair of texts, with its label."""

    line: int
    text: str
    pair: str | None
    label: str | None  # "": none was asked for; None: a torn line, see `read_rows`


def read_rows(path: Path, columns: Sequence[Any], torn: bool = False) -> Iterator[Row]:
    """Yields text, pair and label of each row of a TSV, CSV, JSONL or Parquet file.

    columns: names of the text, pair and label columns (the last two may be None), or, for a TSV without header, numbers
        from 0.
    torn: a TSV line with too few columns becomes a row without a label. GLUE's own files have some: a line break in a
        text tears a record in two.
    Raises: InputError naming file and line for a file that is missing, empty, damaged, not UTF-8 or without a column,
    and for a value that is no text, or no label.
    """
    check_file(path, SUFFIXES)
    kind = file_kind(path)
    reader = {".tsv": read_tsv, ".csv": read_csv, ".parquet": read_parquet}.get(kind, read_jsonl)
    required = [name for name in columns if name is not None]
    empty = True
    for line, record in read_records(path, reader, required):
        if record.get(TORN):
            if not torn:
                raise InputError(f"{path}, line {line}: {record[TORN]}")
            yield Row(line, "", None if columns[1] is None else "", None)
            continue
        empty = False
        where = f"{path}, line {line}"
        texts = [None if name is None else read_text(record.get(name), name, where) for name in columns[:2]]
        yield Row(line, *texts, read_label(record.get(columns[2]), columns[2], where) if columns[2] is not None else "")
    if empty:
        raise InputError(f"{path}: holds no examples")


def file_kind(path: Path) -> str:
    """The ending of a file's name that tells its kind, in lower case: ".jsonl" of texts.JSONL.gz."""
    name = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return name.suffix.lower()


def check_file(path: Path, suffixes: Sequence[str] = ()) -> None:
    """Raises InputError if there is no such file, or if its name has none of these endings."""
    if not path.is_file():
        if path.exists() and not path.is_dir():  # a pipe
            raise InputError(f"{path}: is no regular file; it is read more than once, so save it first")
        raise InputError(f"{path}: no such file")
    if suffixes and file_kind(path) not in suffixes:
        raise InputError(f"{path}: unknown kind of file; expected {', '.join(suffixes)}")


def read_records(path: Path, reader: Callable[[Path, Sequence[Any]], Records], columns: Sequence[Any] = ()) -> Records:
    """Yields what the reader yields. Raises: InputError, naming the last good line, where the file cannot be read."""
    line = 0
    try:
        for line, record in reader(path, columns):
            yield line, record
    except UnicodeDecodeError as error:
        raise InputError(f"{_after(path, line)}: not UTF-8 ({error.reason}); convert the file first") from None
    except (OSError, EOFError, zlib.error, csv.Error, OverflowError) as error:  # file, gzip, CSV, dates in Parquet
        raise InputError(f"{_after(path, line)}: not readable ({str(error).strip()})") from None


def _after(path: Path, line: int) -> str:
    return f"{path}, after line {line}" if line else str(path)


# ----------------------------------------------------------------------------------------------------------------------
# One reader for each kind of file: (path, the columns that each record must have) -> (line, record)


def read_tsv(path: Path, columns: Sequence[Any]) -> Records:
    """GLUE's TSV: quotes are ordinary characters, a byte-order mark may stand first, and blank lines are skipped.

    Columns that are numbers say that the file has no header line.
    """
    header: list[Any] | None = None
    with open_text(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            cells = line.rstrip("\r\n").split("\t")
            if cells == [""]:
                continue
            if header is None:
                if numbers := [name for name in columns if isinstance(name, int)]:
                    header = list(range(len(cells)))
                    if max(numbers) >= len(cells):
                        expected = f"expected a line without names, and a text in column {max(numbers) + 1}"
                        raise InputError(f"{path}, line {number}: {plural(len(cells), 'column')}; {expected}")
                else:
                    header = cells
                    _check_columns(path, columns, header)
                    continue
            if len(cells) > len(header):
                raise InputError(f"{path}, line {number}: {len(cells)} columns, expected {len(header)}")
            torn = {TORN: f"{len(cells)} columns, expected {len(header)}"} if len(cells) < len(header) else {}
            yield number, dict(zip(header, cells)) | torn


def read_csv(path: Path, columns: Sequence[Any]) -> Records:
    """CSV with a header line. Blank lines are skipped."""
    with open_text(path, newline="") as file:
        csv.field_size_limit(2**31 - 1)
        reader = csv.reader(file, strict=True)
        rows = filter(None, reader)  # without the blank lines
        header = next(rows, [])
        if header:
            _check_columns(path, columns, header)
        for cells in rows:
            if len(cells) != len(header):
                raise InputError(
                    f"{path}, line {reader.line_num}: {len(cells)} columns, expected {len(header)}; "
                    "put cells that hold commas in quotes"
                )
            yield reader.line_num, dict(zip(header, cells))


def read_jsonl(path: Path, columns: Sequence[Any] = ()) -> Records:
    """One JSON object a line. Blank lines are skipped."""
    with open_text(path) as file:
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
    except (OSError, ArrowException):
        return False


def read_conll(path: Path, columns: Sequence[Any] = ()) -> Records:
    """CoNLL: a word a line, its tag in the last column, blank lines between sentences.

    Yields {"words": [...], "labels": [...]} for each sentence, without labels where the file has words alone. Columns
    are separated by tabs, or, in a line without tabs, by blanks. "-DOCSTART-" lines count as blank lines, and
    "# key = value" lines before a sentence are comments. `columns` is not used: the file's columns have no names.
    """
    rows: list[list[str]] = []  # the cells of the sentence's lines
    count, first_line = 0, 0  # how many columns the file has, and the line that shows it
    with open_text(path) as file:
        for number, line in enumerate(chain(file, [""]), 1):  # the blank line at the end closes the last sentence
            line = line.rstrip(" \t\n")
            if not rows and COMMENT.match(line):
                continue
            if not line or line.startswith("-DOCSTART-"):
                if rows:
                    if (
                        count > 2
                        and len(rows) > 2
                        and [row[0] for row in rows] == [str(i + 1) for i in range(len(rows))]
                    ):
                        raise InputError(
                            f"{path}, line {number - len(rows)}: the first column numbers the words; expected the word "
                            "first and its tag last"
                        )
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


def hub_records(title: str, layout: str, *names: str, split: str) -> Records:
    """The records of a data set on the hub, with their numbers from 1.

    title, layout: what messages call the data set, and the files in its place. names: of `datasets.load_dataset`.
    Raises: InputError.
    """
    import datasets

    try:
        table = datasets.load_dataset(*names, split=split)
    except Exception as error:  # offline, a proxy, a full disk: the library's errors have no common class
        cause = error.__cause__ or error
        reason = (str(cause).splitlines() or [""])[0][:200]
        raise InputError(
            f"{title} could not be loaded from the hub ({type(cause).__name__}: {reason}); "
            f"with no network, pass a folder {layout} with --data PATH"
        ) from None
    yield from enumerate(table, 1)


def _check_columns(path: Path, columns: Sequence[Any], present: list[str], line: int = 1) -> None:
    for name in columns:
        if present.count(name) > 1:
            raise InputError(f"{path}, line {line}: {present.count(name)} columns are called {name!r}; rename one")
        if name not in present:
            names = ", ".join(map(repr, present[:20])) or "none"
            raise InputError(
                f"{path}, line {line}: no column {name!r} but {names}; "
                "without --task, name the columns of your own data with --text-column, --pair-column and --label-column"
            )


# ----------------------------------------------------------------------------------------------------------------------
# Values


def read_text(value: Any, name: Any, where: str) -> str:
    """The text of a cell. Raises: InputError for a missing one, or another kind of value."""
    if is_missing(value):
        raise InputError(f"{where}: no value in the column {name!r}")
    if not is_text(value):
        raise InputError(f"{where}: the text in the column {name!r} is not a string of valid characters")
    return value


def read_label(value: Any, name: Any, where: str) -> str:
    """The label of a cell, a text or a number, without blanks around it.

    Raises: InputError for a missing one, several, or another kind of value.
    """
    if is_missing(value) or isinstance(value, str) and not value.strip():
        raise InputError(f"{where}: no value in the column {name!r}")
    if isinstance(value, (list, tuple, dict)):
        raise InputError(
            f"{where}: the column {name!r} holds {json.dumps(value, default=str)[:80]}; expected one label an example"
        )
    if not (isinstance(value, (bool, int, float, Decimal)) or is_text(value)) or value in (math.inf, -math.inf):
        raise InputError(f"{where}: {str(value)[:80]!r} in the column {name!r} is neither a text nor a number")
    return str(value).strip()


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: null, or the number NaN, which stands for null in columns of numbers."""
    return value is None or isinstance(value, (float, Decimal)) and math.isnan(value)


def is_text(value: Any) -> bool:
    """Whether a value is a string of valid characters."""
    return isinstance(value, str) and is_utf8(value)


def is_number(text: str) -> bool:
    """Whether a text spells a number that float32 holds.

    >>> is_number("-1.5e3"), is_number("1_000"), is_number("1e39")
    (True, False, False)
    """
    return bool(NUMBER.fullmatch(text)) and abs(float(text)) < LARGEST


def label_order(name: str) -> tuple[int, float, str]:
    """A sorting key for labels: numbers by value, then names.

    >>> sorted(["b", "10", "9", "a"], key=label_order)
    ['9', '10', 'a', 'b']
    """
    return (0, float(name), name) if is_number(name) else (1, 0.0, name)
