"""Texts to token ids, with the tokenizer of a model folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders

from support.errors import InputError
from support.onnx_file import model_name
from tasks.tokenizer_files import open_tokenizer


class Encoded(NamedTuple):
    """A text, or a pair of texts, as the model reads it."""

    token_ids: list[int]
    segment_ids: list[int]
    truncated: bool = False  # whether tokens were cut off
    question_length: int = 0  # see `model.Batch`


class Tokenizer:
    """A model folder's tokenizer, see tokenizer_files.py.

    files: {name: content} of the folder's tokenizer files, to be saved unchanged beside a trained model.
    backend: the `tokenizers.Tokenizer`, which neither cuts nor pads unless it is told to.
    identity: a digest; tokenizers with the same identity give the same ids.
    Raises: InputError if the folder holds no tokenizer, a damaged one, or one that does not fit config.json.
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
        self.folder = Path(folder)
        self.files = {name: (self.folder / name).read_bytes() for name in self.FILES if (self.folder / name).is_file()}
        try:
            self.backend, self.reads_segments, self.cut_side = open_tokenizer(self.folder, self.files)
        except InputError:
            raise
        except Exception as error:  # the library raises plain Exception for damaged files
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{folder}: damaged tokenizer ({reason[:200]})") from None
        state = f"{self.backend.to_str()} {self.backend.encode_special_tokens} {self.reads_segments} {self.cut_side}"
        self.identity = hashlib.sha256(state.encode()).hexdigest()
        self.embeddings = self._check_vocabulary()
        (empty,) = self.run([""])
        if not empty.ids:
            raise InputError(f"{folder}: the tokenizer adds no first token (CLS or <s>), which the classifier reads")

    def _check_vocabulary(self) -> int | None:
        """How many embeddings the model has; None where every id has one. Raises: InputError for another's tokenizer.

        Added tokens may lie beyond: only texts that hold them are refused.
        """
        path = self.folder / "config.json"
        size = json.loads(path.read_bytes()).get("vocab_size") if path.is_file() else None
        highest = [max(self.backend.get_vocab(added).values(), default=-1) for added in (False, True)]
        if type(size) is not int or highest[1] < size:
            return None
        if highest[0] >= size:
            raise InputError(
                f"{self.folder}: the tokenizer has ids up to {highest[0]}, config.json's vocab_size is {size}; they "
                "belong to different models"
            )
        return size

    def run(self, inputs: list[Any], **options: bool) -> list[tokenizers.Encoding]:
        """`encode_batch` of the backend. Raises: InputError for a token that the model has no embedding for."""
        try:
            encodings = self.backend.encode_batch(inputs, **options)
        except Exception as error:  # the library raises plain Exception, for a vocabulary without its unknown token
            raise InputError(f"{model_name(self.folder)}: the tokenizer cannot read a text ({error})") from None
        for encoding in encodings if self.embeddings else ():
            highest = max(encoding.ids, default=-1)
            if highest >= self.embeddings:
                raise InputError(
                    f"{model_name(self.folder)}: the tokenizer gives {self.backend.id_to_token(highest)!r} the id "
                    f"{highest}, and config.json's vocab_size is {self.embeddings}; correct the model's added "
                    "tokens, or the text"
                )
        return encodings

    def segment_ids(self, encoding: tokenizers.Encoding) -> list[int]:
        """The segment of each token, 0 everywhere for models that are not told texts apart."""
        return encoding.type_ids if self.reads_segments else [0] * len(encoding)

    def refuse_left(self, what: str) -> None:
        """Raises InputError if texts are to be cut on the left, for `what`, which are cut on the right alone."""
        if self.cut_side == "left":
            raise InputError(
                f"{model_name(self.folder)}: truncation_side = left in tokenizer_config.json is not supported for "
                f"{what} that are too long; pass a larger --max-length, or remove it"
            )

    def encode(self, texts: list[str], pairs: list[str] | None, max_length: int) -> list[Encoded]:
        """Token ids with the special tokens, cut to `max_length` tokens. Of a pair, the longer text is cut first."""
        self.backend.enable_truncation(max_length, direction=self.cut_side)
        encodings = self.run(texts if pairs is None else list(zip(texts, pairs)))
        return [Encoded(e.ids, self.segment_ids(e), bool(e.overflowing)) for e in encodings]

    def tokens(self, token_ids: Iterable[int]) -> list[str]:
        """Readable tokens, one for each id."""
        names = [self.backend.id_to_token(i) or f"<{i}>" for i in token_ids]
        if not isinstance(self.backend.decoder, decoders.ByteLevel):
            return names
        return [self.backend.decoder.decode([name]).strip() for name in names]


def check_room(tokenizer: Tokenizer, max_length: int, pair: bool = False) -> None:
    """Raises InputError if `max_length` leaves no room for a text beside the special tokens."""
    smallest = tokenizer.backend.num_special_tokens_to_add(pair) + 1
    if max_length < smallest:
        raise InputError(f"--max-length {max_length}: leaves no room for text; expected at least {smallest}")
