"""Tagged sentences: readers, alignment of words and tokens, metrics, made sentences."""

import json
import tracemalloc
import warnings
from pathlib import Path

import pytest
from sentences import SHARED, made_sentences

from data import FILLER, InputError, Tokenizer
from tagging import Aligned, Sentence, align, entity_metrics, read_tagged

# ---- readers ----


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
    wanted = [(["EU", "rejects"], ["B-ORG", "O"]), (["Café"], ["O"])]
    for name in ("x.jsonl", "x.json", "x.JSONL"):
        found = read(tmp_path, name, "\n\n".join(map(json.dumps, records)) + "\n")
        assert found == [(*wanted[0], 1), (*wanted[1], 3)], name  # lines of the file
    assert parquet(tmp_path, records) == [(*wanted[0], 1), (*wanted[1], 2)]  # rows


def test_column_names_and_numbers_as_labels(tmp_path):
    records = [{"id": "0", "tokens": ["EU", "rejects"], "ner_tags": [3, 0]}]
    columns, wanted = {"words": "tokens", "labels": "ner_tags"}, [(["EU", "rejects"], ["3", "0"], 1)]
    assert read(tmp_path, "x.jsonl", json.dumps(records[0]), **columns) == wanted
    assert read(tmp_path, "x.jsonl", '{"tokens": ["a"], "ner_tags": [" O "]}', **columns) == [(["a"], ["O"], 1)]
    assert parquet(tmp_path, records, **columns) == wanted


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


# ---- words and tokens ----


def sentence(text: str) -> Sentence:
    return Sentence(text.split(), None, 1)


def word_piece(folder: Path) -> Tokenizer:
    pieces = "[PAD] [UNK] [CLS] [SEP] [MASK] anna berg in mal ##den . 中".split()
    (folder / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    return Tokenizer(folder)


def test_word_piece_by_hand(tmp_path):
    tokenizer = word_piece(tmp_path)
    words = sentence("Anna in Malden , Berg.")  # anna in mal ##den [UNK] berg .
    ids = [2, 5, 7, 8, 9, 1, 6, 10, 3]
    assert align(tokenizer, [words, sentence("Bérg")], 9) == [
        Aligned(ids, [0] * 9, [1, 2, 3, 5, 6], False),
        Aligned([2, 6, 3], [0, 0, 0], [1], False),
    ]
    # Cut to 6 and to 5 tokens: before the comma, and within "Malden", which has lost a part but not its place.
    assert align(tokenizer, [words], 6) == [Aligned([2, 5, 7, 8, 9, 3], [0] * 6, [1, 2, 3], True)]
    assert align(tokenizer, [words], 5) == [Aligned([2, 5, 7, 8, 3], [0] * 5, [1, 2, 3], True)]
    assert align(tokenizer, [words], 3) == [Aligned([2, 5, 3], [0] * 3, [1], True)]
    assert align(tokenizer, [], 9) == []


def test_words_without_tokens_keep_a_place(tmp_path):
    tokenizer = word_piece(tmp_path)
    words = Sentence(["\x01", "Anna", "\u200b", "\x02", "Malden", "\ufeff"], None, 1)  # [CLS] anna mal ##den [SEP]
    assert align(tokenizer, [words], 8) == [Aligned([2, 5, 8, 9, 3], [0] * 5, [1, 1, 2, 2, 2, 4], False)]
    # Once cut, what stands after the last word with a token is gone.
    assert align(tokenizer, [words], 3) == [Aligned([2, 5, 3], [0] * 3, [1, 1], True)]
    assert align(tokenizer, [Sentence(["\x01", "\x02"], None, 1)], 8) == [Aligned([2, 3], [0, 0], [1, 1], False)]


def test_byte_level_bpe_by_hand(tmp_path):
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "i", "n", "Ġ", "in", "Ġin"]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\ni n\nĠ in\n", encoding="utf-8")
    ids = [0, 7, 8, 6, 5, 4, 2]  # in Ġin Ġ n i
    assert align(Tokenizer(tmp_path), [sentence("in in ni")], 9) == [Aligned(ids, [0] * 7, [1, 2, 3], False)]
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    ids[1] = 8
    assert align(Tokenizer(tmp_path), [sentence("in in ni")], 9) == [Aligned(ids, [0] * 7, [1, 2, 3], False)]


