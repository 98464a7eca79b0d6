"""A stage from end to end, and the evaluation of a checkpoint: what the commands call.

`run_stage` reads like its work: check the request, load what the stage works on, prepare thresholds or rates, ask the
teacher, train.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data import Examples
from model import Config, Dense, Model, threshold_ladder, topk_rates
from runs.budget import protected_tokens, rate_for_budget, starting_thresholds
from runs.checks import (
    check_pruning,
    check_scores,
    check_task,
    describe_cut,
    describe_left_out,
    known_labels,
    length_limit,
)
from runs.folder import (
    LOG,
    RunFolder,
    check_output,
    check_same_run,
    clear_states,
    find_tensorboard,
    finished,
    whole_log,
)
from runs.teacher import ask_teacher
from support.checkpoint import folder_digest, load_config, load_model
from support.devices import for_inference, for_training
from support.errors import InputError
from support.files import cached_name, file_digest
from support.process import Process
from support.settings import PruningOptions, Settings, check_settings
from tasks.base import Source, Task
from tasks.evaluation import Evaluation, evaluate
from tasks.readers import SUFFIXES, check_file
from tasks.tokenizer import Tokenizer
from train import BUDGET_MARGIN, PRUNE_MODES, Result, Trainer, scale_thresholds, train

Show = Callable[[str], Any]
Progress = Callable[..., Any]


@dataclass
class StageRequest:
    """What the user asks of a stage."""

    stage: str  # a row of the table in train.py
    restore: Path  # the model folder to start from
    source: Source
    settings: Settings
    options: PruningOptions = field(default_factory=PruningOptions)
    output: Path | None = None  # None: see `default_output`
    overwrite: bool = False
    resume: bool = False
    tensorboard: Path | None = None  # a folder for event files
    distill: Path | None = None  # the teacher's model folder
    distill_data: Path | None = None  # a file of texts without labels, to learn the teacher's answers to


@dataclass
class Plan:
    """A checked request, and what follows from it before any example is read."""

    config: Config  # of the checkpoint
    changes: dict[str, Any]  # fields of the configuration that the stage replaces
    max_length: int
    tokenizer: Tokenizer
    folder: Path  # where the run goes
    header: dict[str, Any]  # the log's description of the run
    notes: list[str]  # what the user should know


def run_stage(
    request: StageRequest,
    process: Process = Process(),
    show: Show = lambda line: None,
    progress: Progress = lambda **state: None,
) -> tuple[Path, Result]:
    """Runs a stage. show, progress: called with a line for each evaluation, and with the state of each step.

    Returns the checkpoint's folder and what training left. A finished run that is resumed is left as it is.
    Raises: InputError; Interrupted after a signal.
    """
    plan = make_plan(request)
    if request.resume:
        result = finished_result(plan, request.settings, process)
        if result:
            show("this run has come to its end: nothing to resume")
            return plan.folder, result
    train_set, dev_sets, labels = load_examples(request, plan)
    model = prepare_model(request, plan, labels)
    if request.settings.target_flops:
        plan.notes.append(meet_target(request, model.to(process.device), train_set, process=process))
    if request.distill:
        show("asking the teacher ...")
        train_set = add_answers(train_set, request, plan, labels, process, show, progress)
    for note in plan.notes:
        show(f"note: {note}")
    show_counts(request.source.task, plan.max_length, train_set=train_set, dev_sets=dev_sets, show=show)
    model = for_training(model, process)
    trainer = Trainer(
        model,
        stage=request.stage,
        task=request.source.task,
        train_set=train_set,
        settings=request.settings,
        process=process,
    )
    with RunFolder(
        plan.folder, plan.header, process=process, show=show, progress=progress, tensorboard=request.tensorboard
    ) as run:
        # The state is passed on without a name here: it would keep a copy of the model for the whole run.
        result = train(trainer, dev_sets, run, state=run.begin(trainer, plan.tokenizer, request.resume))
        show_missed_target(request.settings.target_flops, result, show)
        return plan.folder, run.finish(result)


# ----------------------------------------------------------------------------------------------------------------------
# Checks and defaults


def make_plan(request: StageRequest) -> Plan:
    """Checks the request against the checkpoint and the output folder. Raises: InputError."""
    config, restore, task = load_config(request.restore), request.restore, request.source.task
    notes: list[str] = []
    changes = pruning_changes(request, config)
    check_pruning(config, changes)
    check_head(request, config)
    length = choose_length(request, config, notes)
    max_length = length_limit(config, restore, length)
    changes |= {"head": task.head} | ({"max_seq_length": length} if length else {})
    changes |= {} if task.head == "sequence" else {"read_dropped": False}  # a classifier's map goes with its head
    tokenizer = Tokenizer(restore)
    check_settings(request.settings)
    output = request.output
    if output is None:
        changed = replace(config, **changes)
        output = default_output(request.stage, restore, task=task, config=changed, settings=request.settings)
    check_output(output, request.overwrite, request.resume)
    if request.distill_data:
        check_distill_data(request)
    if request.tensorboard:
        find_tensorboard()  # before anything is read
    if output.resolve() in (restore.resolve(), (request.distill or restore).resolve()):
        raise InputError(f"--output {output}: is the checkpoint to start from, or the teacher; choose another")
    return Plan(
        config=config,
        changes=changes,
        max_length=max_length,
        tokenizer=tokenizer,
        folder=output,
        header=log_header(request, tokenizer) | {"read_dropped": changed_reading(config, changes)},
        notes=notes,
    )


def pruning_changes(request: StageRequest, config: Config) -> dict[str, Any]:
    """Fields of the checkpoint's configuration that the stage replaces. Raises: InputError."""
    prune_mode, options = PRUNE_MODES[request.stage], request.options
    if request.stage != "hard":
        chosen = {name: value for name, value in asdict(options).items() if value is not None}
        if "token_keep_rate" in chosen or request.settings.target_flops:
            chosen.setdefault("keep_rates", None)  # the schedule takes their place
        if request.stage == "soft" and request.settings.target_flops and request.source.task.head == "sequence":
            chosen.setdefault("read_dropped", True)
        return chosen | {"prune_mode": prune_mode}
    # Thresholds and their scale stay as soft training left them.
    if (options.max_seq_length or config.max_seq_length) != config.max_seq_length:
        raise InputError(
            f"--max-length {options.max_seq_length}: the thresholds of {request.restore} were learned with "
            f"{config.max_seq_length}, and `hard` keeps it; pass the length to `soft`"
        )
    return {"prune_mode": prune_mode}


