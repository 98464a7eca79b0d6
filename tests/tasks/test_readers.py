"""Readers of TSV, CSV, JSONL and Parquet. CoNLL is tested with the tagging task."""

import doctest
import json
from pathlib import Path

import pytest

from support.errors import InputError
from tasks import readers
from tasks.readers import read_rows


def rows(path, columns=("text", None, "label")):
    return [tuple(row) for row in read_rows(path, columns)]


def test_tsv_quotes_are_literal_and_a_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_bytes('\ufefflabel\ttext\n1\t"Open quote\n0\tit\'s "fine"\r\n'.encode())
    assert rows(path) == [(2, '"Open quote', None, "1"), (3, 'it\'s "fine"', None, "0")]


def test_csv_jsonl_and_parquet_read_alike(tmp_path):
    import pyarrow
    from pyarrow import parquet

    records = [{"text": 'a, "quoted"\nline', "other": "é", "label": "x"}, {"text": "", "other": "b", "label": "y"}]
    (tmp_path / "a.csv").write_text('other,text,label\né,"a, ""quoted""\nline",x\nb,"",y\n', encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    expected = [('a, "quoted"\nline', "é", "x"), ("", "b", "y")]
    for suffix in ("csv", "jsonl", "parquet"):
        assert [row[1:] for row in rows(tmp_path / f"a.{suffix}", ("text", "other", "label"))] == expected, suffix


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.tsv", b"", "holds no examples|no column"),
        ("x.tsv", b"text\tlabel\n", "holds no examples"),
        ("x.tsv", b"text\tlabel\nabc\n", "line 2: 1 columns, expected 2"),
        ("x.tsv", b"words\tlabel\na\t1\n", "no column 'text'"),
        ("x.tsv", b"text\tlabel\n\xff\xfe\t1\n", "not UTF-8"),
        ("x.csv", b"text\na\n", "no column 'label'"),
        ("x.csv", b"text,label\na, b,1\n", "line 2: 3 columns, expected 2"),
        ("x.csv", b'text,label\n"open,1\n', "not readable"),
        ("x.jsonl", b"{'text'}\n", "line 1: not JSON"),
        ("x.jsonl", b'{"text": "a", "label": 1}\n[1]\n', "line 2: expected a JSON object"),
        ("x.jsonl", b'{"text": 5, "label": 1}\n', "line 1: the text is not a string of valid"),
        ("x.jsonl", b'{"text": "a", "label": null}\n', "line 1: no value in the column 'label'"),
        ("x.parquet", b"PAR1 not really", "not a readable Parquet file"),
        ("x.xlsx", b"", "unknown kind of file"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}.*({message})"):
        rows(tmp_path / name)


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match="nowhere.tsv: no such file"):
        rows(Path("nowhere.tsv"))


def test_the_label_may_be_left_out_where_it_is_not_needed(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "b", "label": " y "}\n')
    columns = ("text", None, "label")
    assert [tuple(row) for row in read_rows(tmp_path / "x.jsonl", columns, label_needed=False)] == [
        (1, "a", None, None),
        (2, "b", None, "y"),
    ]


def test_examples_in_docstrings():
    results = doctest.testmod(readers)
    assert results.attempted and not results.failed
