"""What a model folder says about its tokenizer, read as `transformers` 5 reads it.

The class of the tokenizer counts. One of those in `CLASSES` fixes how texts are normalised, split and framed by
special tokens, and takes nothing but the vocabulary from tokenizer.json; without a tokenizer.json it reads the older
files. Any other class needs a tokenizer.json, which then says everything. In both cases settings come from
tokenizer_config.json and special_tokens_map.json, and added tokens from these, added_tokens.json and tokenizer.json.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from support.errors import InputError

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ROBERTA_TOKENS = dict(zip(NAMES, ("<s>", "</s>", "<unk>", "</s>", "<pad>", "<s>", "<mask>")))
BERT_TOKENS = dict(zip(NAMES[2:], ("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]")))
CAMEMBERT_EXTRA = ["<s>NOTUSED", "</s>NOTUSED", "<unk>NOTUSED"]

USUAL_CLASSES = {  # by the model_type of config.json, where no file names a class
    "roberta": "RobertaTokenizer",
    "ibert": "RobertaTokenizer",
    "ltp": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
    "bert": "BertTokenizer",
}
# Other names of the same classes, and names that say nothing.
ALIASES = {f"{name}Tokenizer": "RobertaTokenizer" for name in ("Bart", "LED", "Longformer", "Mvp")}
ALIASES |= {
    f"{name}Tokenizer": "BertTokenizer" for name in ("Electra", "MobileBert", "SqueezeBert", "LayoutLM", "Lxmert")
}
ALIASES |= dict.fromkeys(("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend"), "")


# Classes of `transformers` that build other tokenizers: each adds rules of its own to a tokenizer.json.
OTHER_CLASSES = {
    f"{name}Tokenizer"
    for name in (
        "Albert Barthez Bartpho BertJapanese Bertweet BigBird Blenderbot BlenderbotSmall ByT5 CLIP CTRL "
        "Canine Cohere ConvBert Cpm DPRContextEncoder DPRQuestionEncoder DPRReader Deberta DebertaV2 Esm FNet "
        "FSMT Flaubert Funnel GPT2 GPTNeoX Gemma Herbert LayoutLMv2 LayoutLMv3 LayoutXLM Llama Luke MBart "
        "MBart50 MLuke MPNet MarkupLM Nllb OpenAIGPT PLBart Pegasus Perceiver Phobert ProphetNet Qwen2 "
        "Reformer RemBert RoCBert RoFormer Splinter T5 Tapas Udop XGLM XLM XLNet"
    ).split()
}


class Settings(NamedTuple):
    """The metadata of a tokenizer."""

    folder: Path
    name: str  # of the class; "" where none is known
    values: dict[str, Any]  # keys of tokenizer_config.json and special_tokens_map.json
    added: dict[int, AddedToken]  # by id
    content: dict[str, Any]  # tokenizer.json; {} where there is none

    def named_tokens(self, defaults: dict[str, str]) -> dict[str, Any]:
        """The special tokens by name: the usual seven first, then those of the folder's own."""
        own = {key: value for key, value in self.values.items() if key.endswith("_token") and key not in NAMES}
        chosen = {name: self.values.get(name, defaults.get(name)) for name in NAMES} | own
        return {name: token for name, token in chosen.items() if isinstance(token, (str, AddedToken))}


class Opened(NamedTuple):
    """A tokenizer, ready to use."""

    backend: Tokenizer
    reads_segments: bool  # whether the model is told first and second text apart
    cut_side: str  # "right" or "left": where texts that are too long are cut


