"""Texts to token ids, with the tokenizer of a model folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from support.errors import InputError


class Encoded(NamedTuple):
    """A text, or a pair of texts, as the model reads it."""

    token_ids: list[int]
    segment_ids: list[int]
    truncated: bool  # whether tokens were cut off


class Tokenizer:
    """A model folder's tokenizer: tokenizer.json, or vocab.json + merges.txt, or vocab.txt.

    files: {name: content} of the folder's tokenizer files, to be saved unchanged beside a trained model.
    backend: the `tokenizers.Tokenizer`.
    identity: a digest; tokenizers with the same identity give the same ids.
    Raises: InputError if the folder holds no tokenizer, or a damaged one.
    """

    FILES = (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "vocab.txt",
        "sentencepiece.bpe.model",
    )

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.files = {name: (folder / name).read_bytes() for name in self.FILES if (folder / name).is_file()}
        try:
            self.backend = _open_backend(folder, self.files)
        except InputError:
            raise
        except Exception as error:  # the library raises plain Exception for damaged files
            raise InputError(f"{folder}: damaged tokenizer ({str(error).splitlines()[0][:200]})") from None
        if not self.backend.encode("").ids:
            raise InputError(f"{folder}: the tokenizer adds no first token (CLS or <s>), which the classifier reads")
        self.identity = hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def check_fits(self, vocab_size: int, folder: str | Path) -> None:
        """Raises InputError if the tokenizer has ids for which a model with `vocab_size` embeddings has none."""
        if self.vocab_size > vocab_size:
            raise InputError(
                f"{folder}: the tokenizer has ids up to {self.vocab_size - 1}, config.json's vocab_size is "
                f"{vocab_size}; they belong to different models"
            )

    def encode(self, texts: list[str], pairs: list[str] | None, max_length: int) -> list[Encoded]:
        """Token ids with the special tokens, cut to `max_length` tokens. Of a pair, the longer text is cut first."""
        self.backend.enable_truncation(max_length)
        inputs = texts if pairs is None else list(zip(texts, pairs))
        return [Encoded(e.ids, e.type_ids, bool(e.overflowing)) for e in self.backend.encode_batch(inputs)]

    def tokens(self, token_ids: Iterable[int]) -> list[str]:
        """Readable tokens, one for each id."""
        names = [self.backend.id_to_token(i) or f"<{i}>" for i in token_ids]
        byte_level = "ByteLevel" in str(type(self.backend.pre_tokenizer)) + str(type(self.backend.decoder))
        return [_from_byte_level(name).strip() for name in names] if byte_level else names


def check_room(tokenizer: Tokenizer, max_length: int, pair: bool = False) -> None:
    """Raises InputError if `max_length` leaves no room for a text beside the special tokens."""
    smallest = tokenizer.backend.num_special_tokens_to_add(pair) + 1
    if max_length < smallest:
        raise InputError(f"--max-length {max_length}: leaves no room for text; expected at least {smallest}")


def _open_backend(folder: Path, files: dict[str, bytes]) -> tokenizers.Tokenizer:
    if "tokenizer.json" in files:
        backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
        backend.no_padding()
        backend.no_truncation()
        return backend
    settings = {
        key: value
        for name in ("special_tokens_map.json", "tokenizer_config.json")
        for key, value in json.loads(files.get(name, b"{}")).items()
    }
    if {"vocab.json", "merges.txt"} <= set(files):
        return _byte_level_bpe(folder, settings)
    if "vocab.txt" in files:
        return _word_piece(folder, settings)
    if "sentencepiece.bpe.model" in files:
        raise InputError(
            f"{folder}: holds only a sentencepiece model; open and save the tokenizer with transformers to get a "
            "tokenizer.json"
        )
    raise InputError(f"{folder}: no tokenizer; expected tokenizer.json, or vocab.json and merges.txt, or vocab.txt")


def _byte_level_bpe(folder: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """RoBERTa's tokenizer, from vocab.json and merges.txt."""
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    prefix_space = bool(settings.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    ids = {name: backend.token_to_id(name) for name in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")}
    if ids["<s>"] is None or ids["</s>"] is None:
        raise InputError(f"{folder}: vocab.json has no <s> and </s>")
    # The folder says whether <mask> takes in the space before it: {"content": "<mask>", "lstrip": true}.
    mask = settings.get("mask_token")
    lstrip = {"<mask>": isinstance(mask, dict) and bool(mask.get("lstrip"))}
    backend.add_special_tokens(
        [
            AddedToken(name, special=True, normalized=False, lstrip=lstrip.get(name, False))
            for name, i in ids.items()
            if i is not None
        ]
    )
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), trim_offsets=True, add_prefix_space=prefix_space
    )
    return backend


def _word_piece(folder: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """BERT's tokenizer, from vocab.txt."""
    backend = tokenizers.Tokenizer(models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    ids = {name: backend.token_to_id(name) for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")}
    if ids["[CLS]"] is None or ids["[SEP]"] is None:
        raise InputError(f"{folder}: vocab.txt has no [CLS] and [SEP]")
    backend.add_special_tokens([AddedToken(n, special=True, normalized=False) for n, i in ids.items() if i is not None])
    backend.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return backend


def _from_byte_level(token: str) -> str:
    """The text of a token that is spelled in byte-level BPE's alphabet, one printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    if not all(character in alphabet for character in token):
        return token
    return bytes(alphabet[character] for character in token).decode("utf-8", errors="replace")
