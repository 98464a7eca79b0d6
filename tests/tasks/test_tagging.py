"""Tagged sentences: words and their tokens, metrics, examples, records to predict, made sentences."""

import json
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sentences import SHARED, made_sentences

from data import IGNORED
from model import Config
from support.errors import InputError
from tasks import own_task
from tasks.base import Reader, Source
from tasks.tagging import Aligned, Sentence, align, entity_metrics
from tasks.tokenizer import Tokenizer
from tools.demo import FILLER

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
    # Cut to 6 and to 5 tokens: before the comma, and within "Malden", which has lost a part but not its first token.
    assert align(tokenizer, [words], 6) == [Aligned([2, 5, 7, 8, 9, 3], [0] * 6, [1, 2, 3], True)]
    assert align(tokenizer, [words], 5) == [Aligned([2, 5, 7, 8, 3], [0] * 5, [1, 2, 3], True)]
    assert align(tokenizer, [words], 3) == [Aligned([2, 5, 3], [0] * 3, [1], True)]
    assert align(tokenizer, [], 9) == []


def test_words_without_tokens_share_one(tmp_path):
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
        for text, aligned in zip(TEXTS, align(tokenizer, [sentence(text) for text in TEXTS], limit)):
            (encoded,) = tokenizer.encode([text], None, limit)
            assert (aligned.token_ids, aligned.segment_ids, aligned.truncated) == encoded[:3], text


@pytest.mark.parametrize("kind", ["bpe", "bpe_prefix", "sentence_piece"])  # these can spell every word
def test_tokens_between_two_first_tokens_spell_the_word(kind, tokenizers):
    for text, aligned in zip(TEXTS, align(tokenizers[kind], [sentence(text) for text in TEXTS], 200)):
        ends = [*aligned.first[1:], len(aligned.token_ids) - 1]
        parts = [aligned.token_ids[start:end] for start, end in zip(aligned.first, ends)]
        assert [tokenizers[kind].backend.decode(part).strip() for part in parts] == text.split()


@pytest.mark.parametrize("kind", KINDS)
def test_cut_sentences_lose_words_at_the_end_alone(kind, tokenizers):
    sentences = [sentence(text) for text in TEXTS]
    whole = align(tokenizers[kind], sentences, 200)
    for limit in range(3, 40):
        for full, cut in zip(whole, align(tokenizers[kind], sentences, limit)):
            assert cut.truncated == (len(full.token_ids) > limit) and len(cut.token_ids) <= limit
            assert cut.first == [position for position in full.first if not cut.truncated or position < limit - 1]


@pytest.mark.parametrize("kind, library", [("bpe_prefix", "RobertaTokenizerFast"), ("word_piece", "BertTokenizerFast")])
def test_words_are_where_transformers_finds_them(kind, library, tokenizers, tmp_path):
    transformers = pytest.importorskip("transformers")
    for name, content in tokenizers[kind].files.items():
        (tmp_path / name).write_bytes(content)
    theirs = getattr(transformers, library).from_pretrained(tmp_path)
    for limit in (200, 9):
        for aligned, text in zip(align(tokenizers[kind], [sentence(text) for text in TEXTS], limit), TEXTS):
            encoding = theirs(text.split(), is_split_into_words=True, truncation=True, max_length=limit)
            words = encoding.word_ids()
            assert aligned.token_ids == encoding["input_ids"]
            assert aligned.first == [words.index(i) for i in range(len(text.split())) if i in words]


def test_special_tokens_as_words_have_their_position(tokenizers):
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
    predicted = [
        ["B-PER", "O", "O", "B-LOC"],
        ["O", "O"],
    ]  # 1 of 2 predicted entities is right, 1 of 3 gold ones is predicted
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


def conlleval(labels: list[str]) -> set[tuple[str, int, int]]:
    """Entities (kind, first word, last word) of a sentence, by the rules of conlleval: written from its table."""
    entities, start = set(), None
    before, kind_before = "O", ""
    for i, label in enumerate([*labels, "O"]):
        now, _, kind = label.partition("-")
        ends = before in ("E", "S") or before in ("B", "I") and now in ("B", "S", "O")
        begins = now in ("B", "S") or now in ("I", "E") and before in ("E", "S", "O")
        other = now != "O" and kind != kind_before
        if start is not None and (ends or before != "O" and (other or now == "O")):
            entities.add((kind_before, start, i - 1))
            start = None
        if begins or other:
            start = i
        before, kind_before = now, kind
    return entities


