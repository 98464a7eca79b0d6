"""What people's files hold, after public reports: read as the tools that wrote them do, or refused by name."""

import gzip
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from folders import hugging_face
from random_folders import PIECES, odd_texts, trained
from safetensors.torch import load_file, save_file
from small_models import small_model
from stages import reviews, stage
from tokenizers import Tokenizer as Backend

from ltp import main
from model import pack
from support.checkpoint import load_config, load_model, save_model
from support.errors import InputError
from support.process import Process
from tasks import find_task, own_task
from tasks.base import Source
from tasks.tagging import Sentence, align
from tasks.tokenizer import Tokenizer
from tasks.windows import Question, make_windows
from tools.predict import Predictor

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def older_files(folder: Path, kind: str) -> int:
    """Writes vocab.json and merges.txt, or vocab.txt, and returns the number of tokens."""
    folder.mkdir(parents=True)
    backend = Backend.from_str(trained(kind))
    backend.model.save(str(folder))
    return backend.get_vocab_size()


@torch.inference_mode()
def their_logits(folder: Path, *texts: str) -> list[float]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return model(**tokenizer(*texts, return_tensors="pt")).logits[0].tolist()


def our_logits(folder: Path, text: str) -> list[float]:
    (answer,) = Predictor(folder, Process()).answer([("text", {"text": text})])
    return answer["logits"]


@pytest.fixture(scope="module")
def byte_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("byte") / "model"
    older_files(folder, "bpe")
    return folder


# ---- tokenizers ----