def check_head(request: StageRequest, config: Config) -> None:
    """Raises InputError for a checkpoint without the task's head, and for options of another kind of head."""
    task = request.source.task
    if request.stage != "finetune" and config.head != task.head:
        raise InputError(f"{request.restore}: has no head for {task.title}; run `finetune` on it first")
    if request.stage != "finetune":
        check_scores(request.restore, config, task)
    if request.options.protect_question is not None and task.head != "span":
        raise InputError(f"--protect-question is for questions on texts, which {task.title} does not have")
    if request.options.read_dropped is not None and task.head != "sequence":
        option = "--read-dropped" if request.options.read_dropped else "--ignore-dropped"
        raise InputError(f"{option} is for classifiers; the head of {task.title} reads every token")


def check_distill_data(request: StageRequest) -> None:
    """Raises InputError for texts without labels that nobody answers, or that are no file of texts."""
    if not request.distill:
        raise InputError(f"--distill-data {request.distill_data}: goes with --distill, whose model answers its texts")
    if request.source.task.head != "sequence":
        raise InputError(f"--distill-data is for classifiers; {request.source.task.title} has an answer for each token")
    check_file(request.distill_data, SUFFIXES)


def choose_length(request: StageRequest, config: Config, notes: list[str]) -> int | None:
    """The max_seq_length that the stage sets; None keeps the checkpoint's.

    Fine-tuning uses the task's length where neither the user nor the checkpoint sets one. For questions it also does so
    where the checkpoint has another head: its length was not chosen for windows of contexts.
    """
    task, length = request.source.task, request.options.max_seq_length
    if length or request.stage != "finetune":
        return length
    default, saved = min(task.max_length, config.max_tokens), config.other.get("max_seq_length")
    if saved is None:
        return default
    if task.head != "span" or config.head == "span":
        return None
    if saved != default:
        notes.append(
            f"{task.title} is read in windows of {default} tokens (--max-length changes it): the max_seq_length "
            f"{saved} of {request.restore} belongs to another kind of task"
        )
    return default


