"""A run's folder: checkpoint, log, states to resume from, TensorBoard.

- config.json, model.safetensors and the tokenizer's files are the best checkpoint so far, README.md is its model card;
- log.jsonl has a line for the start, for each evaluation and for the end;
- resume/step-NUMBER-DIGEST.pt are the last two states of a run that has not come to its end.
"""

from __future__ import annotations

import contextlib
import errno
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from runs.card import is_ours, write_card
from support.checkpoint import save_model
from support.errors import InputError
from support.files import DISK_FULL_TEXT, file_digest, not_written, write_file, write_text
from support.process import Process, stop_signals
from tasks.tokenizer import Tokenizer
from train import Result, Trainer

RUN_FILES = ("config.json", "model.safetensors", "log.jsonl", *Tokenizer.FILES)
LOG = "log.jsonl"
STATES = "resume"  # subfolder with the states
STATE_FILES = f"step-{9 * '[0-9]'}-{16 * '[0-9a-f]'}.pt"  # step-NUMBER-DIGEST.pt; another step-*.pt is not ours
NEEDED = {"start": ("steps",), "evaluation": ("step",)}  # what a resumed run reads of a log's record, by its event
# What the log calls the training pass of a stage.
PASSES = {"finetune": "none", "soft": "soft", "hard": "hard", "manual": "hard", "topk": "topk"}

# What a run depends on beside its settings; the log holds a digest of each.
CONTENT = {
    "data": "data",
    "restore": "a model",
    "tokenizer": "a tokenizer",
    "distill": "a teacher",
    "distill_data": "texts",
}

# ----------------------------------------------------------------------------------------------------------------------
# The folder


def check_output(folder: Path, overwrite: bool, resume: bool) -> None:
    """Raises InputError for a folder with a run that the user neither resumes nor replaces, or with another model."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder}: is a file; name a folder")
    present = [name for name in RUN_FILES if (folder / name).exists()]
    is_run = (folder / LOG).exists()  # a run begins with its log
    if not present or overwrite or resume and is_run:
        return
    if not is_run:
        raise InputError(
            f"--output {folder}: holds {present[0]} and is no run to resume; choose another, or pass --overwrite to "
            "replace it"
        )
    raise InputError(
        f"--output {folder}: already holds a run; choose another, or pass --resume to go on with it or --overwrite to "
        "replace it"
    )


def clear_output(folder: Path) -> None:
    """Removes a run's own files from its folder, and nothing else."""
    if is_ours(folder / "README.md"):
        (folder / "README.md").unlink(missing_ok=True)
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    clear_states(folder)


def clear_states(folder: Path) -> None:
    """Removes what only an unfinished run needs, and the temporary files that a kill left behind."""
    states = folder / STATES
    temporary = [path for name in (*RUN_FILES, "README.md") for path in folder.glob(f".{name}.????????")]
    temporary += [*states.glob("step.new"), *states.glob(".step.new.????????")]
    for path in (*temporary, *states.glob(STATE_FILES)):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the user's own files may be there
        states.rmdir()


# ----------------------------------------------------------------------------------------------------------------------
# The log


def append(log: Path, record: dict[str, Any]) -> None:
    """Adds a line to a log, in ASCII: UTF-8 cannot hold every path. Raises: InputError if it cannot be written."""
    try:
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise not_written(log, error) from None


def read_log(log: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the lines of a log with their records, without a last line that a kill cut short.

    Raises: OSError; ValueError for a line that is not JSON.
    """
    for line in log.read_text(encoding="utf-8").split("\n")[:-1]:
        record = json.loads(line)
        if not isinstance(record, dict) or "event" not in record:
            raise ValueError("not a record of a run")
        yield line + "\n", record


def whole_log(log: Path) -> list[tuple[str, dict[str, Any]]]:
    """All that `read_log` yields. Raises: InputError for a damaged log."""
    try:
        lines = list(read_log(log))
    except ValueError:
        raise damaged(log) from None
    if not lines or any(name not in record for _, record in lines for name in NEEDED.get(record["event"], ())):
        raise damaged(log)
    return lines


def damaged(log: Path) -> InputError:
    return InputError(f"{log}: damaged; pass --overwrite to start again, or choose another --output")


def finished(log: Path) -> dict[str, Any] | None:
    """The best record of a run that has come to its end; None for any other."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        *_, (_, last) = read_log(log)
        return last["best"] if last["event"] == "end" else None
    return None


def check_same_run(log: Path, header: dict[str, Any]) -> None:
    """Raises InputError if the log was begun with other settings than `header`.

    A log that does not exist passes. A setting of another version passes if it was off.
    """
    try:
        _, first = next(read_log(log))
    except FileNotFoundError:
        return
    except (ValueError, StopIteration):
        raise damaged(log) from None
    for name, value in sorted(first.get("settings", {}).items()):
        if name not in header["settings"] and value:
            raise InputError(
                f"{log}: the run was started by another version, with {name} = {value}, which this version does not "
                "have; pass --overwrite to start again, or choose another --output"
            )
    places = ("data", "dev_data", "restore", "distill", "distill_data") if first.get("content") else ()  # by content
    for name, value in header.items():
        new_and_off = name not in first and not value
        if name not in ("settings", "content", *places) and not new_and_off and value != first.get(name):
            raise other_setting(log, name, logged=first.get(name), current=value)
    for name, what in CONTENT.items() if places else ():  # a file may have moved, or be spelled otherwise
        if header["content"].get(name) != first["content"].get(name):
            place = "restore" if name == "tokenizer" else name
            option = f"--{place.replace('_', '-')}"
            start = f"with {what} of other content, {option} {first.get(place)}"
            if first["content"].get(name) is None:  # of the hub, or no teacher
                start = f"without {option}"
            raise InputError(
                f"{log}: the run was started {start}; give it the same again, or pass --overwrite to start again"
            )
    for name, value in header["settings"].items():
        if value != first.get("settings", {}).get(name):
            raise other_setting(log, name, logged=first.get("settings", {}).get(name), current=value)


def other_setting(log: Path, name: str, logged: Any, current: Any) -> InputError:
    """The error for a run that was started with another value."""
    return InputError(f"{log}: the run was started with {name} = {logged}, not {current}; use the same options")


def describe(record: dict[str, Any], best: bool) -> str:
    """One line on an evaluation."""
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in record["metrics"].items())
    kept = " ".join(f"{share:.2f}" for share in record["kept"])
    return (
        f"epoch {record['epoch']:.2f}  loss {record['train_loss']:.4f}  {metrics}  FLOPs {record['relative_flops']:.3f}"
        f"  kept {kept}{'  (best)' if best else ''}"
    )