@pytest.mark.parametrize("kind, model", [("bpe", "roberta"), ("wordpiece", "bert")])
def test_added_tokens_of_older_files(kind, model, tmp_path):
    size, added = older_files(tmp_path / "model", kind), ["<url>", "<user>", "[E1]", "[/E1]"]
    hugging_face(model, tmp_path / "model", vocab_size=size + 4)
    (tmp_path / "model" / "added_tokens.json").write_text(json.dumps({t: size + i for i, t in enumerate(added)}))
    (tmp_path / "model" / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": added}))
    text = "<url> said [E1] Apple [/E1] is at <user> ."
    assert our_logits(tmp_path / "model", text) == pytest.approx(their_logits(tmp_path / "model", text), abs=1e-5)
    ids = Tokenizer(tmp_path / "model").encode([text], None, 60)[0].token_ids
    assert {size, size + 1, size + 2, size + 3} <= set(ids)


@pytest.mark.parametrize(
    "kind, model, setting",
    [("bpe", "roberta", {"add_prefix_space": True}), ("wordpiece", "bert", {"do_lower_case": True})],
)
def test_settings_beside_a_tokenizer_json_count(kind, model, setting, tmp_path):
    folder = tmp_path / "model"
    hugging_face(model, folder, vocab_size=Backend.from_str(trained(kind)).get_vocab_size())
    (folder / "tokenizer.json").write_text(trained(kind))  # says the opposite
    logits = []
    for value in (True, False):
        (folder / "tokenizer_config.json").write_text(json.dumps({name: value for name in setting}))
        logits.append(our_logits(folder, "HELLO world"))
        assert logits[-1] == pytest.approx(their_logits(folder, "HELLO world"), abs=1e-5)
    assert logits[0] != pytest.approx(logits[1], abs=1e-2)


@pytest.mark.parametrize("kind, model", [("bpe", "roberta"), ("wordpiece", "bert")])
def test_segments_of_questions_are_the_tokenizers(kind, model, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "model"
    size = older_files(folder, kind)
    theirs = hugging_face(model, folder, head="span", num_labels=2, vocab_size=size, type_vocab_size=2)
    question, context = "Hello world", "naïve café [E1] Apple"
    with torch.inference_mode():
        inputs = transformers.AutoTokenizer.from_pretrained(folder)(question, context, return_tensors="pt")
        output = theirs(**inputs)
    predictor = Predictor(folder, Process(), max_length=50)
    encoded, _ = predictor.prepare([("q", {"question": question, "context": context})])
    ((logits, _),) = predictor.run(encoded)
    expected = torch.stack([output.start_logits[0], output.end_logits[0]], 1)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert max(encoded[0].segment_ids) == (model == "bert")
    assert encoded[0].question_length == inputs.sequence_ids(0).index(1)


@pytest.mark.parametrize("model, name", [("xlm-roberta", "XLMRobertaTokenizer"), ("camembert", "CamembertTokenizer")])
def test_a_tokenizer_converted_from_sentencepiece(model, name, tmp_path):
    transformers, sentencepiece = pytest.importorskip("transformers"), pytest.importorskip("sentencepiece")
    (tmp_path / "texts").write_text("\n".join([" ".join(PIECES).replace("\n", " ")] * 9))
    options = {"vocab_size": 180, "character_coverage": 1.0, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(input=tmp_path / "texts", model_prefix=tmp_path / "m", **options)
    (tmp_path / "m.model").rename(tmp_path / "sentencepiece.bpe.model")
    getattr(transformers, name).from_pretrained(tmp_path).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": model}))
    content = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    assert content["normalizer"]["type"] == "Precompiled"
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "model"), Tokenizer(tmp_path / "model")
    for text, pair in odd_texts(random.Random(0), 100):
        pairs = None if pair is None else [pair]
        expected = theirs([text], pairs, truncation=True, max_length=60)["input_ids"][0]
        assert ours.encode([text], pairs, 60)[0].token_ids == expected, text


def test_a_tokenizer_class_that_is_not_known_is_named(tmp_path):
    older_files(tmp_path / "model", "wordpiece")
    hugging_face("bert", tmp_path / "model")
    for file in ("tokenizer_config.json", "config.json"):  # either may name it
        path = tmp_path / "model" / file
        old = json.loads(path.read_text()) if path.exists() else {}
        for name, reason in (
            ("MyOwnTokenizer", "needs a tokenizer.json"),
            ("BertJapaneseTokenizer", "is not supported"),
        ):
            path.write_text(json.dumps(old | {"tokenizer_class": name}))
            with pytest.raises(InputError, match=f"the tokenizer class {name} {reason}"):
                Tokenizer(tmp_path / "model")
        path.write_text(json.dumps(old))


def test_a_padding_token_written_in_a_text(tmp_path):
    size = older_files(tmp_path / "model", "bpe")
    hugging_face("roberta", tmp_path / "model", vocab_size=size)
    text = "Hello <pad> world <pad><pad> don't"
    assert our_logits(tmp_path / "model", text) == pytest.approx(their_logits(tmp_path / "model", text), abs=1e-5)


# ---- configurations and weights ----


def test_numbers_for_label_names(tmp_path):
    hugging_face("roberta", tmp_path, num_labels=2)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"id2label": {"0": 0, "1": 1}, "label2id": {"0": 0, "1": 1}})
    )
    assert load_config(tmp_path).labels == ("0", "1") == load_model(tmp_path).model.config.labels


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_problems_that_are_not_supported_are_named(problem, tmp_path):
    hugging_face("roberta", tmp_path, num_labels=3)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"problem_type": problem}))
    with pytest.raises(InputError, match=f"problem_type = '{problem}': not supported"):
        load_config(tmp_path)


def test_weights_of_a_wrapped_model(tmp_path):
    hugging_face("bert", tmp_path)
    expected = load_model(tmp_path).model.state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path).model.state_dict()
    assert all(torch.equal(expected[name], loaded[name]) for name in expected)


def test_classes_without_names_are_matched_aloud(tmp_path):
    hugging_face("roberta", tmp_path, num_labels=3)
    note = "LABEL_0 for entailment, LABEL_1 for neutral, LABEL_2 for contradiction"
    assert note in load_model(tmp_path, find_task("MNLI").labels).notes[0]


# ---- data ----


def rows_of(folder: Path, *rows: dict) -> Path:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "train.jsonl"