def open_tokenizer(folder: Path, files: dict[str, bytes]) -> Opened:
    """Builds the tokenizer of a folder. files: {name: content} of its tokenizer's files.

    Raises: InputError for a folder without a tokenizer, or with one that this program does not have; what
    `tokenizers` and `json` raise for damaged files.
    """
    settings = read_settings(folder, files)
    build = CLASSES.get(settings.name)
    if build:
        backend = build(settings)
    elif settings.name in OTHER_CLASSES:
        raise InputError(
            f"{folder}: the tokenizer class {settings.name} is not supported, only those of RoBERTa, BERT, XLM-RoBERTa "
            'and CamemBERT are; "PreTrainedTokenizerFast" in tokenizer_config.json takes a tokenizer.json as it is'
        )
    elif settings.content:
        backend = Tokenizer.from_str(json.dumps(settings.content))
        if backend.padding:
            settings.values.setdefault("pad_token", backend.padding["pad_token"])
        add_tokens(backend, settings, settings.named_tokens({}))
    elif settings.name:
        raise InputError(
            f"{folder}: the tokenizer class {settings.name} needs a tokenizer.json, which is missing; open and save "
            "the tokenizer with transformers to get one"
        )
    else:
        raise InputError(f"{folder}: no tokenizer; expected tokenizer.json, or vocab.json and merges.txt, or vocab.txt")
    cut = settings.content.get("truncation") or {}
    side = settings.values.get("truncation_side") or cut.get("direction", "right").lower()
    if side not in ("left", "right"):
        raise InputError(f"{folder}: truncation_side = {side!r} in tokenizer_config.json: expected left or right")
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = bool(settings.values.get("split_special_tokens", False))
    inputs = settings.values.get("model_input_names", ["token_type_ids"] if settings.name == "BertTokenizer" else [])
    return Opened(backend, "token_type_ids" in inputs, side)


# ----------------------------------------------------------------------------------------------------------------------
# Metadata


def read_settings(folder: Path, files: dict[str, bytes]) -> Settings:
    """Merges the files of metadata, each of which may be missing."""
    values, tokens_map, added_ids, content = (
        read_object(files, name)
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
    )
    if "additional_special_tokens" in values and not values.get("extra_special_tokens"):
        values["extra_special_tokens"] = values.pop("additional_special_tokens")
    added = {}
    if "added_tokens_decoder" in values:  # it is complete: the older files do not count beside it
        added = {int(i): as_token(token) for i, token in values["added_tokens_decoder"].items()}
    else:
        extra = as_list(values.get("extra_special_tokens"))
        values |= {key: as_token(value, special=True) for key, value in tokens_map.items()}
        if isinstance(tokens_map.get("extra_special_tokens"), list):
            more = as_list(tokens_map["extra_special_tokens"])
            values["extra_special_tokens"] = extra + [token for token in more if token not in extra]
        special = {str(values[name]) for name in NAMES if values.get(name)}
        special |= {str(token) for token in as_list(values.get("extra_special_tokens"))}
        for text, i in added_ids.items():
            added[i] = AddedToken(text, normalized=text not in special, special=text in special)
        added |= {token["id"]: as_token(token) for token in content.get("added_tokens", [])}
    values.setdefault("extra_special_tokens", values.get("additional_special_tokens"))
    by_text = {token.content: token for token in added.values()}
    for name in NAMES:
        token = as_token(values.get(name))
        if token is not None:
            values[name] = by_text.get(str(token), token)
    return Settings(folder, class_name(folder, files, values), values, added, content)


def read_object(files: dict[str, bytes], name: str) -> dict[str, Any]:
    """The content of a JSON file; {} where there is none."""
    try:
        content = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name}: expected a JSON object")
    return content


def as_token(value: Any, **flags: bool) -> Any:
    """An object of a JSON file as a token; other values stay as they are."""
    if not isinstance(value, dict) or "content" not in value:
        return value
    return AddedToken(**{key: item for key, item in value.items() if key not in ("__type", "id")} | flags)


def as_list(tokens: Any) -> list[Any]:
    """Extra tokens, which files give as a list or by name."""
    return [as_token(token) for token in (tokens.values() if isinstance(tokens, dict) else tokens or [])]


