"""Random model folders of `transformers`, as people leave them, and odd texts to answer.

    python tests/random_folders.py 300 7      # how many, the seed of the first

compares the program's logits with those of `transformers` on each, and counts what was refused, and for what.
"""

from __future__ import annotations

import json
import random
import re
import sys
import tempfile
import warnings
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

TOLERANCE = 1e-5
PIECES = [
    "Hello world", "naïve café", "Ångström", "e\u0301tude", "中文字符", "日本語テスト", "한국어", "😀",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467", "مرحبا بالعالم", "שלום", "I'll don't", "1,234.5", "a@x.org",
    "\t", "  ", "\n", "\xa0", "\u200b", "\u3000", "\x07", "ﬁ ½ ２", "—’", "HELLO", "İstanbul", "straße", "<url>",
    "[E1] Apple [/E1]", "<user>", "<USER>", "[e1]", "<s>", "</s>", "<pad>", "<mask>", "<unk>", "[CLS]", "[SEP]",
    "[PAD]", "[MASK]", "[UNK]", "▁", "Ġ", "##ing",
]  # fmt: skip
ADDED = ["<url>", "<user>", "[E1]", "[/E1]", "Apple", "ld"]
HEADS = {"sequence": "SequenceClassification", "token": "TokenClassification", "span": "QuestionAnswering"}
PREFIXES = {
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "bert": "Bert",
    "ibert": "IBert",
}
OTHER_CLASSES = ["PreTrainedTokenizerFast", "TokenizersBackend", "NoSuchTokenizer", "BertJapaneseTokenizer"]
OTHER_CLASSES += ["ElectraTokenizer", "DistilBertTokenizerFast", "LongformerTokenizer", "CamembertTokenizer"]
CLASSES = {"bpe": "RobertaTokenizer", "wordpiece": "BertTokenizer", "unigram": "XLMRobertaTokenizer"}


def odd_texts(draw: random.Random, count: int = 20) -> list[tuple[str, str | None]]:
    """Texts, some with a second one: empty, blank, long, of all scripts, with special tokens written out."""

    def text() -> str:
        joint = draw.choice(["", " ", " ", "  "])
        return joint.join(draw.choice(PIECES) for _ in range(draw.randrange(0, 9)))

    texts = [(text(), text() if draw.random() < 0.35 else None) for _ in range(count - 4)]
    return [*texts, ("", None), (" \t\n ", None), ("long wörd 中 " * 450, None), ("x" * 600, "y z " * 300)]


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