# ----------------------------------------------------------------------------------------------------------------------
# States


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes a state to step-NUMBER-DIGEST.pt. The one before it stays, in case this one gets damaged.

    Raises: InputError if the file cannot be written.
    """

    def write(path: Path) -> None:
        try:
            torch.save(state, path)
        except RuntimeError as error:
            if "inline_container" not in str(error):
                raise
            raise OSError(errno.ENOSPC, DISK_FULL_TEXT) from None  # torch's writer tells of its own positions instead

    earlier = sorted(folder.glob(STATE_FILES))
    whole = folder / "step.new"
    write_file(whole, write)
    whole.replace(folder / f"step-{state['step']:09d}-{file_digest(whole)}.pt")
    for path in earlier[:-1]:
        path.unlink()


def load_state(folder: Path, show: Callable[[str], Any]) -> dict[str, Any] | None:
    """The latest undamaged state, on the CPU; None where there is none. Shows which damaged ones it passed over."""
    for path in sorted(folder.glob(STATE_FILES), reverse=True):
        if path.stem.endswith(f"-{file_digest(path)}"):
            return torch.load(path, map_location="cpu", weights_only=True)
        show(f"note: {path} is damaged; trying the one before it")
    return None


# ----------------------------------------------------------------------------------------------------------------------
# TensorBoard


def find_tensorboard() -> Any:
    """TensorBoard's writer of event files. Raises: InputError where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # not installed, or too old
        raise InputError("--tensorboard needs tensorboard, which is not installed: pip install tensorboard") from None
    return SummaryWriter