@pytest.mark.parametrize("scheme", ["IOB1", "IOB2", "IOBES", "broken"])
def test_metrics_of_random_taggings_are_conllevals_and_seqevals(scheme):
    from seqeval.metrics import f1_score, precision_score, recall_score

    draw = random.Random(scheme)

    def spell(length: int, kind: str, joint: bool) -> list[str]:
        """The labels of an entity; joint: right behind another one of its kind."""
        if scheme == "IOBES":
            return [f"S-{kind}"] if length == 1 else [f"B-{kind}", *[f"I-{kind}"] * (length - 2), f"E-{kind}"]
        first = "B" if scheme == "IOB2" or joint else "I"
        return [f"{first}-{kind}", *[f"I-{kind}"] * (length - 1)]

    def sentence(size: int) -> list[str]:
        if scheme == "broken":
            return [draw.choice(["O", "O", *(f"{p}-{k}" for p in "BIES" for k in ("PER", "LOC"))]) for _ in range(size)]
        labels: list[str] = []
        while len(labels) < size:
            kind, joint = draw.choice(["PER", "LOC", "O"]), False
            if kind != "O":
                joint = bool(labels) and labels[-1].endswith(f"-{kind}")
            labels += ["O"] if kind == "O" else spell(draw.randrange(1, 4), kind, joint)
        return labels if len(labels) == size else [*labels[: size - 3], "O", "O", "O"][:size]

    found = 0
    for _ in range(250):
        sizes = [draw.randrange(1, 12) for _ in range(4)]
        gold, predicted = ([sentence(size) for size in sizes] for _ in range(2))
        predicted = [g if draw.random() < 0.4 else p for g, p in zip(gold, predicted)]
        sides = [{(i, *e) for i, s in enumerate(side) for e in conlleval(s)} for side in (gold, predicted)]
        metrics = entity_metrics(gold, predicted)
        if "f1" not in metrics:
            assert not any(sides)
            continue
        right = len(sides[0] & sides[1])
        precision, recall = right / max(1, len(sides[1])), right / max(1, len(sides[0]))
        f1 = 2 * precision * recall / (precision + recall) if right else 0.0
        theirs = [score(gold, predicted, zero_division=0) for score in (precision_score, recall_score, f1_score)]
        ours = [metrics[name] for name in ("precision", "recall", "f1")]
        assert ours == pytest.approx(theirs)
        assert ours == pytest.approx([precision, recall, f1])
        found += 0 < f1 < 1
    assert found > 100


# ---- examples ----


def conll(path: Path, *sentences: str) -> None:
    """A file of sentences that are written "word/label word/label"."""
    blocks = ["\n".join(pair.replace("/", " ") for pair in text.split()) for text in sentences]
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


@pytest.fixture
def tagged(tmp_path) -> Source:
    (tmp_path / "model").mkdir()
    (tmp_path / "data").mkdir()
    conll(
        tmp_path / "data" / "train.conll", "Anna/B-PER in/O Malden/B-LOC", "Berg/B-PER", "in/O Malden/B-LOC ./O Anna/O"
    )
    return Source(own_task(None, None, None, False, tagging=True), tmp_path / "data")


def test_targets_by_hand(tagged, tmp_path):
    tokenizer, task = word_piece(tmp_path / "model"), tagged.task
    sets, labels = tagged.load("train", tokenizer, 6)
    examples, none = sets[""], IGNORED
    assert labels == ("O", "B-LOC", "B-PER") and examples.truncated == 1
    # [CLS] anna in mal ##den [SEP], [CLS] berg [SEP], [CLS] in mal ##den . [SEP] with "Anna" cut off
    assert examples.lengths.tolist() == [6, 3, 6]
    rows = [[none, 2, 0, 1, none, none], [none, 2, none], [none, 0, 1, none, 0, none]]
    assert examples.targets.tolist() == [target for row in rows for target in row]
    assert task.targets(examples, np.array([2, 1])).tolist() == rows[2] + rows[1]
    assert task.count_targets(examples, np.array([2, 1])) == 4
    logits = torch.rand(9, 3)
    assert torch.equal(task.choices(logits, torch.tensor([6, 3])), logits)


def test_of_words_that_share_a_token_the_first_counts(tmp_path):
    (tmp_path / "train.jsonl").write_text(
        json.dumps({"words": ["\x01", "Anna", "\ufeff"], "labels": ["B", "A", "C"]}, ensure_ascii=False) + "\n"
    )
    (tmp_path / "model").mkdir()
    source = Source(own_task(None, None, None, False, tagging=True), tmp_path)
    sets, labels = source.load("train", word_piece(tmp_path / "model"), 8)
    assert labels == ("A", "B", "C")
    assert sets[""].targets.tolist() == [IGNORED, 1, 2]  # [CLS], anna with the word before it, [SEP] for the last word


def test_targets_are_those_of_a_loop_over_words(tokenizers, tmp_path):
    sentences = made_sentences(40, 2)
    conll(tmp_path / "train.conll", *(" ".join(map("/".join, zip(s.words, s.labels))) for s in sentences))
    source = Source(own_task(None, None, None, False, tagging=True), tmp_path)
    for tokenizer in tokenizers.values():
        sets, labels = source.load("train", tokenizer, 30)
        targets = []
        for sentence, aligned in zip(sentences, align(tokenizer, sentences, 30)):
            row = [IGNORED] * len(aligned.token_ids)
            for position, label in reversed(list(zip(aligned.first, sentence.labels))):
                row[position] = labels.index(label)
            targets += row
        assert sets[""].targets.tolist() == targets
        assert 0 < sets[""].truncated == sum(a.truncated for a in align(tokenizer, sentences, 30))