@pytest.mark.parametrize(
    "label, message",
    [
        (float("nan"), "line 2: no value in the column 'label'"),
        (["toxic", "insult"], "line 2: the column 'label' holds .* expected one label an example"),
        ([1, 1, 0], "line 2: the column 'label' holds .* expected one label an example"),
        ({"toxic": 1}, "line 2: the column 'label' holds .* expected one label an example"),
        (float("inf"), "line 2: 'inf' in the column 'label' is neither a text nor a number"),
    ],
)
def test_values_that_are_no_labels(label, message, tmp_path):
    path = rows_of(tmp_path, {"text": "a", "label": 1.0}, {"text": "b", "label": label})
    with pytest.raises(InputError, match=message):
        list(own_task(None, None, None, regression=False).read(path))


def test_nan_in_a_column_of_numbers_of_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"text": ["a", "b"], "label": pyarrow.array([1.0, float("nan")])})
    parquet.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(InputError, match="line 2: no value in the column 'label'"):
        list(own_task(None, None, None, regression=False).read(tmp_path / "train.parquet"))


def test_the_text_nan_is_a_text(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\nnan,nan\nNaN,1\n")
    rows = own_task(None, None, None, regression=False).read(tmp_path / "train.csv")
    assert [(row.text, row.label) for row in rows] == [("nan", "nan"), ("NaN", "1")]


@pytest.mark.parametrize(
    "name, content", [("x.conll", "a O\n\u00a0 O\n"), ("x.jsonl", '{"words": ["a", "\u00a0"], "labels": ["O", "O"]}')]
)
def test_a_blank_word_is_predicted_as_it_is_trained(name, content, tags, tmp_path):
    (tmp_path / name).write_text(content)
    (sentence,) = tags.source.task.read(tmp_path / name)
    assert sentence.words == ["a", "\u00a0"]
    (answer,) = Predictor(tags.folder, Process()).answer([("line 1", {"words": sentence.words})])
    assert answer["words"] == ["a", "\u00a0"] and len(answer["labels"]) == 2


def test_torn_lines_of_qqp_are_left_out_and_counted(demo, tmp_path):
    names = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    whole = [f"{i}\t1\t2\tone film\ttwo films\t{i % 2}\n" for i in range(20)]
    torn = ['20\t3\t4\twhat is "a\n', 'film"?\twhich film\t1\n']  # one record over two lines
    (tmp_path / "train.tsv").write_text(names + "".join(whole[:9] + torn + whole[9:]))
    (tmp_path / "dev.tsv").write_text(names + "".join(whole))
    source, lines = Source(find_task("QQP"), tmp_path), []
    examples = source.load("train", Tokenizer(demo / "model"), 40)[0][""]
    assert len(examples) == 20 and examples.left_out == 2 and examples.targets.tolist() == [0, 1] * 10
    stage(source, "finetune", demo / "model", tmp_path / "run", show=lines.append)
    assert any(re.match(r"20 training examples, .* on average; 2 torn lines were left out$", line) for line in lines)
    (tmp_path / "own.tsv").write_text("text\tlabel\na\t1\nb\n")
    with pytest.raises(InputError, match="own.tsv, line 3: 1 columns, expected 2"):
        list(own_task(None, None, None, regression=False).read(tmp_path / "own.tsv"))


def test_a_wrong_answer_start_is_evaluated_and_not_learned(questions, tmp_path):
    content = json.loads((questions.folder.parent / "dev-v2.0.json").read_text())
    asked = next(q for a in content["data"] for p in a["paragraphs"] for q in p["qas"] if q["answers"])
    asked["answers"][0]["answer_start"] += 1
    asked["id"] = 7  # a number
    for name in ("train", "dev"):
        (tmp_path / f"{name}-v2.0.json").write_text(json.dumps(content))
    result = run("eval", "--task", "SQuAD2", "--restore", questions.folder, "--data", tmp_path)
    assert result.exit_code == 0, result.output
    result = run(
        "soft", "--task", "SQuAD2", "--restore", questions.folder, "--data", tmp_path, "--output", tmp_path / "o"
    )
    assert result.exit_code == 2 and "(7), answer 1" in result.stderr and "does not stand at" in result.stderr


@pytest.mark.parametrize(
    "comment", ["# text = EU", "# newpar", "# newdoc id = x", "# id 5239 domain=en", "#\tid x\tdomain=en"]
)
def test_comments_before_a_sentence_are_no_words(comment, tags, tmp_path):
    (tmp_path / "x.conll").write_text(f"{comment}\nEU B-ORG\nsays O\n")
    assert [s.words for s in tags.source.task.read(tmp_path / "x.conll")] == [["EU", "says"]]


@pytest.mark.parametrize("word", ["#Brexit", "#"])
def test_a_word_may_begin_with_the_sign_of_comments(word, tags, tmp_path):
    (tmp_path / "x.conll").write_text(f"{word}\tNN\tNumber=Sing\tB-ORG\nis\tVB\t_\tO\n")
    assert [s.words for s in tags.source.task.read(tmp_path / "x.conll")] == [[word, "is"]]


def test_numbers_of_words_are_no_words(tags, tmp_path):
    (tmp_path / "x.conll").write_text("1\tEU\tB-ORG\n2\tsays\tO\n3\tno\tO\n")
    with pytest.raises(InputError, match="line 1: the first column numbers the words"):
        list(tags.source.task.read(tmp_path / "x.conll"))


@pytest.mark.parametrize("score", ["1_000", "٣", "1e39", "nan"])
def test_scores_are_plain_numbers(score, byte_folder, tmp_path):
    (tmp_path / "dev.csv").write_text(f"text,label\na,1.5\nb,{score}\n")
    source = Source(own_task(None, None, None, regression=True), tmp_path)
    with pytest.raises(InputError, match="line 3: the score .* is not a number"):
        source.load("dev", Tokenizer(byte_folder), 20)


def test_a_vocabulary_without_its_unknown_token_is_refused_at_the_text(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n<unk>\n[CLS]\n[SEP]\nhello\n")
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode(["hello"], None, 9)[0].token_ids == [2, 4, 3]
    with pytest.raises(InputError, match="cannot read a text .*UNK"):
        tokenizer.encode(["strange"], None, 9)


def test_words_are_split_as_transformers_splits_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    older_files(tmp_path / "model", "bpe")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "roberta", "vocab_size": 500}')
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    words = ["Hello", "<mask>", "world", "<mask>", "don't"]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")(words, is_split_into_words=True)
    (ours,) = align(Tokenizer(tmp_path / "model"), [Sentence(words, None, 1)], 60)
    assert ours.token_ids == theirs["input_ids"]
    assert ours.first == [theirs.word_ids().index(i) for i in range(len(words))]


def test_texts_are_cut_on_the_left_where_the_folder_says_so_and_questions_are_not(tmp_path):
    older_files(tmp_path / "model", "bpe")
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"truncation_side": "left"}')
    tokenizer = Tokenizer(tmp_path / "model")
    whole, cut = (tokenizer.encode(["Hello world naïve café"], None, size)[0].token_ids for size in (60, 6))
    assert cut == [whole[0], *whole[-5:]]
    with pytest.raises(InputError, match="truncation_side = left .* questions and contexts that are too long"):
        make_windows(tokenizer, [Question("a", "Hello?", "world " * 40, ())], 30)


