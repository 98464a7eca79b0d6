"""Random tables through every kind of file: the rows that other readers give, or a refusal.

LTP_TABLES=1000 reads more of them. The csv module reads CSV; pandas JSONL and Parquet, without guessing types; TSV is
cut at tabs, as GLUE's loaders cut it.
"""

from __future__ import annotations

import csv
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from support.errors import InputError
from tasks.readers import read_rows

COUNT = int(os.environ.get("LTP_TABLES", 120))
CELLS = [
    "plain", "", " ", "  blanks around ", 'a "quoted" word', '"', "it's", "a,b;c", "tab\there", "two\nlines",
    "cr\rhere", "é ü 中文", "😀", "nan", "NaN", "null", "None", "NA", "true", "0", "-1", "1.50", "1e5", "0x10", "\\",
    "\\n", "#", "\u00a0", "\u2028", "[1, 2]", '{"a": 1}', "<s>", "ﬁ",
]  # fmt: skip
LABELS: list[Any] = ["yes", "no", " yes ", "nan", 0, 1, 2, -1, 1.0, 0.5, True, False, "1", "True", "é", 10**12]
NO_LABELS: list[Any] = [None, float("nan"), "", " ", [1], ["a"], {"a": 1}, float("inf"), []]


def table_of(draw: random.Random) -> list[dict[str, Any]]:
    """Rows with two texts and a label, and a column that nobody asks for."""
    labels = draw.choice([LABELS, ["yes", "no"], [0, 1], [0.0, 1.0, 2.5], [True, False]])
    rows = [
        {
            "other": draw.choice(CELLS),
            "text": draw.choice(CELLS),
            "label": draw.choice(labels),
            "pair": draw.choice(CELLS),
        }
        for _ in range(draw.randrange(1, 12))
    ]
    if draw.random() < 0.2:
        draw.choice(rows)["label"] = draw.choice(NO_LABELS)
    return rows


def write(draw: random.Random, path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the table in one of the ways that programs do: byte-order mark, line ends, quotes, a last line without."""
    end = draw.choice(["\n", "\r\n"])
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return
    if path.suffix == ".jsonl":
        ascii = draw.choice([True, False])
        text = end.join(json.dumps(row, ensure_ascii=ascii) for row in rows)
    elif path.suffix == ".tsv":
        text = end.join("\t".join(map(str, cells)) for cells in ([*rows[0]], *(row.values() for row in rows)))
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            quoting = draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
            writer = csv.DictWriter(file, list(rows[0]), quoting=quoting, lineterminator=end)
            writer.writeheader()
            writer.writerows(rows)
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read().removesuffix(end)
    mark, last = draw.choice(["", "\ufeff"]), draw.choice(["", end])
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(mark + text + last)


def expected_rows(path: Path) -> list[tuple[Any, Any, Any]]:
    """Text, pair and label of each row, as another reader gives them. Raises: what it does."""
    import pandas

    columns = ["text", "pair", "label"]
    if path.suffix == ".csv":
        with open(path, encoding="utf-8-sig", newline="") as file:
            return [tuple(row[name] for name in columns) for row in csv.DictReader(file)]
    if path.suffix == ".tsv":
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = [line.rstrip("\r") for line in file.read().split("\n") if line.strip("\r")]
        header = lines[0].split("\t")
        return [tuple(dict(zip(header, line.split("\t")))[name] for name in columns) for line in lines[1:]]
    if path.suffix == ".parquet":
        frame = pandas.read_parquet(path, dtype_backend="pyarrow")
    else:
        lines = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
        return [tuple(json.loads(line)[name] for name in columns) for line in lines if line]
    return [tuple(frame[name].iloc[i] for name in columns) for i in range(len(frame))]


def is_no_label(value: Any) -> bool:
    return value is None or isinstance(value, (list, dict)) or str(value).strip().lower() in ("", "<na>") or (
        isinstance(value, float) and (value != value or value in (float("inf"), float("-inf")))
    )  # fmt: skip


@pytest.fixture(scope="module")
def outcomes() -> list[str]:
    return []


@pytest.mark.parametrize("number", range(COUNT))
def test_a_random_table(number, outcomes, tmp_path):
    draw = random.Random(number)
    rows = table_of(draw)
    path = tmp_path / f"table{draw.choice(['.csv', '.tsv', '.jsonl', '.parquet'])}"
    try:
        write(draw, path, rows)
    except Exception:  # pyarrow wants one type a column
        outcomes.append("not written")
        return
    try:
        ours = [tuple(row)[1:] for row in read_rows(path, ("text", "pair", "label"))]
    except InputError as error:
        outcomes.append(f"refused: {error}")
        # TSV has no quotes, and a writer of CSV leaves a bare carriage return without.
        breaks = {".tsv": "\t\n", ".csv": "\r"}.get(path.suffix, "")
        torn = any(c in str(cell) for row in rows for cell in row.values() for c in breaks)
        assert torn or any(is_no_label(row["label"]) for row in rows), error
        return
    outcomes.append("read")
    theirs = expected_rows(path)
    assert ours == [(text, pair, str(label).strip()) for text, pair, label in theirs]
    assert not any(is_no_label(label) for _, _, label in theirs)


def test_most_tables_are_read(outcomes):
    if len(outcomes) < 60:
        pytest.skip("needs the tests of 60 tables before it")
    assert outcomes.count("read") > len(outcomes) / 2 and any("refused" in outcome for outcome in outcomes)