def label_logits(targets: np.ndarray, count: int) -> np.ndarray:
    """Logits of a model that knows each label, for the label 0 where there is none: (n, count)."""
    return np.eye(count, dtype=np.float32)[np.maximum(targets, 0)]


def test_judging_the_right_labels(tagged, tmp_path):
    tokenizer = word_piece(tmp_path / "model")
    for limit in (20, 6):  # at 6, "Anna" is cut off, and right as an "O"
        examples = tagged.load("train", tokenizer, limit)[0][""]
        rows = np.split(label_logits(examples.targets, 3), examples.starts[1:])
        metrics, score = tagged.task.judge(examples, rows)
        assert metrics == {"f1": 1, "precision": 1, "recall": 1, "accuracy": 1} and score == 1
    conll(tmp_path / "data" / "train.conll", "Anna/B-PER in/O Malden/B-LOC", "in/O Malden/B-LOC ./O Anna/B-PER")
    examples = tagged.load("train", tokenizer, 6)[0][""]
    rows = np.split(label_logits(examples.targets, 3), examples.starts[1:])
    metrics, score = tagged.task.judge(examples, rows)
    assert metrics["recall"] == 3 / 4 and metrics["accuracy"] == 6 / 7 and score == metrics["f1"]


def test_the_score_of_labels_that_name_no_entities(tagged, tmp_path):
    conll(tmp_path / "data" / "train.conll", "Anna/NOUN in/ADP Malden/NOUN")
    examples = tagged.load("train", word_piece(tmp_path / "model"), 20)[0][""]
    metrics, score = tagged.task.judge(examples, [np.eye(2)[[0, 1, 1, 1, 0, 0]]])  # ADP, NOUN in id order
    assert score == metrics["accuracy"] == 2 / 3 and set(metrics) == {"macro_f1", "accuracy"}


def test_labels_that_are_missing_unknown_or_all_the_same(tagged, tmp_path):
    tokenizer = word_piece(tmp_path / "model")
    with pytest.raises(InputError, match="train.conll, line 5: the label 'B-PER' is none of the model's, O, B-LOC"):
        conll(tmp_path / "data" / "train.conll", "in/O Malden/B-LOC", "in/O Anna/B-PER")
        tagged.load("train", tokenizer, 20, ("O", "B-LOC"))
    with pytest.raises(InputError, match="train.conll: all words have the label 'O'; tagging needs two or more"):
        conll(tmp_path / "data" / "train.conll", "in/O Malden/O")
        tagged.load("train", tokenizer, 20)
    with pytest.raises(InputError, match="train.conll, line 2: no labels; expected the tag last .* column 'labels'"):
        (tmp_path / "data" / "train.conll").write_text("in\nMalden\n")
        tagged.load("train", tokenizer, 20)


# ---- records to predict ----


def test_words_are_labelled_and_those_cut_off_are_not(tagged, tmp_path):
    word_piece(tmp_path / "model")
    config = Config(14, 8, 2, 2, 16, 40, head="token", labels=("O", "B-LOC"))
    reader = Reader(tmp_path / "model", config, 6)
    records = [("line 1", {"words": ["Anna", "in", "Malden"]}), ("line 2", {"text": "in Malden . Anna"})]
    encoded, finish = tagged.task.prepare(records, reader)
    assert [e.token_ids for e in encoded] == [[2, 5, 7, 8, 9, 3], [2, 7, 8, 9, 10, 3]] and reader.truncated == 1
    logits = [
        torch.tensor([[0.0, float(token in (8, 9))] for token in ids]) - 0.5 * torch.tensor([0, 1])
        for ids in (e.token_ids for e in encoded)
    ]
    assert finish([(logits[0], [6, 3]), (logits[1], [5, 4])]) == [
        {"words": ["Anna", "in", "Malden"], "labels": ["O", "O", "B-LOC"], "tokens": 6, "kept": [6, 3]},
        {"words": ["in", "Malden", ".", "Anna"], "labels": ["O", "B-LOC", "O", None], "tokens": 6, "kept": [5, 4]},
    ]


@pytest.mark.parametrize("record", [{"words": []}, {"words": "Anna"}, {"text": 5}, {"text": " "}, {}, ["a"]])
def test_records_without_words_are_refused(record, tagged, tmp_path):
    word_piece(tmp_path / "model")
    reader = Reader(tmp_path / "model", Config(14, 8, 2, 2, 16, 40, head="token"), 6)
    with pytest.raises(InputError, match='line 1: expected an object with "words"'):
        tagged.task.prepare([("line 1", record)], reader)


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
    assert all(pairs == {("in", "B-LOC"), ("the", "B-ORG")} for pairs in readings.values())
    assert all(len(types) == 1 for word, types in kinds.items() if word not in SHARED)
    assert set(labels_seen) == {"O", "B-PER", "I-PER", "B-LOC", "B-ORG", "I-ORG"}
    assert labels_seen.count("O") > 0.75 * len(labels_seen)