def class_name(folder: Path, files: dict[str, bytes], values: dict[str, Any]) -> str:
    """The tokenizer's class, without "Fast": as a file names it, else the usual one of the model's type.

    Without a config.json the files tell. "": none is known.
    """
    if values.get("tokenizer_class") == "":
        return ""
    path = folder / "config.json"
    config = json.loads(path.read_bytes()) if path.is_file() else {}
    name = values.get("tokenizer_class") or config.get("tokenizer_class") or USUAL_CLASSES.get(config.get("model_type"))
    if name is None and not config and "tokenizer.json" not in files:
        name = "RobertaTokenizer" if "vocab.json" in files else "BertTokenizer" if "vocab.txt" in files else ""
    name = (name or "").removesuffix("Fast")
    return ALIASES.get(name, name)


# ----------------------------------------------------------------------------------------------------------------------
# The classes


def build_roberta(settings: Settings) -> Tokenizer:
    """Byte-level BPE."""
    vocab, merges = read_vocabulary(settings, "BPE", ("vocab.json", "merges.txt"), models.BPE.read_file)
    prefix_space = settings.values.get("add_prefix_space", False)
    backend = Tokenizer(models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    tokens = settings.named_tokens(ROBERTA_TOKENS)
    add_tokens(backend, settings, tokens)
    first, last = (with_id(backend, tokens, name, settings) for name in ("cls_token", "sep_token"))
    trim = settings.values.get("trim_offsets", True)
    backend.post_processor = processors.RobertaProcessing(last, first, trim, prefix_space)
    return backend


def build_bert(settings: Settings) -> Tokenizer:
    """WordPiece."""
    vocab, _ = read_vocabulary(
        settings, "WordPiece", ("vocab.txt",), lambda path: (models.WordPiece.read_file(path), [])
    )
    tokens = settings.named_tokens(BERT_TOKENS)
    backend = Tokenizer(models.WordPiece(vocab, unk_token=str(tokens.get("unk_token"))))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=settings.values.get("do_lower_case", True),
        strip_accents=settings.values.get("strip_accents"),
        handle_chinese_chars=settings.values.get("tokenize_chinese_chars", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    add_tokens(backend, settings, tokens)
    first, last = (with_id(backend, tokens, name, settings) for name in ("cls_token", "sep_token"))
    backend.post_processor = processors.TemplateProcessing(
        single=[f"{first[0]}:0", "$A:0", f"{last[0]}:0"],
        pair=[f"{first[0]}:0", "$A:0", f"{last[0]}:0", "$B:1", f"{last[0]}:1"],
        special_tokens=[first, last],
    )
    return backend


def build_xlm_roberta(settings: Settings) -> Tokenizer:
    """Unigram, as sentencepiece makes it."""
    return build_unigram(settings, settings.named_tokens(ROBERTA_TOKENS), unknown=3)


def build_camembert(settings: Settings) -> Tokenizer:
    """Unigram with other special tokens."""
    tokens = settings.named_tokens(ROBERTA_TOKENS)
    if isinstance(tokens.get("mask_token"), str):
        tokens["mask_token"] = AddedToken(tokens["mask_token"], lstrip=True, special=True)
    if settings.values["extra_special_tokens"] is None:
        settings.values["extra_special_tokens"] = CAMEMBERT_EXTRA
    return build_unigram(settings, tokens)


def build_unigram(settings: Settings, tokens: dict[str, Any], unknown: int | None = None) -> Tokenizer:
    """unknown: the id of the unknown token; None: where the vocabulary has it."""
    vocab, _ = read_vocabulary(settings, "Unigram", ())
    vocab = [tuple(entry) for entry in vocab]
    if unknown is None:
        unknown = next((i for i, (text, _) in enumerate(vocab) if text == str(tokens.get("unk_token"))), 0)
    backend = Tokenizer(models.Unigram(vocab, unk_id=unknown, byte_fallback=False))
    normalizer = settings.content.get("normalizer") or {}
    for part in normalizer.get("normalizers", [normalizer]):
        if part.get("type") == "Precompiled":
            backend.normalizer = normalizers.Precompiled(base64.b64decode(part["precompiled_charsmap"]))
            break
    scheme = "always" if settings.values.get("add_prefix_space", True) else "never"
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme=scheme)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(words)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    add_tokens(backend, settings, tokens)
    first, last = (with_id(backend, tokens, name, settings) for name in ("bos_token", "eos_token"))
    backend.post_processor = processors.TemplateProcessing(
        single=[first[0], "$A", last[0]],
        pair=[first[0], "$A", last[0], last[0], "$B", last[0]],
        special_tokens=[first, last],
    )
    return backend


CLASSES: dict[str, Callable[[Settings], Tokenizer]] = {
    "RobertaTokenizer": build_roberta,
    "BertTokenizer": build_bert,
    "DistilBertTokenizer": build_bert,  # its models are not told texts apart
    "XLMRobertaTokenizer": build_xlm_roberta,
    "CamembertTokenizer": build_camembert,
}


def read_vocabulary(
    settings: Settings, kind: str, names: tuple[str, ...], read: Callable[..., tuple[Any, Any]] | None = None
) -> tuple[Any, list[tuple[str, ...]]]:
    """The vocabulary and the merges of tokenizer.json, or else of the older files `names`.

    kind: "BPE", "WordPiece" or "Unigram". Raises: InputError where they are missing or of another kind.
    """
    model = settings.content.get("model")
    if model is not None:
        default = "BPE" if "merges" in model else "Unigram" if isinstance(model["vocab"], list) else "WordPiece"
        if (actual := model.get("type", default)) != kind:
            raise InputError(
                f"{settings.folder}: tokenizer.json holds a {actual} vocabulary, and {settings.name} needs {kind}; "
                'correct "tokenizer_class" in tokenizer_config.json'
            )
        merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model.get("merges", [])]
        return model["vocab"], merges
    paths = [settings.folder / name for name in names]
    if read and all(path.is_file() for path in paths):
        return read(*map(str, paths))
    if (settings.folder / "sentencepiece.bpe.model").is_file():
        raise InputError(
            f"{settings.folder}: holds only a sentencepiece model; open and save the tokenizer with transformers to "
            "get a tokenizer.json"
        )
    files = " or ".join(["tokenizer.json", *([" and ".join(names)] if names else [])])
    raise InputError(f"{settings.folder}: no tokenizer; {settings.name} needs {files}")


