"""Functions that several commands of ltp.py use: they turn options into a task, data and records, and write answers.

`options` are a command's options by name, as click hands them over.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from runs.checks import describe_cut
from support.errors import InputError
from support.files import write_json
from support.process import Process, start_process
from support.program import hyphens
from tasks import find_task, own_task
from tasks.base import Source
from tasks.squad import Windows
from tools.predict import Predictor


def make_source(options: dict[str, Any]) -> Source:
    """The task and its data. Raises: InputError for options that contradict each other."""
    columns = [options[name] for name in ("text_column", "pair_column", "label_column")]
    regression, tagging = options["regression"], options["tagging"]
    if options["task"]:
        if any(columns) or regression or tagging:
            raise InputError(
                "--task knows its data; omit --text-column, --pair-column, --label-column, --regression and --tagging"
            )
        return Source(find_task(options["task"]), options["data"], options["dev_data"])
    if not options["data"]:
        raise InputError("pass --task NAME for GLUE, or --data PATH for your own data")
    if tagging and (options["pair_column"] or regression):
        raise InputError("--tagging has one text and labels; omit --pair-column and --regression")
    return Source(own_task(*columns, regression=regression, tagging=tagging), options["data"], options["dev_data"])


def check_files(source: Source | None, **files: Path | None) -> None:
    """Raises InputError for a file to write that is one of the data, or that two options name. files: by option."""
    owners = {path.resolve(): "one of the data" for path in source.files()} if source else {}
    for name, file in files.items():
        if file is not None:
            if file.resolve() in owners:
                raise InputError(f"--{name} {file}: is {owners[file.resolve()]}; choose another file")
            owners[file.resolve()] = f"that of --{name}, too"


def check_page(file: Path | None) -> None:
    """Raises InputError for a file to write that holds something else than an HTML page."""
    if file and file.is_file() and file.stat().st_size:
        with open(file, "rb") as old:
            if old.read(14).lower() != b"<!doctype html":
                raise InputError(f"--html {file}: exists and is no page; choose another file")


def make_record(restore: str, head: str, text: str, pair: str | None) -> dict[str, str]:
    """TEXT and --pair as `Predictor.answer` takes them. Raises: InputError where the model wants one text, or two."""
    if head == "span" and pair is None:
        raise InputError(f"{restore}: asks for --pair, the text to find the answer in")
    if head == "token" and pair is not None:
        raise InputError(f"{restore}: tags one text; omit --pair")
    for name, value in (("TEXT", text), ("--pair", pair)):
        if head != "sequence" and value is not None and not value.strip():
            raise InputError(f"{name}: is empty, and {restore} needs some text there")
    if head == "span":
        return {"question": text, "context": pair}
    return {"text": text} if pair is None else {"text": text, "text_pair": pair}


def report_cut(predictor: Predictor, count: int, echo: Callable[..., Any]) -> None:
    """Says how many texts were cut, if any was."""
    line = describe_cut(predictor.task, count, predictor.reader.max_length)
    if line:
        echo(line, err=True)


def start(options: dict[str, Any], seed: int = 42) -> Process:
    """Starts this process, on the device and with the precision of the options."""
    names = ("device", "precision", "threads")
    return start_process(**{name: options[name] for name in names}, seed=seed)


def start_alone(options: dict[str, Any], seed: int = 42) -> Process | None:
    """As `start`, for work that the main process does alone. Returns None on the others."""
    process = start(options, seed)
    return replace(process, world=1) if process.main else None


def write_answers(windows: Windows, logits: list[np.ndarray], predictions: Path | None, nbest: Path | None) -> None:
    """Writes the answers to questions, and the n best. logits: (n, 2) of each window."""
    files = [(predictions, windows.texts), (nbest, windows.nbest)]
    candidates = windows.find_answers(logits) if predictions or nbest else []
    for file, answers in files:
        if file:
            write_json(file, answers(candidates), indent=1, ensure_ascii=False)


def next_command(stage: str, folder: Path, options: dict[str, Any]) -> str:
    """The command that usually follows a stage, on the same data. folder: the stage's checkpoint."""
    following = {"finetune": "soft", "soft": "hard"}.get(stage, "eval")
    names = ["task", "data", "dev_data", "text_column", "pair_column", "label_column", "regression", "tagging"]
    words = ["python", "ltp.py", following]
    for name in names + (["target_flops", "distill", "distill_data"] if following == "hard" else []):
        if options[name]:
            words += [f"--{hyphens(name)}"] + ([] if options[name] is True else [str(options[name])])
    if following == "soft":
        words += ["--target-flops", "0.5", "--distill", str(folder)]
    return shlex.join([*words, "--restore", str(folder)])
