"""Answers texts with a model that `ltp.py export` wrote, without PyTorch: numpy, onnxruntime and tokenizers.

    python -m pip install -r serving/requirements.txt
    python serving/serve.py model.onnx "a gripping film"
    python serving/serve.py model.onnx "one sentence" "another one"
    python serving/serve.py model.onnx < texts.jsonl > answers.jsonl

A line of JSON is {"text": ...}, with "text_pair" and "id" where there are any. An answer is what `ltp.py predict`
gives. The file is enough: it holds the graph, the tokenizer and the names of the classes. In a program of your own:

    from serve import Classifier
    answers = Classifier("model.onnx")(["a gripping film", "a dull one"])
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class Classifier:
    """A model that gives a text, or a pair of texts, a class or a score."""

    def __init__(self, path: str | Path, threads: int | None = None):
        """threads: of the CPU; default: one for each core. Raises: ValueError for a file that is no such model."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library has a class for each reason, all of Exception alone
            raise ValueError(f"{path}: not a graph that ONNX Runtime can run ({str(error).splitlines()[0]})") from None
        metadata = self.session.get_modelmeta().custom_metadata_map
        if "settings" not in metadata:
            raise ValueError(f"{path}: holds no tokenizer; write it again with `ltp.py export`")
        self.settings, self.labels = json.loads(metadata["settings"]), json.loads(metadata["labels"])
        if self.settings["head"] != "sequence":
            raise ValueError(f"{path}: tags words or answers questions; use `ltp.py predict --restore {path}`")
        self.tokenizer = Tokenizer.from_str(metadata["tokenizer"])
        self.tokenizer.enable_truncation(self.settings["max_length"], direction=self.settings["cut_side"])
        self.inputs = [node.name for node in self.session.get_inputs()]

    def __call__(self, texts: list[str], pairs: list[str | None] | None = None) -> list[dict[str, Any]]:
        """An answer for each text: its class or score, the logits, its tokens, and those that left each layer.

        pairs: the second text of each, None where there is none.
        """
        pairs = [None] * len(texts) if pairs is None else pairs
        encodings = self.tokenizer.encode_batch([t if p is None else (t, p) for t, p in zip(texts, pairs)])
        return [self.answer(encoding.ids, encoding.type_ids) for encoding in encodings]

    def answer(self, token_ids: list[int], segment_ids: list[int]) -> dict[str, Any]:
        """The answer for the tokens of one text."""
        segment_ids = segment_ids if self.settings["reads_segments"] else [0] * len(token_ids)
        values = {"input_ids": token_ids, "token_type_ids": segment_ids}
        logits, kept = self.session.run(["logits", "kept"], {name: np.array([values[name]]) for name in self.inputs})
        label = self.labels[int(logits[0].argmax())] if len(self.labels) > 1 else float(logits[0, 0])
        return {"label": label, "logits": logits[0].tolist(), "tokens": len(token_ids), "kept": kept.tolist()}


def answer_lines(classifier: Classifier, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """An answer for each line of JSON. Raises: ValueError naming the line."""
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            texts, pairs = [record["text"]], [record.get("text_pair")]
            if not isinstance(texts[0], str) or not isinstance(pairs[0], str | None):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f'line {number}: expected {{"text": "..."}}, with "text_pair" for pairs') from None
        yield ({"id": record["id"]} if "id" in record else {}) | classifier(texts, pairs)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Answers texts with an exported model, without PyTorch.")
    parser.add_argument("model", help="what `ltp.py export` wrote")
    parser.add_argument("text", nargs="?", help="a text; without one, lines of JSON are read from standard input")
    parser.add_argument("pair", nargs="?", help="the second text of a pair")
    parser.add_argument("--threads", type=int, help="of the CPU; default: one for each core")
    options = parser.parse_args()
    try:
        classifier = Classifier(options.model, options.threads)
        texts = [options.text], [options.pair]
        for answer in answer_lines(classifier, sys.stdin) if options.text is None else classifier(*texts):
            print(json.dumps(answer, ensure_ascii=False), flush=True)
    except ValueError as error:
        parser.exit(2, f"Error: {error}\n")


if __name__ == "__main__":
    main()
