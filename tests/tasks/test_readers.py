"""Readers of files: rows of TSV, CSV, JSONL and Parquet, and tagged sentences of CoNLL, JSONL and Parquet."""

import doctest
import json
import tracemalloc
from pathlib import Path

import pytest

from support.errors import InputError
from tasks import readers
from tasks.readers import read_rows
from tasks.tagging import read_tagged

# ---- rows ----


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


def test_blank_lines_are_skipped_before_the_names_too(tmp_path):
    for name, comma in (("a.csv", ","), ("a.tsv", "\t")):
        (tmp_path / name).write_text("\ntext,label\n\na,x\n".replace(",", comma))
        assert rows(tmp_path / name) == [(4, "a", None, "x")]


def test_labels_are_texts_without_blanks_around_them(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a", "label": 3}\n{"text": " b ", "label": " y "}\n')
    assert rows(tmp_path / "x.jsonl") == [(1, "a", None, "3"), (2, " b ", None, "y")]


# ---- tagged sentences ----


def tagged(path: Path, **columns: str) -> list[tuple]:
    return [tuple(sentence) for sentence in read_tagged(path, **columns)]


def read(folder: Path, name: str, content: str | bytes, **columns: str) -> list[tuple]:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tagged(path, **columns)


def parquet(folder: Path, records: list[dict], **columns: str) -> list[tuple]:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), folder / "x.parquet")
    return tagged(folder / "x.parquet", **columns)


CONLL = """-DOCSTART- -X- -X- O

EU NNP I-NP B-ORG
rejects VBZ I-VP O


# text = Peter Blackburn
Peter NNP I-NP B-PER
Blackburn NNP I-NP I-PER
"""
SENTENCES = [(["EU", "rejects"], ["B-ORG", "O"], 4), (["Peter", "Blackburn"], ["B-PER", "I-PER"], 9)]


@pytest.mark.parametrize("name", ["x.conll", "x.txt", "x.TSV", "x.bio", "x"])
def test_conll_by_hand(tmp_path, name):
    variants = {
        "as it stands": CONLL,
        "no last newline": CONLL.rstrip(),
        "tabs": CONLL.replace(" ", "\t").replace("#\ttext\t=\t", "# text = "),
        "windows": "\ufeff" + CONLL.replace("\n", "\r\n"),
        "blanks at the ends": CONLL.replace("\n", "  \n").replace("EU NNP", " EU   NNP"),
    }
    for variant, content in variants.items():
        assert read(tmp_path, name, content) == SENTENCES, variant


def test_conll_of_words_alone_has_no_labels(tmp_path):
    assert read(tmp_path, "x.txt", "EU\nrejects\n\n#\nx\n") == [(["EU", "rejects"], None, 2), (["#", "x"], None, 5)]


def test_what_a_conll_word_may_hold(tmp_path):
    assert read(tmp_path, "x.tsv", "10 000\tB-N\n10\u00a0000\tO\n#\tO\n# \tO\n") == [
        (["10 000", "10\u00a0000", "#", "#"], ["B-N", "O", "O", "O"], 4)
    ]
    assert read(tmp_path, "x.txt", "10\u00a0000 O\n\u3000 O\n") == [(["10\u00a0000", "\u3000"], ["O", "O"], 2)]


def test_json_lines_and_parquet_by_hand(tmp_path):
    records = [{"words": ["EU", "rejects"], "labels": ["B-ORG", "O"]}, {"words": ["Café"], "labels": ["O"]}]
    expected = [(["EU", "rejects"], ["B-ORG", "O"]), (["Café"], ["O"])]
    for name in ("x.jsonl", "x.json", "x.JSONL"):
        found = read(tmp_path, name, "\n\n".join(map(json.dumps, records)) + "\n")
        assert found == [(*expected[0], 1), (*expected[1], 3)], name  # lines of the file
    assert parquet(tmp_path, records) == [(*expected[0], 1), (*expected[1], 2)]  # rows


def test_column_names_and_numbers_as_labels(tmp_path):
    records = [{"id": "0", "tokens": ["EU", "rejects"], "ner_tags": [3, 0]}]
    columns, expected = {"words": "tokens", "labels": "ner_tags"}, [(["EU", "rejects"], ["3", "0"], 1)]
    assert read(tmp_path, "x.jsonl", json.dumps(records[0]), **columns) == expected
    assert read(tmp_path, "x.jsonl", '{"tokens": ["a"], "ner_tags": [" O "]}', **columns) == [(["a"], ["O"], 1)]
    assert parquet(tmp_path, records, **columns) == expected