def board_values(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation under their names in TensorBoard."""
    values = {f"evaluation/{name}": value for name, value in record["metrics"].items()}
    values |= {f"evaluation/{name}": record[name] for name in ("score", "loss", "relative_flops")}
    for name in ("kept", "thresholds"):
        values |= {f"{name}/layer_{l:02d}": value for l, value in enumerate(record[name] or [], 1)}
    return values


# ----------------------------------------------------------------------------------------------------------------------
# The run


@dataclass
class RunFolder:
    """A training run that leaves a folder: the `Run` of train.py.

        with RunFolder(folder, header, process, show, progress, tensorboard) as run:
            result = run.finish(train(trainer, dev_sets, run, run.begin(trainer, tokenizer, resume)))

    header: what the run is. `begin` adds pass, settings, number of examples and precision; a resumed run must have the
    same. Inside `with`, Ctrl-C and SIGTERM are caught. The main process alone writes.
    """

    folder: Path
    header: dict[str, Any]
    process: Process = Process()
    show: Callable[[str], Any] = lambda line: None
    progress: Callable[..., Any] = lambda **state: None
    tensorboard: Path | None = None  # a folder for event files

    best: dict[str, Any] | None = field(default=None, init=False)  # the record of the checkpoint, as the log holds it
    elapsed: float = field(default=0.0, init=False)  # seconds of training before this process took over
    board: Any = field(default=None, init=False)  # TensorBoard's writer

    def __enter__(self) -> RunFolder:
        self.resources = contextlib.ExitStack()
        self.signals = self.resources.enter_context(stop_signals())
        return self

    def __exit__(self, *error: Any) -> None:
        self.resources.close()

    @property
    def log(self) -> Path:
        return self.folder / LOG

    @property
    def seconds(self) -> float:
        """Seconds of training and evaluation, over all parts of the run."""
        return self.elapsed + time.perf_counter() - self.started

    def begin(self, trainer: Trainer, tokenizer: Tokenizer, resume: bool = False) -> dict[str, Any] | None:
        """Starts the folder's files, or goes on with them: returns the state for `train`, None for the beginning.

        Raises: InputError if the run to resume had other settings.
        """
        self.header = {
            "event": "start",
            **self.header,
            "pruning": PASSES[trainer.stage],
            "settings": asdict(trainer.settings),
            "examples": len(trainer.train_set),
            "unlabelled": trainer.train_set.unlabelled,
            "precision": self.process.precision,
        }
        state = self.find_state() if resume else None
        if state:
            self.go_on(state)
        elif self.process.main:
            self.start_log(trainer, tokenizer)
        if self.tensorboard and self.process.main:
            # Events after the state will be written again.
            first = state["step"] + 1 if state else 1
            self.board = self.resources.enter_context(find_tensorboard()(str(self.tensorboard), purge_step=first))
        self.started = time.perf_counter()
        return state

    def find_state(self) -> dict[str, Any] | None:
        """The main process's latest state, on every process.

        Raises: InputError for another run's log, and for a trained run that has lost its states.
        """
        check_same_run(self.log, self.header)
        state = None
        if self.process.main and self.log.exists():
            state = load_state(self.folder / STATES, self.show)
            # A kill between the first checkpoint and its state leaves one evaluation, which may be run again.
            if state is None and sum(record["event"] == "evaluation" for _, record in whole_log(self.log)) > 1:
                raise InputError(
                    f"{self.folder}: holds a trained checkpoint, and no whole state in {STATES}/ to go on from; pass "
                    "--overwrite to start again, or choose another --output"
                )
        state = self.process.broadcast(state)
        beginning = "no earlier run to go on with: starting from the beginning"
        self.show(f"resuming after step {state['step']}" if state else beginning)
        return state

    def go_on(self, state: dict[str, Any]) -> None:
        """Takes over from an earlier process, and removes the log's lines after the state: they will come again."""
        self.best, self.elapsed = state["best"], state["elapsed"]
        if len(state["random"]) != self.process.world:
            count = "1 process" if self.process.world == 1 else f"{self.process.world} processes"
            self.show(f"note: {count} instead of {len(state['random'])}: the same data order, other dropout")
        if self.process.main:
            lines = [
                line
                for line, record in whole_log(self.log)
                if record["event"] == "start" or record["step"] < state["step"] + (not state["due"])
            ]
            write_text(self.log, "".join(lines))

    def start_log(self, trainer: Trainer, tokenizer: Tokenizer) -> None:
        """Clears the folder of an earlier run, and writes the log's first line and the tokenizer's files."""
        clear_output(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        pruned = trainer.model.config.prune_mode == "absolute_threshold"
        conditions = {
            "steps": trainer.steps,
            "thresholds": trainer.model.thresholds.tolist() if pruned else None,
            "processes": self.process.world,
            "device": str(self.process.device),
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        append(self.log, self.header | conditions)
        for name, content in tokenizer.files.items():
            write_file(self.folder / name, lambda path: path.write_bytes(content))

    # What train.py calls

    @property
    def stop_signal(self) -> int | None:
        return self.signals[0] if self.signals else None

    def note(self, trainer: Trainer, loss: float, best: dict[str, Any] | None) -> None:
        rate = trainer.optimizer.param_groups[0]["lr"]
        self.write_board(trainer.completed, {"train/loss": loss, "train/learning_rate": rate})
        score, flops = (best and best[name] for name in ("score", "relative_flops"))
        self.progress(step=trainer.completed, steps=trainer.steps, loss=loss, score=score, flops=flops)

    def record(self, trainer: Trainer, record: dict[str, Any], saved: bool) -> None:
        """Writes the checkpoint, its card, the line of the log, TensorBoard's numbers, in this order, then shows it."""
        record = {"event": "evaluation"} | record | {"elapsed": self.seconds}
        self.best = record if saved else self.best
        if self.process.main:
            if saved:
                save_model(self.folder, trainer.model)
                write_card(self.folder, trainer.model.config, header=self.header, record=record)
            append(self.log, record | {"saved": saved})
        self.write_board(trainer.completed, board_values(record))
        self.show(describe(record, saved and trainer.settings.load_best))

    def save_state(self, state: dict[str, Any]) -> None:
        if self.process.main:
            save_state(self.folder / STATES, state | {"best": self.best, "elapsed": self.seconds})

    def last_checkpoint(self) -> str:
        return f"The last good checkpoint is in {self.folder}" if self.best else "No checkpoint was saved yet"

    # The end

    def write_board(self, step: int, values: dict[str, float]) -> None:
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def finish(self, result: Result) -> Result:
        """Writes the last line of the log, removes the states. Returns the result, whose best record is the log's."""
        if self.process.main:
            append(self.log, {"event": "end", "best": self.best})
            clear_states(self.folder)
        self.process.broadcast(None)  # nobody reads the folder before it is whole
        return replace(result, best=self.best)