TEXTS = [
    "Anna Berg came late to Malden",
    "Harlow",
    "naïve café , Ångström said : it 's 1,234.5 !",
    "中文 字符 and 日本語 テスト 한국어",
    "😀 👩‍👩‍👧 smiled مرحبا e\u0301 —",
    "don't e-mail@x.org #tag (brackets) " + "w" * 30,
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    """Small tokenizers of each kind, trained on the texts."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    root = tmp_path_factory.mktemp("tokenizers")
    for name in ("bpe", "bpe_prefix", "word_piece", "sentence_piece"):
        (root / name).mkdir()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe = Backend(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    bpe.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=300, **settings))
    for name, prefix in (("bpe", False), ("bpe_prefix", True)):
        bpe.model.save(str(root / name))
        (root / name / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": prefix}))

    piece = Backend(models.WordPiece(unk_token="[UNK]"))
    piece.normalizer = normalizers.BertNormalizer(lowercase=True)
    piece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    settings = {"special_tokens": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], "show_progress": False}
    piece.train_from_iterator(TEXTS * 3, trainers.WordPieceTrainer(vocab_size=150, **settings))
    piece.model.save(str(root / "word_piece"))

    unigram = Backend(models.Unigram())  # as XLM-R and CamemBERT have it
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    settings = {"special_tokens": special, "unk_token": "<unk>", "show_progress": False}
    unigram.train_from_iterator(TEXTS * 3, trainers.UnigramTrainer(vocab_size=130, **settings))
    unigram.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    unigram.save(str(root / "sentence_piece" / "tokenizer.json"))
    return {folder.name: Tokenizer(folder) for folder in sorted(root.iterdir())}


KINDS = ["bpe", "bpe_prefix", "word_piece", "sentence_piece"]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_running_text(kind, tokenizers):
    tokenizer = tokenizers[kind]
    for limit in (200, 7):
        for text, found in zip(TEXTS, align(tokenizer, [sentence(text) for text in TEXTS], limit)):
            (encoded,) = tokenizer.encode([text], None, limit)
            assert (found.token_ids, found.segment_ids, found.truncated) == encoded, text


@pytest.mark.parametrize("kind", ["bpe", "bpe_prefix", "sentence_piece"])  # these can spell every word
def test_tokens_between_two_places_spell_the_word(kind, tokenizers):
    for text, found in zip(TEXTS, align(tokenizers[kind], [sentence(text) for text in TEXTS], 200)):
        ends = [*found.first[1:], len(found.token_ids) - 1]
        parts = [found.token_ids[start:end] for start, end in zip(found.first, ends)]
        assert [tokenizers[kind].backend.decode(part).strip() for part in parts] == text.split()


@pytest.mark.parametrize("kind", KINDS)
def test_cut_sentences_lose_words_at_the_end_alone(kind, tokenizers):
    sentences = [sentence(text) for text in TEXTS]
    whole = align(tokenizers[kind], sentences, 200)
    for limit in range(3, 40):
        for full, cut in zip(whole, align(tokenizers[kind], sentences, limit)):
            assert cut.truncated == (len(full.token_ids) > limit) and len(cut.token_ids) <= limit
            assert cut.first == [place for place in full.first if not cut.truncated or place < limit - 1]


@pytest.mark.parametrize("kind, library", [("bpe_prefix", "RobertaTokenizerFast"), ("word_piece", "BertTokenizerFast")])
def test_words_are_where_transformers_finds_them(kind, library, tokenizers, tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, content in tokenizers[kind].files.items():
        (tmp_path / name).write_bytes(content)
    theirs = getattr(transformers, library).from_pretrained(tmp_path)
    for limit in (200, 9):
        for found, text in zip(align(tokenizers[kind], [sentence(text) for text in TEXTS], limit), TEXTS):
            encoding = theirs(text.split(), is_split_into_words=True, truncation=True, max_length=limit)
            words = encoding.word_ids()
            assert found.token_ids == encoding["input_ids"]
            assert found.first == [words.index(i) for i in range(len(text.split())) if i in words]


def test_special_tokens_as_words_have_their_place(tokenizers):
    assert align(tokenizers["word_piece"], [sentence("[MASK] [SEP] Anna")], 9)[0].first == [1, 2, 3]


def test_encoding_texts_is_as_before(tokenizers):
    for tokenizer in tokenizers.values():
        before = tokenizer.encode(TEXTS, None, 12)
        align(tokenizer, [sentence(text) for text in TEXTS], 5)
        assert tokenizer.encode(TEXTS, None, 12) == before


# ---- metrics ----


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_an_entity_half_right_is_wrong(no_warnings):
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG"]]
    predicted = [["B-PER", "O", "O", "B-LOC"], ["O", "O"]]  # 1 of the 2 found is right, 1 of the 3 there is found
    assert entity_metrics(gold, predicted) == {
        "precision": pytest.approx(1 / 2),
        "recall": pytest.approx(1 / 3),
        "f1": pytest.approx(2 / 5),
        "accuracy": pytest.approx(4 / 6),
    }
    wrong_kind = entity_metrics([["B-PER", "I-PER"]], [["B-ORG", "I-ORG"]])
    assert wrong_kind == {"f1": 0, "precision": 0, "recall": 0, "accuracy": 0}


def test_where_entities_begin(no_warnings):
    def f1(gold: str, predicted: str) -> float:
        return entity_metrics([gold.split()], [predicted.split()])["f1"]

    assert f1("B-PER I-PER O", "I-PER I-PER O") == 1  # I alone may begin an entity
    assert f1("B-PER I-PER B-PER", "I-PER I-PER I-PER") == 0  # but only B parts neighbours of one type
    assert f1("B-PER I-LOC", "B-PER B-LOC") == 1
    assert f1("B-PER I-PER B-LOC", "B-PER E-PER S-LOC") == 1  # BIOES
    assert f1("B-PER I-PER B-PER I-PER B-LOC B-LOC", "B-PER L-PER B-PER L-PER U-LOC U-LOC") == 1  # BILOU
    assert entity_metrics([["B-PER"], ["I-PER"]], [["B-PER"], ["B-PER"]])["f1"] == 1  # each sentence for itself


def test_nothing_found_is_zero_without_warnings(no_warnings):
    nothing, entity = [["O", "O"]], [["B-PER", "O"]]
    assert entity_metrics(entity, nothing) == {"f1": 0, "precision": 0, "recall": 0, "accuracy": 0.5}
    assert entity_metrics(nothing, entity) == {"f1": 0, "precision": 0, "recall": 0, "accuracy": 0.5}
    assert entity_metrics([["B-PER", "other"]], [["B-PER", "O"]])["accuracy"] == 0.5  # no prefix among others


def test_parts_of_speech(no_warnings):
    gold, predicted = [["NOUN", "NOUN"], ["-LRB-", "X"]], [["NOUN", "-LRB-"], ["-LRB-", "Y"]]
    # F1: NOUN 2/3 (precision 1, recall 1/2), -LRB- 2/3 (precision 1/2, recall 1), X and Y 0.
    assert entity_metrics(gold, predicted) == {"macro_f1": pytest.approx(1 / 3), "accuracy": 0.5}
    assert entity_metrics([["3", "0"]], [["3", "0"]]) == {"macro_f1": 1, "accuracy": 1}


# ---- the made sentences ----


def test_made_sentences_are_as_their_seed():
    assert made_sentences(5, 3) == made_sentences(5, 3) != made_sentences(5, 4)
    assert made_sentences(9, 3)[:5] == made_sentences(5, 3) and [s.line for s in made_sentences(3, 3)] == [1, 2, 3]


def test_made_labels_are_what_the_words_say():
    readings = {name: set() for name in SHARED}
    kinds: dict[str, set[str]] = {}
    labels_seen = []
    for words, labels, _ in made_sentences(400, 1):
        assert len(words) == len(labels) and 1 <= sum(label[0] == "B" for label in labels) <= 3
        labels_seen += labels
        for i, (word, label) in enumerate(zip(words, labels)):
            if label[0] == "I":
                assert labels[i - 1] == f"B-{label[2:]}"
            if label == "O":
                assert word in FILLER or (word, labels[i + 1]) == ("in", "B-LOC") or words[i : i + 2] == ["at", "the"]
            else:
                kinds.setdefault(word, set()).add(label)
            if word in SHARED:
                readings[word].add((words[i - 1], label))
    assert all(found == {("in", "B-LOC"), ("the", "B-ORG")} for found in readings.values())
    assert all(len(found) == 1 for word, found in kinds.items() if word not in SHARED)
    assert set(labels_seen) == {"O", "B-PER", "I-PER", "B-LOC", "B-ORG", "I-ORG"}
    assert labels_seen.count("O") > 0.75 * len(labels_seen)