def test_without_labels_there_are_none(tmp_path):
    assert read(tmp_path, "x.jsonl", '{"words": ["EU"]}\n{"words": ["a"], "labels": null}') == [
        (["EU"], None, 1),
        (["a"], None, 2),
    ]
    assert parquet(tmp_path, [{"words": ["EU"], "other": 1}]) == [(["EU"], None, 1)]


def test_bad_parquet_rows(tmp_path):
    with pytest.raises(InputError, match="x.parquet, line 2: 2 words, 1 labels"):
        parquet(tmp_path, [{"words": ["a"], "labels": [0]}, {"words": ["a", "b"], "labels": [0]}])
    with pytest.raises(InputError, match="x.parquet, line 1: 'words' is not a list of words"):
        parquet(tmp_path, [{"words": "a b", "labels": [0]}])
    with pytest.raises(InputError, match="x.parquet, line 1: no column 'words' but 'tokens'"):
        parquet(tmp_path, [{"tokens": ["a"], "labels": [0]}])


@pytest.mark.parametrize("read", [lambda path: rows(path, ("words", None, "labels")), tagged])
def test_a_parquet_file_with_a_damaged_end_is_one_line(tmp_path, read):
    parquet(tmp_path, [{"words": ["a"], "labels": [0]}])
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for i in range(end, end + 8):
        content[i] ^= 0xFF
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(InputError, match="x.parquet: not .*readable") as error:
        read(tmp_path / "x.parquet")
    assert "\n" not in str(error.value)


