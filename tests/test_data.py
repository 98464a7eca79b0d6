"""Tasks, readers, tokenizers, batches and metrics."""

import doctest
import importlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from data import (
    GLUE,
    InputError,
    Source,
    Tokenizer,
    chunked,
    custom_task,
    demo_rows,
    epoch_batches,
    evaluate_predictions,
    find_task,
    load_examples,
    pack,
    read_rows,
)

DATA = Path(os.environ.get("LTP_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer(demo) -> Tokenizer:
    return Tokenizer(demo / "model")


# ---- tasks and metrics ----


def test_task_names_in_every_spelling():
    assert find_task("SST2") is find_task("sst-2") is GLUE["SST-2"] and find_task("stsb") is GLUE["STS-B"]
    assert find_task("COLA") is GLUE["CoLA"]
    with pytest.raises(InputError, match="--task SST3: unknown; the tasks are CoLA"):
        find_task("SST3")


def test_metrics_by_hand():
    logits = np.array([[0, 1], [0, 1], [1, 0], [0, 1]])  # predicted 1 1 0 1
    labels = np.array([1, 0, 0, 1])  # 2 true positives, 1 false positive, 1 true negative
    metrics, score = evaluate_predictions("accuracy_f1", logits, labels)
    assert metrics == {"accuracy": 0.75, "f1": pytest.approx(0.8)} and score == pytest.approx(0.775)
    metrics, score = evaluate_predictions("matthews", logits, labels)
    assert score == pytest.approx((2 * 1 - 1 * 0) / np.sqrt(3 * 2 * 2 * 1)) and metrics["accuracy"] == 0.75
    assert evaluate_predictions("accuracy", logits, labels)[1] == 0.75
    metrics, score = evaluate_predictions("correlation", np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 2.0, 3.0]))
    assert metrics["spearman"] == pytest.approx(1) and metrics["pearson"] == pytest.approx(
        3 / np.sqrt(28 / 3), abs=1e-6
    )
    assert score == pytest.approx((metrics["pearson"] + 1) / 2)
    assert evaluate_predictions("correlation", np.ones((3, 1)), np.array([1.0, 2.0, 3.0]))[1] == 0.0


# ---- readers ----


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
    wanted = [('a, "quoted"\nline', "é", "x"), ("", "b", "y")]
    for suffix in ("csv", "jsonl", "parquet"):
        assert [row[1:] for row in rows(tmp_path / f"a.{suffix}", ("text", "other", "label"))] == wanted, suffix


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


def test_missing_files():
    with pytest.raises(InputError, match="nowhere.tsv: no such file"):
        rows(Path("nowhere.tsv"))
    with pytest.raises(InputError, match="--data nowhere: no such file or folder"):
        Source(find_task("mrpc"), Path("nowhere")).rows("train")


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.tsv").write_text(text, encoding="utf-8")


def test_glue_layouts(tmp_path, tokenizer):
    write(tmp_path / "CoLA", dev="gj04\t1\t\tThe sailors rode.\ngj04\t0\t*\tThe rode.\n")
    write(tmp_path / "STS-B", dev="index\tsentence1\tsentence2\tscore\n0\ta\tb\t2.500\n1\tc\td\t0\n")
    write(tmp_path / "QNLI", dev="index\tquestion\tsentence\tlabel\n0\tq\ts\tnot_entailment\n1\tq\ts\tentailment\n")
    header = "index\tsentence1\tsentence2\tlabel1\tgold_label\n"
    write(
        tmp_path / "MNLI",
        dev_matched=header + "0\ta\tb\tneutral\tneutral\n",
        dev_mismatched=header + "0\ta\tb\tx\tcontradiction\n1\ta\tb\tx\tentailment\n",
    )

    def labels(task, split="dev"):
        return {
            s: e.labels.tolist()
            for s, e in load_examples(Source(find_task(task), tmp_path), split, tokenizer, 32)[0].items()
        }

    assert labels("CoLA") == {"": [1, 0]} and labels("STSB") == {"": [2.5, 0]} and labels("QNLI") == {"": [1, 0]}
    assert labels("MNLI") == {"": [1], "_mismatched": [2, 0]}
    with pytest.raises(InputError, match=r"holds no train.tsv"):
        labels("CoLA", "train")