# ---- runs that moved ----


def test_resuming_asks_for_the_same_content_not_the_same_path(demo, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model").symlink_to(demo / "model")
    for name in ("train", "dev"):
        (tmp_path / "a" / f"{name}.jsonl").write_bytes((demo / "data" / f"{name}.jsonl").read_bytes())
    common = ("--epochs", 1, "--learning-rate", 1e-3, "--batch-size", 32)

    def go(folder: Path, *options: object, output: Path) -> Result:
        return run("finetune", "--restore", folder / "model", "--data", folder, "--output", output, *common, *options)

    assert go(tmp_path / "a", output=tmp_path / "a" / "run").exit_code == 0
    (tmp_path / "a").rename(tmp_path / "b")
    result = go(tmp_path / "b", "--resume", output=tmp_path / "b" / "run")
    assert result.exit_code == 0 and "nothing to resume" in result.output, result.output
    (tmp_path / "c").mkdir()
    for file in (demo / "model").iterdir():
        (tmp_path / "c" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "c" / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    other = ("--restore", tmp_path / "c")  # the last --restore counts
    result = go(tmp_path / "b", "--resume", *other, output=tmp_path / "b" / "run")
    assert result.exit_code == 2 and "started with a tokenizer of other content" in result.stderr
    with open(tmp_path / "b" / "dev.jsonl", "a") as file:
        file.write('{"text": "one more film", "label": "positive"}\n')
    result = go(tmp_path / "b", "--resume", output=tmp_path / "b" / "run")
    assert result.exit_code == 2 and "started with data of other content" in result.stderr
    assert "Traceback" not in result.output


# ---- streams and terminals ----


@pytest.fixture(scope="module")
def classifier(demo, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    save_model(folder, small_model(vocab_size=600, labels=("négative", "positive")))
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((demo / "model" / name).read_bytes())
    return folder


def program(*arguments: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "ltp.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, cwd=ROOT, **options)


def test_input_may_be_a_pipe_or_packed(classifier, tmp_path):
    lines = "".join(json.dumps({"text": f"a film {i}", "id": "é"}) + "\n" for i in range(3)).encode()
    (tmp_path / "x.jsonl").write_bytes(lines)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines))
    predict = ("predict", "--restore", classifier, "--input")
    expected = program(*predict, tmp_path / "x.jsonl").stdout
    assert expected.count(b"\n") == 3
    assert program(*predict, tmp_path / "x.jsonl.gz").stdout == expected
    assert program(*predict, "-", input=lines).stdout == expected
    assert program(*predict, "/dev/stdin", input=gzip.compress(lines)).stdout == expected
    read, write = os.pipe()
    os.write(write, lines)
    os.close(write)
    assert program(*predict, f"/dev/fd/{read}", pass_fds=[read]).stdout == expected  # as <(...) of a shell
    os.close(read)
    broken = program(*predict, "-", input=b"{")
    assert broken.returncode == 2 and b"/dev/stdin, line 1: not JSON" in broken.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_of_the_terminal(classifier, encoding, tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    half = json.dumps({"text": "a film", "id": "é\ud83d"}).encode()
    for arguments in (
        ("predict", "--restore", classifier, "café 中文"),
        ("predict", "--restore", classifier, "--input", "-"),
    ):
        result = program(*arguments, env=environment, input=half)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout.decode("utf-8"))["label"] in ("négative", "positive")
    for arguments in (("inspect", "--restore", classifier, "café 中文"), ("--help",), ("soft", "--help")):
        result = program(*arguments, env=environment)
        assert result.returncode == 0 and result.stdout, result.stderr
    result = program("predict", "--restore", tmp_path / "nöwhere 中", "text", env=environment)
    assert result.returncode == 2 and b"Traceback" not in result.stderr


# ---- caches ----


def test_a_damaged_cache_is_told_with_its_place(demo, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source, tokenizer = reviews(demo), Tokenizer(demo / "model")
    source.load("train", tokenizer, 40)
    (table,) = (tmp_path / "cache").rglob("*.arrow")
    table.write_bytes(table.read_bytes()[:1000])
    with pytest.raises(InputError, match=f"{tmp_path / 'cache'}: the cache .* remove generator/default-fingerprint="):
        source.load("train", tokenizer, 40)


def test_both_batches_count_questions(questions):
    """A question's length travels with its windows, packed one by one or together."""
    examples = questions.source.load("dev", Tokenizer(questions.folder), 60)[0][""]
    batch = examples.batch([3, 0])
    lengths = examples.question_lengths[[3, 0]].tolist()
    assert batch.question_lengths.tolist() == lengths and min(lengths) > 3
    ids = [examples.batch([i]).token_ids.tolist() for i in (3, 0)]
    assert torch.equal(pack(ids, question_lengths=lengths).question_lengths, batch.question_lengths)
