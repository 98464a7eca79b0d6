"""Answers texts with a model that `ltp.py export` wrote, without PyTorch: numpy, onnxruntime and tokenizers.

    python -m pip install -r serving/requirements.txt
    python serving/serve.py model.onnx "a gripping film"
    python serving/serve.py model.onnx "one sentence" "another one"
    python serving/serve.py squad.onnx "Who wrote it?" "It was written by Ada Berg in 1912."
    python serving/serve.py model.onnx < lines.jsonl > answers.jsonl

A line of JSON is {"text": ...}, with "text_pair" where there is one; for a tagger also {"words": [...]}; for questions
{"question": ..., "context": ...}. It may have an "id". An answer is what `ltp.py predict` gives. The file is enough: it
holds the graph, the tokenizer and the names of the classes. In a program of your own:

    from serve import Classifier, Model
    answers = Classifier("model.onnx")(["a gripping film", "a dull one"])
    answer = Model("squad.onnx").answer({"question": "Who wrote it?", "context": "It was written by Ada Berg."})
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Encoding, Tokenizer

ROWS = 32  # texts, or windows of one, that run as one batch
TEXTS = {"sequence": ("text", "text_pair"), "token": ("text",), "span": ("question", "context")}  # names in a record


class Model:
    """An exported model of any kind."""

    def __init__(self, path: str | Path, threads: int | None = None, no_answer_threshold: float | None = None):
        """threads: of the CPU; default: one for each core.

        no_answer_threshold: a question whose no_answer_score is above it gets an empty answer; default: none does.
        Raises: ValueError for a file that is no such model.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library has a class for each reason, all of Exception alone
            raise ValueError(f"{path}: not a graph that ONNX Runtime can run ({str(error).splitlines()[0]})") from None
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.settings, self.no_answer_threshold = json.loads(metadata.get("settings", "{}")), no_answer_threshold
        if "vocab_size" not in self.settings:
            raise ValueError(f"{path}: holds no tokenizer, or an older version's; write it again with `ltp.py export`")
        if self.settings["limit"] < 1:
            raise ValueError(f"{path}: reads {self.settings['max_length']} tokens, which leaves no room for a text")
        self.head, self.labels = self.settings["head"], json.loads(metadata["labels"])
        self.inputs = [node.name for node in self.session.get_inputs()]
        self.tokenizer = Tokenizer.from_str(metadata["tokenizer"])
        self.tokenizer.encode_special_tokens = self.settings["split_special_tokens"]
        if self.head != "span":
            side = self.settings["cut_side"] if self.head == "sequence" else "right"
            self.tokenizer.enable_truncation(self.settings["max_length"], direction=side)

    def answer(self, record: Any) -> dict[str, Any]:
        """The answer to a record, with its "id" if it has one; see the top of this file. Raises: ValueError."""
        if not isinstance(record, dict):
            raise ValueError("expected a JSON object")
        method = {"sequence": self.classify, "token": self.tag, "span": self.find}[self.head]
        return ({"id": record["id"]} if "id" in record else {}) | method(record)

    def classify(self, record: dict[str, Any]) -> dict[str, Any]:
        """The class of a text or a pair, or its score, the logits, its tokens, and those that left each layer."""
        texts = [record.get("text"), *([record["text_pair"]] if "text_pair" in record else [])]
        if not all(is_text(text) for text in texts):
            raise ValueError('expected "text", and "text_pair" for pairs, strings of valid characters')
        return self.classify_texts([texts])[0]

    def classify_texts(self, texts: list[list[str]]) -> list[dict[str, Any]]:
        """As `classify`, for texts or pairs that run as one batch."""
        encodings = [self.encode(*both) for both in texts]
        logits, kept = self.run([(encoding.ids, encoding.type_ids) for encoding in encodings])
        labels = [self.labels[i] for i in logits.argmax(1)] if len(self.labels) > 1 else logits[:, 0].tolist()
        columns = zip(labels, logits.tolist(), map(len, encodings), kept.tolist())
        return [dict(zip(("label", "logits", "tokens", "kept"), row)) for row in columns]

    def tag(self, record: dict[str, Any]) -> dict[str, Any]:
        """The label of each word, None for words that were cut off, and the tokens as in `classify`."""
        words = record.get("words")
        if words is None and is_text(record.get("text")):
            words = record["text"].split()
        if not isinstance(words, list) or not words or not all(is_text(word) and word for word in words):
            raise ValueError('expected "words", a list of strings of which none is empty, or "text" of some words')
        # In byte-level BPE the blank belongs to the word. Some tokenizers put it there; those without blanks drop it.
        blank = "" if getattr(self.tokenizer.pre_tokenizer, "add_prefix_space", False) else " "
        encoding = self.encode([blank + word if i else word for i, word in enumerate(words)])
        if encoding.overflowing:
            self.check_cut()
        first = first_tokens(encoding, len(words))
        logits, kept = self.run([(encoding.ids, encoding.type_ids)])
        labels = [self.labels[i] for i in logits[0, first].argmax(1)] + [None] * (len(words) - len(first))
        return {"words": words, "labels": labels, "tokens": len(encoding), "kept": kept[0].tolist()}

    def find(self, record: dict[str, Any]) -> dict[str, Any]:
        """The span of the context that answers the question, or "". Tokens and kept are summed over the windows."""
        question, context = record.get("question"), record.get("context")
        if not all(is_text(text) and text.strip() for text in (question, context)):
            raise ValueError('expected "question" and "context", strings that are not empty')
        pair = self.encode(self.cut_question(question.strip()), context)
        owners = pair.sequence_ids  # 0 for the question, 1 for the context, None for special tokens
        offsets = [visible(context, *span) if owner == 1 else (0, 0) for owner, span in zip(owners, pair.offsets)]
        head = owners.index(1) if 1 in owners else len(owners)  # tokens before the context
        windows, spans, no_answer = self.make_windows(head, owners.count(1), len(owners)), [], math.inf
        ids, type_ids, offsets = np.array(pair.ids), np.array(pair.type_ids), np.array(offsets)
        logits, kept = self.run([(ids[w].tolist(), type_ids[w].tolist()) for w in windows], head)
        for window, row in zip(windows, logits.astype(np.float64)):
            scores = row[: len(window)]
            spans += best_span(offsets[window], scores, self.settings["max_answer_tokens"])
            no_answer = min(no_answer, float(scores[0].sum()))  # each window must do without an answer
        sums = {"tokens": sum(map(len, windows)), "kept": kept.sum(0).tolist()}
        return self.choose(context, spans, no_answer) | {"windows": len(windows)} | sums

    def cut_question(self, question: str) -> str:
        """The question, or its beginning if it leaves no room for the context. Raises: ValueError."""
        tokens, size = self.encode(question, add_special_tokens=False), self.settings["question_cut"]
        if len(tokens) <= self.settings["limit"]:
            return question
        self.check_cut()
        ends = [0, *(end for _, end in tokens.offsets[:size])]
        while len(tokens) > size:  # what is cut may have other tokens at its end
            question = question[: ends.pop()]
            tokens = self.encode(question, add_special_tokens=False)
        return question

    def make_windows(self, head: int, context: int, total: int) -> list[list[int]]:
        """The positions of each window's tokens among `total`: all but those of the context, and a part of the context.

        head, context: how many tokens are before the context and in it. Neighbouring windows share `stride` tokens.
        """
        end, stride = head + context, self.settings["stride"]
        size = self.settings["max_length"] - (total - context)  # tokens of the context in a window
        if context > size:
            self.check_cut()
        begins = range(head, max(end - stride, head + 1), size - stride)
        return [[*range(head), *range(begin, min(begin + size, end)), *range(end, total)] for begin in begins]

    def choose(self, context: str, spans: list[tuple[float, int, int]], no_answer: float) -> dict[str, Any]:
        """The best span: the first in the context of those with the highest score."""
        if not spans:
            return {"answer": "", "no_answer_score": None}
        score, start, end = min(spans, key=lambda span: (-span[0], span[1:]))
        answer = {"answer": context[start:end], "start": start, "end": end, "score": score}
        if self.no_answer_threshold is not None and no_answer - score > self.no_answer_threshold:
            answer = {"answer": ""}
        return answer | {"no_answer_score": no_answer - score}

    def encode(self, *texts: str | list[str], **options: bool) -> Encoding:
        """The tokens of a text, a pair of texts or a list of words. Raises: ValueError."""
        try:
            return self.tokenizer.encode(*texts, is_pretokenized=isinstance(texts[0], list), **options)
        except Exception as error:  # the library raises plain Exception, for a vocabulary without its unknown token
            raise ValueError(f"the tokenizer cannot read a text ({error})") from None

    def check_cut(self) -> None:
        """Raises ValueError if texts are to be cut on the left: words and contexts are cut on the right alone."""
        if self.settings["cut_side"] == "left":
            raise ValueError("too long: the tokenizer's truncation_side = left is not supported for this model")

    def run(self, rows: list[tuple[list[int], list[int]]], question_length: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Runs B rows of tokens and segments, so many of them at a time as memory allows.

        Returns logits, (B, labels) or (B, longest, labels), and the tokens kept (B, layers). Raises: ValueError for a
        token that the model does not know.
        """
        highest, size = max(max(token_ids) for token_ids, _ in rows), self.settings["vocab_size"]
        if highest >= size:
            token = self.tokenizer.id_to_token(highest)
            raise ValueError(f"the tokenizer gives {token!r} the id {highest}, and the model's ids end at {size - 1}")
        shape = len(rows), max(len(token_ids) for token_ids, _ in rows)
        inputs = {name: np.zeros(shape, np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
        inputs["question_length"] = np.full(len(rows), question_length)
        for i, (token_ids, segment_ids) in enumerate(rows):
            n = len(token_ids)
            inputs["input_ids"][i, :n], inputs["attention_mask"][i, :n] = token_ids, 1
            if self.settings["reads_segments"]:
                inputs["token_type_ids"][i, :n] = segment_ids
        answers = [
            self.session.run(["logits", "kept"], {name: inputs[name][i : i + ROWS] for name in self.inputs})
            for i in range(0, len(rows), ROWS)
        ]
        return tuple(np.concatenate(parts) for parts in zip(*answers))


class Classifier(Model):
    """A model that gives a text, or a pair of texts, a class or a score."""

    def __init__(self, path: str | Path, threads: int | None = None):
        """As `Model`. Raises: ValueError, also for a model that does something else."""
        super().__init__(path, threads)
        if self.head != "sequence":
            raise ValueError(f"{path}: tags words or answers questions; use Model(path).answer(record)")

    def __call__(self, texts: list[str], pairs: list[str | None] | None = None) -> list[dict[str, Any]]:
        """An answer for each text; in batches, which are faster where texts of similar length are neighbours.

        pairs: the second text of each, None where there is none. Raises: ValueError, also for another number of pairs.
        """
        columns = zip(texts, pairs or [None] * len(texts), strict=True)
        both = [[text] if pair is None else [text, pair] for text, pair in columns]
        if not all(is_text(text) for row in both for text in row):
            raise ValueError("expected strings of valid characters")
        return self.classify_texts(both) if both else []


def is_text(value: Any) -> bool:
    """Whether a value is a string of valid characters: JSON can spell half a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def first_tokens(encoding: Encoding, count: int) -> list[int]:
    """The position of the first token of each of `count` words that was not cut off.

    A word without a token of its own shares that of the next word or, at the end, the last token.
    """
    starts: dict[int, int] = {}
    for position, word in enumerate(encoding.word_ids):  # None for special tokens
        if word is not None:
            starts.setdefault(word, position)
    first, position = [], len(encoding) - 1
    for word in reversed(range(max(starts, default=-1) + 1 if encoding.overflowing else count)):
        position = starts.get(word, position)
        first.append(position)
    return first[::-1]


def visible(text: str, start: int, end: int) -> tuple[int, int]:
    """A token's characters without the blanks around them."""
    start = end - len(text[start:end].lstrip())
    return start, start + len(text[start:end].rstrip())


def best_span(offsets: np.ndarray, scores: np.ndarray, longest: int) -> list[tuple[float, int, int]]:
    """The best span of a window: [(score, first character, the one after the last)]; [] without a context.

    offsets: (n, 2), the characters of each token, both 0 outside the context. scores: (n, 2), of start and end.
    longest: how many tokens a span may have.
    """
    start, end = np.where(offsets[:, 0] < offsets[:, 1], scores.T, -np.inf)
    more = np.arange(len(end)) - np.arange(len(start))[:, None]
    sums = np.where((0 <= more) & (more < longest), start[:, None] + end, -np.inf)
    first, last = divmod(int(sums.argmax()), len(end))
    best = float(sums[first, last])
    return [] if best == -np.inf else [(best, int(offsets[first, 0]), int(offsets[last, 1]))]


def answer_lines(model: Model, lines: Iterable[str | bytes]) -> Iterator[dict[str, Any]]:
    """An answer for each line of JSON; blank lines have none. Raises: ValueError naming the line."""
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                yield model.answer(json.loads(line))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"line {number}: not JSON ({error}); expected one object per line") from None
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None