@lru_cache
def trained(kind: str) -> str:
    """A tokenizer.json as the tokenizers' library trains it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if kind != "wordpiece":
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    texts = [" ".join(PIECES[i:] + PIECES[:i]) for i in range(len(PIECES))]
    options: dict[str, Any] = {"special_tokens": special, "show_progress": False}
    if kind == "wordpiece":
        backend = Backend(models.WordPiece(unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=False)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=300, **options))
        backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        return backend.to_str()
    if kind == "unigram":
        backend = Backend(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
        backend.train_from_iterator(texts, trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", **options))
    else:
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, **options))
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return backend.to_str()


def write_tokenizer(draw: random.Random, folder: Path, kind: str) -> None:
    """Writes the files of a tokenizer in one of the ways that people's folders have them."""
    backend = Backend.from_str(trained(kind))
    config = tokenizer_config(draw, kind)
    added = draw.sample(ADDED, draw.randrange(1, 5)) if draw.random() < 0.5 else []
    size = backend.get_vocab_size()
    ids = {text: size + i for i, text in enumerate(added)}
    whole = kind == "unigram" or draw.random() < 0.5  # a tokenizer.json
    if whole:
        prefix = draw.choice([True, False])
        if kind == "bpe":
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        elif kind == "wordpiece":
            lower, accents = draw.choice([True, False]), draw.choice([True, False, None])
            backend.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=accents)
        elif draw.random() < 0.3:
            backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        if added and draw.random() < 0.5:
            backend.add_tokens(added)
        if draw.random() < 0.1:
            backend.enable_truncation(20, direction=draw.choice(["left", "right"]))
        if draw.random() < 0.1:
            backend.enable_padding(length=draw.choice([None, 40]))
        content = json.loads(backend.to_str())
        if content["truncation"] and draw.random() < 0.5:
            del content["truncation"]["direction"]  # files of early versions have none
        (folder / "tokenizer.json").write_text(json.dumps(content))
    else:
        backend.model.save(str(folder))
    where = draw.choice(["nowhere", "added_tokens", "special map", "decoder", "extra"]) if added else "nowhere"
    tokens_map: dict[str, Any] = {}
    if where == "added_tokens" or where == "special map":
        (folder / "added_tokens.json").write_text(json.dumps(ids))
    if where == "special map":
        tokens_map["additional_special_tokens"] = added
    if where == "extra":
        config[draw.choice(["additional_special_tokens", "extra_special_tokens"])] = added
    if where == "decoder":
        flags = {
            name: draw.choice([True, False]) for name in ("lstrip", "rstrip", "normalized", "single_word", "special")
        }
        decoder = {str(i): {"content": text, **flags} for text, i in ids.items()}
        if draw.random() < 0.5:
            names = json.loads(trained(kind))["added_tokens"]
            decoder |= {str(t["id"]): {key: t[key] for key in ("content", *flags)} for t in names}
        config["added_tokens_decoder"] = decoder
    if draw.random() < 0.3:
        mask = "[MASK]" if kind == "wordpiece" else "<mask>"
        token = {"content": mask, "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
        if draw.random() < 0.5:
            config["mask_token"] = token | {"__type": "AddedToken"}
        else:
            tokens_map["mask_token"] = token
    if config or draw.random() < 0.5:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if tokens_map:
        (folder / "special_tokens_map.json").write_text(json.dumps(tokens_map))


def tokenizer_config(draw: random.Random, kind: str) -> dict[str, Any]:
    """Settings as tokenizer_config.json has them: none, some or all."""
    usual = CLASSES[kind]
    config: dict[str, Any] = {}
    if draw.random() < 0.6:
        config["tokenizer_class"] = draw.choice([usual, usual, usual, f"{usual}Fast", *OTHER_CLASSES])
    options = {
        "bpe": {"add_prefix_space": [True, False], "trim_offsets": [True, False]},
        "wordpiece": {
            "do_lower_case": [True, False],
            "strip_accents": [True, False, None],
            "tokenize_chinese_chars": [True, False],
        },
        "unigram": {"add_prefix_space": [True, False]},
    }
    common = {
        "truncation_side": ["left", "right"],
        "padding_side": ["left", "right"],
        "split_special_tokens": [True, False],
        "model_input_names": [["input_ids", "attention_mask"], ["input_ids", "token_type_ids", "attention_mask"]],
        "clean_up_tokenization_spaces": [True],
        "model_max_length": [16, 512],
    }
    for chance, table in ((0.4, options[kind]), (0.12, common)):
        config |= {key: draw.choice(values) for key, values in table.items() if draw.random() < chance}
    return config


# ----------------------------------------------------------------------------------------------------------------------
# Models


def write_model(draw: random.Random, folder: Path, model_type: str) -> None:
    """Writes a random model for the tokenizer of the folder."""
    import transformers

    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        size, pad = len(theirs), theirs.pad_token_id or 0
    except Exception:  # the folder is none that they read: whether we refuse it remains to be seen
        size, pad = 450, 0
    labels = draw.choice([1, 2, 3, 5])
    config = {
        "vocab_size": size + draw.choice([0, 0, 3]),
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": draw.choice([2, 3, 4]),
        "intermediate_size": 40,
        "max_position_embeddings": draw.choice([60, 130, 514]),
        "type_vocab_size": draw.choice([1, 2, 2, 3]),
        "layer_norm_eps": draw.choice([1e-5, 1e-12]),
        "hidden_act": draw.choice(["gelu", "gelu_new", "relu"]) if model_type != "ibert" else "gelu",
        "initializer_range": 0.3,
        "num_labels": labels,
    }
    if draw.random() < 0.5:
        config["pad_token_id"] = draw.choice([pad, 0, 1, 3])
    torch.manual_seed(draw.randrange(10**6))
    prefix = PREFIXES[model_type]
    model = getattr(transformers, f"{prefix}ForSequenceClassification")(
        getattr(transformers, f"{prefix}Config")(**config)
    )
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model = model.to(draw.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16]))
    kind = draw.choice(["one", "one", "shards", "pickle"])
    model.save_pretrained(folder, max_shard_size="20KB" if kind == "shards" else "1GB")
    if kind == "pickle":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    edit_config(draw, folder / "config.json", labels)


