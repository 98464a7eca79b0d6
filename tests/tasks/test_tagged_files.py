"""Files of tagged sentences: CoNLL, JSONL and Parquet."""

import json
import tracemalloc
from pathlib import Path

import pytest

from support.errors import InputError
from tasks.tagging import read_tagged


def read(folder: Path, name: str, content: str | bytes, **columns: str) -> list[tuple]:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [tuple(sentence) for sentence in read_tagged(path, **columns)]


def parquet(folder: Path, records: list[dict], **columns: str) -> list[tuple]:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), folder / "x.parquet")
    return [tuple(sentence) for sentence in read_tagged(folder / "x.parquet", **columns)]


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
        sentences = read(tmp_path, name, "\n\n".join(map(json.dumps, records)) + "\n")
        assert sentences == [(*expected[0], 1), (*expected[1], 3)], name  # lines of the file
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


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.conll", b"", "x.conll: holds no sentences"),
        ("x.conll", b"\n-DOCSTART- O\n\n", "x.conll: holds no sentences"),
        ("x.conll", b"EU B-ORG\nrejects\n", "x.conll, line 2: 1 columns, expected 2 as in line 1; give the word first"),
        ("x.conll", b"EU B-ORG\n\nrejects\t\n", "x.conll, line 3: 1 columns, expected 2"),
        ("x.conll", b"EU\n\n\nrejects O\n", "x.conll, line 4: 2 columns, expected 1 as in line 1"),
        ("x.conll", b"EU NNP B-ORG\nrejects VBZ\n", "x.conll, line 2: 2 columns, expected 3"),
        ("x.tsv", b"EU\tB-ORG\n\tO\n", "x.tsv, line 2: no word before the tag"),
        ("x.conll", b"EU B-ORG\n\n\xff\xfe O\n", "x.conll.*: not UTF-8 .*; convert the file first"),
        ("x.jsonl", b"", "x.jsonl: holds no sentences"),
        ("x.jsonl", b'{"words": ["a"], "labels": ["O"]}\n\xff\n', "x.jsonl.*: not UTF-8"),
        ("x.jsonl", b"EU B-ORG\n", "x.jsonl, line 1: not JSON"),
        ("x.jsonl", b'\n["a"]\n', "x.jsonl, line 2: expected a JSON object"),
        ("x.jsonl", b'{"tokens": ["a"]}', "x.jsonl, line 1: no column 'words' but 'tokens'"),
        ("x.jsonl", b'{"words": "a b", "labels": ["O"]}', "x.jsonl, line 1: 'words' is not a list of words; expected"),
        ("x.jsonl", b'{"words": null}', "x.jsonl, line 1: 'words' is not a list of words"),
        ("x.jsonl", b'{"words": ["a", 5]}', "x.jsonl, line 1: 'words' is not a list of words"),
        ("x.jsonl", b'{"words": ["a", ""]}', "x.jsonl, line 1: 'words' is not a list of words"),
        ("x.jsonl", b'{"words": ["\\ud800"]}', "x.jsonl, line 1: 'words' is not a list of words"),
        ("x.jsonl", b'{"words": ["a"]}\n{"words": []}', "x.jsonl, line 2: 'words' .* at least one"),
        ("x.jsonl", b'{"words": ["a"], "labels": "O"}', "x.jsonl, line 1: 'labels' is not a list of labels; expected"),
        ("x.jsonl", b'{"words": ["a"], "labels": [null]}', "x.jsonl, line 1: 'labels' is not a list of labels"),
        ("x.jsonl", b'{"words": ["a"], "labels": [true]}', "x.jsonl, line 1: 'labels' is not a list of labels"),
        ("x.jsonl", b'{"words": ["a"], "labels": [1.0]}', "x.jsonl, line 1: 'labels' is not a list of labels"),
        ("x.jsonl", b'{"words": ["a"], "labels": [" "]}', "x.jsonl, line 1: 'labels' is not a list of labels"),
        ("x.jsonl", b'{"words": ["a", "b"], "labels": ["O"]}', "line 1: 2 words, 1 labels; expected one a word"),
        ("x.jsonl", b'{"words": ["a"], "labels": []}', "x.jsonl, line 1: 1 words, 0 labels"),
        ("x.jsonl", b'{"words": ["a"], "labels": ["O"]}\n{"words": ["b"]}', "x.jsonl, line 2: no labels, unlike the"),
        ("x.jsonl", b'{"words": ["a"]}\n{"words": ["b"], "labels": ["O"]}', "x.jsonl, line 2: labels, unlike the"),
        ("x.parquet", b"PAR1 not really", "x.parquet: not a readable Parquet file"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, name, content)


def test_bad_parquet_rows_and_missing_files(tmp_path):
    with pytest.raises(InputError, match="x.parquet, line 2: 2 words, 1 labels"):
        parquet(tmp_path, [{"words": ["a"], "labels": [0]}, {"words": ["a", "b"], "labels": [0]}])
    with pytest.raises(InputError, match="x.parquet, line 1: 'words' is not a list of words"):
        parquet(tmp_path, [{"words": "a b", "labels": [0]}])
    with pytest.raises(InputError, match="x.parquet, line 1: no column 'words' but 'tokens'"):
        parquet(tmp_path, [{"tokens": ["a"], "labels": [0]}])
    for name in ("nowhere.conll", "nowhere.jsonl", "nowhere.parquet"):
        with pytest.raises(InputError, match=f"{name}: no such file"):
            list(read_tagged(tmp_path / name))


@pytest.mark.parametrize("name, good, bad", [("x.conll", "a O\n\n", "b\n\n"), ("x.jsonl", '{"words": ["a"]}\n', "?\n")])
def test_sentences_come_before_the_file_is_read_to_its_end(tmp_path, name, good, bad):
    (tmp_path / name).write_text(good + bad)
    sentences = read_tagged(tmp_path / name)
    assert next(sentences).words == ["a"]
    with pytest.raises(InputError):
        next(sentences)


@pytest.mark.parametrize("name, sentence", [("x.conll", "Malden B-LOC\n\n"), ("x.jsonl", '{"words": ["Malden"]}\n')])
def test_memory_is_flat(tmp_path, name, sentence):
    (tmp_path / name).write_text(sentence * 20_000)
    tracemalloc.start()
    assert sum(1 for _ in read_tagged(tmp_path / name)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000  # bytes: less than the file has