def make_record(head: str, texts: list[str]) -> dict[str, str]:
    """The texts of the command line as a record. Raises: ValueError for too many."""
    if len(texts) > len(TEXTS[head]):
        raise ValueError(f"{len(texts)} texts, but the model reads at most {len(TEXTS[head])} at once")
    return dict(zip(TEXTS[head], texts))


def main() -> None:
    parser = argparse.ArgumentParser(description="Answers texts with an exported model, without PyTorch.")
    parser.add_argument("model", help="file that `ltp.py export` wrote")
    parser.add_argument(
        "texts", nargs="*", help="a text, a pair of texts, or a question and its context; none: JSON lines on stdin"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: one for each core")
    help_text = "give questions whose no_answer_score is above it an empty answer; default: none"
    parser.add_argument("--no-answer-threshold", metavar="SCORE", type=float, help=help_text)
    options = parser.parse_intermixed_args()
    # UTF-8 cannot hold half a surrogate pair, which an id may: it becomes the escape that JSON has.
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        model = Model(options.model, options.threads, options.no_answer_threshold)
        if options.texts:
            answers = [model.answer(make_record(model.head, options.texts))]
        else:
            answers = answer_lines(model, sys.stdin.buffer)
        for answer in answers:
            print(json.dumps(answer, ensure_ascii=False), flush=True)
    except BrokenPipeError:  # nobody reads on, as after `| head`
        os._exit(1)
    except ValueError as error:
        parser.exit(2, f"Error: {error}\n")


if __name__ == "__main__":
    main()