def edit_config(draw: random.Random, path: Path, labels: int) -> None:
    """Names the labels in one of the ways that training scripts leave behind, and drops keys with a default."""
    raw = json.loads(path.read_text())
    names = draw.choice([None, "numbers", "names", "untold"])
    if names == "numbers":
        raw["id2label"] = {str(i): i for i in range(labels)}
        raw["label2id"] = {str(i): i for i in range(labels)}
    elif names == "names":
        raw["id2label"] = {str(i): f"näme {i}" for i in reversed(range(labels))}
    elif names == "untold":
        raw |= {"num_labels": labels}
        for key in ("id2label", "label2id"):
            raw.pop(key, None)
    if draw.random() < 0.1:
        raw["tokenizer_class"] = draw.choice([*CLASSES.values(), *OTHER_CLASSES])
    for key in ("architectures", "dtype", "torch_dtype", "transformers_version", "position_embedding_type"):
        if draw.random() < 0.2:
            raw.pop(key, None)
    if draw.random() < 0.2:
        raw["problem_type"] = draw.choice(["single_label_classification", "regression", "multi_label_classification"])
    path.write_text(json.dumps(raw))


def make_folder(seed: int, folder: Path) -> random.Random:
    """Writes the folder of a seed, and returns the generator for what else is drawn."""
    draw = random.Random(seed)
    kind = draw.choice(["bpe", "wordpiece", "unigram"])
    usual = {"bpe": ["roberta", "roberta", "ibert"], "wordpiece": ["bert"], "unigram": ["xlm-roberta", "camembert"]}
    model_type = draw.choice(list(PREFIXES)) if draw.random() < 0.15 else draw.choice(usual[kind])
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(draw, folder, kind)
    write_model(draw, folder, model_type)
    return draw


# ----------------------------------------------------------------------------------------------------------------------
# Comparing


@torch.inference_mode()
def their_answers(folder: Path, texts: list[tuple[str, str | None]], max_length: int) -> list[torch.Tensor]:
    """The logits of `transformers`, a text at a time."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    answers = []
    for text, pair in texts:
        second = {} if pair is None else {"text_pair": [pair]}
        inputs = tokenizer([text], **second, truncation=True, max_length=max_length, return_tensors="pt")
        answers.append(model(**inputs).logits[0])
    return answers


def compare(seed: int, folder: Path) -> str:
    """Of the folder of a seed: "equal", "they fail: ..." or "refused: ...".

    Raises: AssertionError if answers differ.
    """
    from support.errors import InputError
    from support.process import Process
    from tools.predict import Predictor

    try:
        draw = make_folder(seed, folder)
    except Exception as error:
        return f"not made: {type(error).__name__} {error}"[:160]
    texts = odd_texts(draw)
    limit = draw.choice([24, 58])
    try:
        expected = their_answers(folder, texts, limit)
    except Exception as error:
        expected, reason = None, f"{type(error).__name__} {error}"[:160]
    records = [
        (f"text {i}", {"text": text} | ({} if pair is None else {"text_pair": pair}))
        for i, (text, pair) in enumerate(texts)
    ]
    try:
        answers = Predictor(folder, Process(), max_length=limit).answer(records)
    except InputError as error:
        assert "\n" not in str(error)
        return f"refused: {str(error).replace(str(folder), 'FOLDER')}"
    if expected is None:
        return f"they fail: {reason}"
    for (text, pair), answer, logits in zip(texts, answers, expected):
        difference = float((torch.tensor(answer["logits"]) - logits).abs().max())
        assert difference <= TOLERANCE, f"seed {seed}, {difference:.1e}: {text[:60]!r} {pair and pair[:60]!r}"
    return "equal"


def main() -> None:
    count, first = (int(argument) for argument in (*sys.argv[1:], "300", "0")[:2])
    results: Counter[str] = Counter()
    for seed in range(first, first + count):
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = compare(seed, Path(folder) / "model")
            except Exception as error:
                result = f"DIFFERENT: {type(error).__name__}"
                print(f"seed {seed}: {error!r:.300}")
        results[re.sub(r"\d+", "N", result)] += 1
    for result, number in results.most_common():
        print(f"{number:5}  {result}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    warnings.filterwarnings("ignore")
    main()