def add_tokens(backend: Tokenizer, settings: Settings, tokens: dict[str, Any]) -> None:
    """Adds the folder's tokens that the backend does not have yet: in the order of their ids, by name, then extra ones.

    Those that are not in the vocabulary get the next free ids.
    """
    known = backend.get_added_tokens_decoder().values()
    same = {repr(token) for token in known}
    new: list[Any] = [token for _, token in sorted(settings.added.items()) if repr(token) not in same]
    present = {token.content for token in [*known, *new]}
    for token in [*tokens.values(), *as_list(settings.values["extra_special_tokens"])]:
        if str(token) not in present:
            present.add(str(token))
            new.append(token)
    special = {str(token) for token in tokens.values()}
    for i, token in enumerate(new):
        if isinstance(token, str):
            new[i] = AddedToken(token, special=True)
        elif token.content in special:
            token.special = True
    if new:
        backend.add_tokens(new)


def with_id(backend: Tokenizer, tokens: dict[str, Any], name: str, settings: Settings) -> tuple[str, int]:
    """A special token and its id. Raises: InputError where the folder has none."""
    if name not in tokens:
        raise InputError(f"{settings.folder}: the tokenizer has no {name}; expected one in tokenizer_config.json")
    return str(tokens[name]), backend.token_to_id(str(tokens[name]))