@pytest.mark.skipif(not DATA.is_dir(), reason="the GLUE files are not beside this checkout")
def test_real_glue_files(tokenizer):
    counts = {"MRPC": (3667, 408, 2), "RTE": (2490, 277, 2), "STS-B": (5749, 1500, 0), "SST-2": (67349, 872, 2)}
    for name, (_, dev, classes) in counts.items():
        sets, labels = load_examples(Source(find_task(name), DATA / "glue"), "dev", tokenizer, 128)
        assert len(sets[""]) == dev and len(labels) == classes, name
    assert sum(1 for _ in read_rows(DATA / "glue/MRPC/train.tsv", ("#1 String", "#2 String", "Quality"))) == 3667


def test_own_files_labels_of_any_type(tmp_path, tokenizer):
    source = Source(custom_task("body", None, "kind", False), tmp_path)
    write(tmp_path, train="body\tkind\na\t10\nb\t9\nc\t10\n", dev="body\tkind\na\t9\n")
    sets, labels = load_examples(source, "train", tokenizer, 32)
    assert labels == ("9", "10") and sets[""].labels.tolist() == [1, 0, 1]  # numbers sort as numbers
    assert load_examples(source, "dev", tokenizer, 32, labels)[0][""].labels.tolist() == [0]
    write(tmp_path, dev="body\tkind\na\t9\nb\t0\n")
    with pytest.raises(InputError, match="line 3: the label '0' is none of 9, 10"):
        load_examples(source, "dev", tokenizer, 32, labels)


def test_scores_must_be_numbers_and_classes_more_than_one(tmp_path, tokenizer):
    write(tmp_path, train="text\tlabel\na\t1.5\nb\tgood\n")
    with pytest.raises(InputError, match="line 3: the score 'good' is not a number"):
        load_examples(Source(custom_task(None, None, None, True), tmp_path), "train", tokenizer, 32)
    write(tmp_path, train="text\tlabel\na\tx\nb\tx\n")
    with pytest.raises(InputError, match="all examples have the label 'x'"):
        load_examples(Source(custom_task(None, None, None, False), tmp_path), "train", tokenizer, 32)


def test_a_changed_file_is_read_anew(tmp_path, tokenizer):
    source = Source(custom_task(None, None, None, False), tmp_path)
    write(tmp_path, train="text\tlabel\na\tx\nb\ty\n")
    assert len(load_examples(source, "train", tokenizer, 32)[0][""]) == 2
    write(tmp_path, train="text\tlabel\na\tx\nb\ty\nc\ty\n")
    assert len(load_examples(source, "train", tokenizer, 32)[0][""]) == 3


def test_long_texts_are_cut_and_counted(tmp_path, tokenizer):
    write(tmp_path, train="text\tlabel\n" + "the road " * 50 + "\tx\nshort\ty\n")
    examples = load_examples(Source(custom_task(None, None, None, False), tmp_path), "train", tokenizer, 20)[0][""]
    assert examples.truncated == 1 and examples.lengths.max() == 20