def log_header(request: StageRequest, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the log says about the run besides its settings. A resumed run must say the same."""
    source = request.source
    folders = {"restore": request.restore, "distill": request.distill}
    digests = {name: folder_digest(folder) for name, folder in folders.items() if folder}
    if request.distill_data:
        digests["distill_data"] = file_digest(request.distill_data)
    header = {
        "stage": request.stage,
        "task": source.task.name,
        "data": str(source.path),
        "dev_data": str(source.dev_path) if source.dev_path else None,
        "restore": str(request.restore),
        "distill": str(request.distill) if request.distill else None,
        "distill_data": str(request.distill_data) if request.distill_data else None,
        "content": {"data": source.digest(), "tokenizer": tokenizer.identity[:16]} | digests,
        **asdict(request.options),
    }
    if source.task.name == "custom":
        header["columns"] = [source.task.text, source.task.pair, source.task.label]
        header["regression"] = source.task.regression
    return header


def changed_reading(config: Config, changes: dict[str, Any]) -> bool | None:
    """Whether the stage's head reads dropped tokens, as a log says it; None if it does as the checkpoint's does.

    The option's default has changed, so its value alone would take a run of another version for the same.
    """
    reads = changes.get("read_dropped")
    return None if reads == config.read_dropped else reads


def default_output(stage: str, restore: Path, task: Task, config: Config, settings: Settings) -> Path:
    """Where a stage writes without --output: the folders of the authors' release, and never the hub's cache."""
    base, rate = Path("checkpoints/base", task.name.replace("-", "")), Path(f"lr_{settings.learning_rate}")
    if settings.target_flops:
        rate = f"flops_{settings.target_flops}" / rate
    if stage == "soft":
        temperature, reads = f"temperature_{settings.temperature}", "read_dropped" if config.read_dropped else ""
        # Towards a target, training finds λ, and where the thresholds start.
        threshold, goal = f"rate_{config.final_token_threshold}", f"lambda_{settings.regularization}"
        parts = (temperature, reads) if settings.target_flops else (threshold, temperature, goal, reads)
        return Path(base, "absolute_threshold", *parts, rate)
    return (base if stage == "finetune" or cached_name(restore) else restore) / stage / rate


def finished_result(plan: Plan, settings: Settings, process: Process) -> Result | None:
    """The result of a run that has come to its end; None for any other. Raises: InputError if its settings differ."""
    log, ending = plan.folder / LOG, None
    if process.main and (best := finished(log)):  # other machines may not have the folder
        check_same_run(log, plan.header | {"settings": asdict(settings), "precision": process.precision})
        clear_states(plan.folder)  # a kill right after the last line left them
        _, first = whole_log(log)[0]
        ending = best, first["steps"]
    ending = process.broadcast(ending)
    return Result(*ending, seconds_per_step=math.nan, mean_seconds_per_step=math.nan) if ending else None


# ----------------------------------------------------------------------------------------------------------------------
# Examples and model


def load_examples(request: StageRequest, plan: Plan) -> tuple[Examples, dict[str, Examples], tuple[str, ...]]:
    """The training set, the evaluation sets, and the labels; () for regression. Raises: InputError."""
    source = request.source
    # Fine-tuning may change the classes of the user's own data. Later stages keep those of the checkpoint.
    labels = source.task.labels if request.stage == "finetune" else known_labels(source.task, plan.config)
    train_sets, labels = source.load("train", plan.tokenizer, plan.max_length, labels=labels)
    dev_sets, _ = source.load("dev", plan.tokenizer, plan.max_length, labels=labels)
    return train_sets[""], dev_sets, labels


def add_answers(
    train_set: Examples,
    request: StageRequest,
    plan: Plan,
    labels: tuple[str, ...],
    process: Process,
    show: Show,
    progress: Progress,
) -> Examples:
    """The training set with the teacher's logits, and with the texts that have no labels. Raises: InputError."""
    ask = partial(
        ask_teacher,
        request.distill,
        request.source,
        labels=labels,
        student=plan.tokenizer,
        max_length=plan.max_length,
        process=process,
        batch_size=request.settings.batch_size,
        show=show,
        progress=progress,
    )
    if request.distill_data is None:
        train_set.teacher = ask()
        return train_set
    more = request.source.task.load_unlabelled(request.distill_data, plan.tokenizer, plan.max_length)
    train_set.teacher, more.teacher = ask(), ask(unlabelled=request.distill_data)
    return train_set.extended(more)


def prepare_model(request: StageRequest, plan: Plan, labels: tuple[str, ...]) -> Model:
    """Loads the checkpoint with the stage's configuration and starting thresholds. Raises: InputError."""
    model, has_thresholds, notes = load_model(request.restore, labels or ("score",), new_head=True, **plan.changes)
    plan.notes += notes
    final, L = model.config.final_token_threshold, model.config.num_hidden_layers
    if request.stage == "hard" and not has_thresholds:
        raise InputError(f"{request.restore}: has no learned thresholds; run `soft` first (or `manual` for fixed ones)")
    if request.stage == "manual":
        model.thresholds.data = threshold_ladder(final, L)
    if request.stage == "soft":
        before, now = ((config.score_norm, config.max_seq_length) for config in (plan.config, model.config))
        if has_thresholds and request.options.final_token_threshold is None and before == now:
            plan.notes.append("the thresholds continue from the checkpoint")
        elif request.settings.target_flops:
            model.thresholds.data = starting_thresholds(L, request.settings.target_flops)
            plan.notes.append("the thresholds start for the target")
        else:
            model.thresholds.data = threshold_ladder(final, L)
            plan.notes.append(f"the thresholds start from {final / L:.3g} in the first layer to {final} in the last")
    return model


def meet_target(request: StageRequest, model: Model, train_set: Examples, process: Process) -> str:
    """Sets top-k's keep rate, or scales the thresholds, to the FLOPs target; returns a note. Raises: InputError."""
    target = request.settings.target_flops
    if request.stage == "topk":
        lengths, protected = torch.from_numpy(train_set.lengths), protected_tokens(model.config, train_set)
        rate = rate_for_budget(model.config, lengths, protected, target)
        model.config = replace(model.config, token_keep_rate=rate)
        shares = " ".join(f"{share:.2f}" for share in topk_rates(rate, model.config.num_hidden_layers))
        return f"the layers keep shares of {shares} of the tokens to meet the target"
    factor = scale_thresholds(model, train_set, target, process=process)
    if factor is None:
        raise InputError(f"--target-flops {target}: no multiple of the thresholds prunes so much; pass a larger one")
    return f"the thresholds are multiplied by {factor:.3f} to meet the target"


def show_counts(task: Task, max_length: int, train_set: Examples, dev_sets: dict[str, Examples], show: Show) -> None:
    """Shows how many examples there are, how long they are, and how many were cut."""
    for name, examples in (("training", train_set), *((f"evaluation{suffix}", e) for suffix, e in dev_sets.items())):
        facts = [f"{len(examples):,} {name} examples, {examples.lengths.mean():.0f} tokens each on average"]
        facts += [f"{examples.unlabelled:,} of them without labels"] if examples.unlabelled else []
        facts += [describe_cut(task, examples.truncated, max_length), describe_left_out(task, examples.left_out)]
        show("; ".join(fact for fact in facts if fact))


def show_missed_target(target: float | None, result: Result, show: Show) -> None:
    """Shows a note where the checkpoint takes other FLOPs than the target."""
    if target and abs(result.best["relative_flops"] - target) > BUDGET_MARGIN:
        show(
            f"note: the target was {target} of the dense FLOPs, but the evaluation examples take "
            f"{result.best['relative_flops']:.3f}"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@dataclass(frozen=True)
class EvaluationOptions:
    """How `eval` runs. Neither size of a batch changes the result."""

    batch_size: int = 32  # examples
    max_tokens: int | None = None  # of a batch, where it is fewer than `batch_size` examples have
    max_length: int | None = None  # texts are cut to this many tokens; None: the checkpoint's setting
    dense: bool = False  # without the checkpoint's pruning


def evaluate_checkpoint(
    folder: Path,
    source: Source,
    process: Process,
    options: EvaluationOptions = EvaluationOptions(),
    show: Show = lambda line: None,
) -> tuple[Evaluation, dict[str, Examples], dict[str, list[np.ndarray]]]:
    """Evaluates a trained model folder on the source's evaluation sets.

    Returns the evaluation, the sets by the suffix of their metrics, and each set's logits. Raises: InputError.
    """
    config = load_config(folder)
    limit = length_limit(config, folder, options.max_length)
    tokenizer = Tokenizer(folder)
    labels = check_task(folder, config, source.task)
    model, has_thresholds, notes = load_model(folder, labels or config.labels)
    if config.prune_mode == "absolute_threshold" and not has_thresholds:
        final = config.final_token_threshold
        notes.append(f"no thresholds in {folder}: using final_token_threshold · l / L, {final} · l / L")
    sets, _ = source.load("eval", tokenizer, limit, labels=labels)
    for note in notes:
        show(f"note: {note}")
    cut = describe_cut(source.task, sum(examples.truncated for examples in sets.values()), limit)
    for fact in (cut, describe_left_out(source.task, sum(examples.left_out for examples in sets.values()))):
        if fact:
            show(fact)
    model, pruner = for_inference(model, process), Dense() if options.dense else None
    evaluation, logits = evaluate(
        model,
        source.task,
        sets,
        process=process,
        batch_size=options.batch_size,
        pruner=pruner,
        max_tokens=options.max_tokens,
    )
    return evaluation, sets, logits