def test_a_date_that_python_does_not_have_is_one_line(tmp_path):
    import pyarrow
    from pyarrow import parquet

    dates = pyarrow.array([10**7], pyarrow.int32()).cast(pyarrow.date32())
    parquet.write_table(pyarrow.table({"text": ["a"], "label": dates}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="x.parquet: not readable .date value out of range."):
        rows(tmp_path / "x.parquet")


@pytest.mark.parametrize("name, good, bad", [("x.conll", "a O\n\n", "b\n\n"), ("x.jsonl", '{"words": ["a"]}\n', "?\n")])
def test_sentences_come_before_the_file_is_read_to_its_end(tmp_path, name, good, bad):
    (tmp_path / name).write_text(good + bad)
    reader = read_tagged(tmp_path / name)
    assert next(reader).words == ["a"]
    with pytest.raises(InputError):
        next(reader)


@pytest.mark.parametrize("name, sentence", [("x.conll", "Malden B-LOC\n\n"), ("x.jsonl", '{"words": ["Malden"]}\n')])
def test_memory_is_flat(tmp_path, name, sentence):
    (tmp_path / name).write_text(sentence * 20_000)
    tracemalloc.start()
    assert sum(1 for _ in read_tagged(tmp_path / name)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000  # bytes: less than the file has


# ---- both ----


@pytest.mark.parametrize(
    "read, name, content, message",
    [
        (rows, "x.tsv", b"", ": holds no examples"),
        (rows, "x.tsv", b"text\tlabel\n", ": holds no examples"),
        (rows, "x.tsv", b"text\tlabel\nabc\n", ", line 2: 1 columns, expected 2"),
        (rows, "x.tsv", b"words\tlabel\na\t1\n", ", line 1: no column 'text'"),
        (rows, "x.tsv", b"text\tlabel\n\xff\xfe\t1\n", ".*: not UTF-8"),
        (rows, "x.csv", b"text\na\n", ", line 1: no column 'label'"),
        (rows, "x.csv", b"text,label\na, b,1\n", ", line 2: 3 columns, expected 2"),
        (rows, "x.csv", b'text,label\n"open,1\n', ": not readable"),
        (rows, "x.jsonl", b"{'text'}\n", ", line 1: not JSON"),
        (rows, "x.jsonl", b'{"text": "a", "label": 1}\n[1]\n', ", line 2: expected a JSON object"),
        (
            rows,
            "x.jsonl",
            b'{"text": 5, "label": 1}\n',
            ", line 1: the text in the column 'text' is not a string of valid",
        ),
        (rows, "x.jsonl", b'{"text": "a", "label": null}\n', ", line 1: no value in the column 'label'"),
        (rows, "x.parquet", b"PAR1 not really", ": not a readable Parquet file"),
        (rows, "x.xlsx", b"", ": unknown kind of file"),
        (tagged, "x.conll", b"", ": holds no sentences"),
        (tagged, "x.conll", b"\n-DOCSTART- O\n\n", ": holds no sentences"),
        (tagged, "x.conll", b"EU B-ORG\nit\n", ", line 2: 1 columns, expected 2 as in line 1; give the word first"),
        (tagged, "x.conll", b"EU B-ORG\n\nrejects\t\n", ", line 3: 1 columns, expected 2"),
        (tagged, "x.conll", b"EU\n\n\nrejects O\n", ", line 4: 2 columns, expected 1 as in line 1"),
        (tagged, "x.conll", b"EU NNP B-ORG\nrejects VBZ\n", ", line 2: 2 columns, expected 3"),
        (tagged, "x.tsv", b"EU\tB-ORG\n\tO\n", ", line 2: no word before the tag"),
        (tagged, "x.conll", b"EU B-ORG\n\n\xff\xfe O\n", ".*: not UTF-8 .*; convert the file first"),
        (tagged, "x.jsonl", b"", ": holds no sentences"),
        (tagged, "x.jsonl", b'{"words": ["a"], "labels": ["O"]}\n\xff\n', ".*: not UTF-8"),
        (tagged, "x.jsonl", b"EU B-ORG\n", ", line 1: not JSON"),
        (tagged, "x.jsonl", b'\n["a"]\n', ", line 2: expected a JSON object"),
        (tagged, "x.jsonl", b'{"tokens": ["a"]}', ", line 1: no column 'words' but 'tokens'"),
        (tagged, "x.jsonl", b'{"words": "a b", "labels": ["O"]}', ", line 1: 'words' is not a list of words; expected"),
        (tagged, "x.jsonl", b'{"words": null}', ", line 1: 'words' is not a list of words"),
        (tagged, "x.jsonl", b'{"words": ["a", 5]}', ", line 1: 'words' is not a list of words"),
        (tagged, "x.jsonl", b'{"words": ["a", ""]}', ", line 1: 'words' is not a list of words"),
        (tagged, "x.jsonl", b'{"words": ["\\ud800"]}', ", line 1: 'words' is not a list of words"),
        (tagged, "x.jsonl", b'{"words": ["a"]}\n{"words": []}', ", line 2: 'words' .* at least one"),
        (tagged, "x.jsonl", b'{"words": ["a"], "labels": "O"}', ", line 1: 'labels' is not a list of labels; expected"),
        (tagged, "x.jsonl", b'{"words": ["a"], "labels": [null]}', ", line 1: 'labels' is not a list of labels"),
        (tagged, "x.jsonl", b'{"words": ["a"], "labels": [true]}', ", line 1: 'labels' is not a list of labels"),
        (tagged, "x.jsonl", b'{"words": ["a"], "labels": [1.0]}', ", line 1: 'labels' is not a list of labels"),
        (tagged, "x.jsonl", b'{"words": ["a"], "labels": [" "]}', ", line 1: 'labels' is not a list of labels"),
        (
            tagged,
            "x.jsonl",
            b'{"words": ["a", "b"], "labels": [0]}',
            ", line 1: 2 words, 1 labels; expected one a word",
        ),
        (tagged, "x.jsonl", b'{"words": ["a"], "labels": []}', ", line 1: 1 words, 0 labels"),
        (tagged, "x.jsonl", b'{"words": ["a"], "labels": ["O"]}\n{"words": ["b"]}', ", line 2: no labels, unlike the"),
        (tagged, "x.jsonl", b'{"words": ["a"]}\n{"words": ["b"], "labels": ["O"]}', ", line 2: labels, unlike the"),
        (tagged, "x.parquet", b"PAR1 not really", ": not a readable Parquet file"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, read, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name + message):
        read(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    names = {rows: ("nowhere.tsv",), tagged: ("nowhere.conll", "nowhere.jsonl", "nowhere.parquet")}
    for read, name in ((read, name) for read in names for name in names[read]):
        with pytest.raises(InputError, match=f"{name}: no such file"):
            read(tmp_path / name)


def test_examples_in_docstrings():
    results = doctest.testmod(readers)
    assert results.attempted and not results.failed