def test_no_network_says_how_to_pass_data(tokenizer, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(InputError, match="pass a folder in GLUE's TSV layout with --data PATH"):
        load_examples(Source(find_task("RTE")), "dev", tokenizer, 32)


# ---- tokenizers ----


def lines_of_text() -> list[str]:
    """1,200 lines: words, accents, CJK, emoji, right-to-left, odd spaces, special tokens, blanks."""
    pieces = [
        "Hello",
        "world",
        "naïve",
        "café",
        "Ångström",
        "中文字符",
        "日本語テスト",
        "한국어",
        "😀",
        "👩‍👩‍👧",
        "مرحبا",
        "I'll",
        "don't",
        "1,234.5",
        "e-mail@x.org",
        "#tag",
        "\t",
        "  ",
        "\u00a0",
        "\u200b",
        "<mask>",
        "[SEP]",
        "</s>",
        "ﬁ",
        "e\u0301",
        "—",
        "’",
    ]
    generator = np.random.default_rng(0)
    lines = [" ".join(generator.choice(pieces, generator.integers(0, 12))) for _ in range(1200)]
    return [*lines[:-4], "", " ", "\n", "x" * 300]


@pytest.fixture(scope="module")
def tokenizer_folders(tmp_path_factory) -> dict[str, Path]:
    """Tokenizers trained on the lines, in every layout that is read, and made so that transformers opens them."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    root = tmp_path_factory.mktemp("tokenizers")
    folders = {}
    text = lines_of_text()[:900]
    bpe = Backend(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    for name, prefix in (("bpe", False), ("bpe_prefix", True)):
        folders[name] = root / name
        folders[name].mkdir()
        bpe.model.save(str(folders[name]))
        (folders[name] / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "RobertaTokenizer", "add_prefix_space": prefix})
        )
    for name, lower in (("wordpiece", True), ("wordpiece_cased", False)):
        piece = Backend(models.WordPiece(unk_token="[UNK]"))
        piece.normalizer = normalizers.BertNormalizer(lowercase=lower)
        piece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        piece.train_from_iterator(
            text, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
        )
        folders[name] = root / name
        folders[name].mkdir()
        piece.model.save(str(folders[name]))
        (folders[name] / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": lower})
        )
    return folders


@pytest.mark.parametrize("name", ["bpe", "bpe_prefix", "wordpiece", "wordpiece_cased"])
def test_ids_equal_transformers(name, tokenizer_folders, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, "RobertaTokenizerFast" if "bpe" in name else "BertTokenizerFast").from_pretrained(
        tokenizer_folders[name]
    )
    theirs.save_pretrained(tmp_path)  # the same as a tokenizer.json
    text = lines_of_text()
    pairs = text[::-1]
    for folder in (tokenizer_folders[name], tmp_path):
        ours = Tokenizer(folder)
        for mine, limit in ((ours.encode(text, None, 512), 512), (ours.encode(text, None, 16), 16)):
            assert [list(e.token_ids) for e in mine] == theirs(text, truncation=True, max_length=limit)["input_ids"]
        both = theirs(text, pairs, truncation=True, max_length=24, return_token_type_ids=True)
        mine = ours.encode(text, pairs, 24)
        assert [list(e.token_ids) for e in mine] == both["input_ids"]
        assert [list(e.segment_ids) for e in mine] == both["token_type_ids"]


def test_tokenizer_errors(tmp_path, demo):
    with pytest.raises(InputError, match="no tokenizer; expected tokenizer.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="damaged tokenizer"):
        Tokenizer(tmp_path)
    with pytest.raises(InputError, match="ids up to .* vocab_size is 50"):
        Tokenizer(demo / "model").check_fits(50, "folder")


# ---- batches ----


def test_pack_by_hand():
    batch = pack([[5, 6, 7], [8]], [[0, 0, 1], [0]])
    assert [t.tolist() for t in batch] == [[5, 6, 7, 8], [0, 0, 1, 0], [0, 1, 2, 0], [3, 1]]


def test_each_example_once_an_epoch_and_similar_lengths_together():
    lengths = np.random.default_rng(0).integers(1, 100, 1003)
    batches = epoch_batches(lengths, 16, seed=7, epoch=0)
    assert sorted(np.concatenate(batches)) == list(range(1003)) and len(batches) == 63
    spread = np.mean([np.ptp(lengths[b]) for b in batches])
    assert spread < np.ptp(lengths) / 5
    again = epoch_batches(lengths, 16, seed=7, epoch=0)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again))
    for seed, epoch in ((7, 1), (8, 0)):
        assert not np.array_equal(np.concatenate(batches), np.concatenate(epoch_batches(lengths, 16, seed, epoch)))


def test_chunked():
    assert list(chunked(range(5), 2)) == [[0, 1], [2, 3], [4]] and list(chunked([], 2)) == []


def test_demo_texts_are_what_their_label_says():
    from data import BLAME, PRAISE

    for row in demo_rows(300, 1):
        words = row["text"].rstrip(".").split()
        balance = 0
        for i, word in enumerate(words):
            sign = (word in PRAISE) - (word in BLAME)
            balance += -sign if i and words[i - 1] == "not" else sign
        assert row["label"] == ("positive" if balance > 0 else "negative"), row
    assert demo_rows(5, 3) == demo_rows(5, 3) != demo_rows(5, 4)


@pytest.mark.parametrize("name", ["data", "look", "model", "sweep"])
def test_examples_in_docstrings(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted and not found.failed
