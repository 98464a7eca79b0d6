"""Learned Token Pruning from the command line. `python ltp.py --help` lists the commands."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from data import (
    FINAL_TOKEN_THRESHOLD,
    MAX_SEQ_LENGTH,
    QUESTION_LENGTH,
    STAGES,
    TASKS,
    TOKEN_KEEP_RATE,
    InputError,
    Interrupted,
    Settings,
    plural,
    soft_target,
)

# Everything that needs torch is imported inside the commands, so that --help answers at once.


class Program(click.Group):
    """Turns bad input into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (InputError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            failure = click.ClickException(str(error))
            failure.exit_code = 2
            raise failure from None
        except RuntimeError as error:
            # What the others see when one process of several fails: they have nothing to add to its error.
            if (
                not re.search("connection (closed|reset|refused)|aborted", str(error), re.IGNORECASE)
                or not distributed()
            ):
                raise
            raise click.ClickException("stopped, because another process failed: see its error") from None
        except Interrupted as error:
            click.echo(str(error), err=True)
            ctx.exit(128 + error.number)
        finally:
            if distributed():
                sys.modules["torch"].distributed.destroy_process_group()


def distributed() -> bool:
    """Whether this is one process of several; without importing torch for it."""
    return "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()


def spelling(name: str) -> str:
    """Underscores are as good as hyphens: the authors' --save_step, today's --save-step."""
    return name.replace("_", "-")


@click.group(
    cls=Program,
    context_settings={
        "token_normalize_func": spelling,
        "help_option_names": ["-h", "--help"],
        "max_content_width": 110,
    },
)
def main() -> None:
    """Learned Token Pruning (LTP): make a RoBERTa-class model cheaper by dropping tokens nobody looks at.

    \b
    The usual way:   finetune  ->  soft (learns the thresholds)  ->  hard (drops the tokens, adapts the weights)
    The baselines:   finetune  ->  topk,   finetune  ->  manual
    Try it first:    demo (no data, no network, a few minutes on a CPU)

    Each command's --help tells what it does and what its options mean.
    """


def apply(command: Any, options: list[Any]) -> Any:
    for option in reversed(options):
        command = option(command)
    return command


def machine_options(command: Any) -> Any:
    return apply(
        command,
        [
            click.option("--device", metavar="NAME", help="cpu, cuda or cuda:N.  [default: cuda where there is any]"),
            click.option(
                "--precision",
                type=click.Choice(["fp32", "bf16"]),
                help="Of the matrix products; scores and thresholds stay fp32.  [default: bf16 on CUDA, else fp32]",
            ),
            click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: torch's choice]"),
        ],
    )


def data_options(command: Any) -> Any:
    return apply(
        command,
        [
            click.option(
                "--task",
                help=f"{', '.join(TASKS)} (SST2 and STSB are understood). Omit it to use your own data.",
            ),
            click.option(
                "--data",
                type=click.Path(path_type=Path),
                metavar="PATH",
                help="A folder with train.* and dev.*, or one file: GLUE's TSV, .csv, .tsv, .jsonl or .parquet, of SQuAD "
                "also .json, for --tagging also .conll.  [default: the hub's]",
            ),
            click.option(
                "--dev-data",
                type=click.Path(path_type=Path),
                metavar="FILE",
                help="The evaluation file, where --data is a file or holds none.",
            ),
            click.option("--text-column", metavar="NAME", help="Column of the text in your own data.  [default: text]"),
            click.option("--pair-column", metavar="NAME", help="Column of the second text, where there is one."),
            click.option("--label-column", metavar="NAME", help="Column of the class or score.  [default: label]"),
            click.option("--regression", is_flag=True, help="Your labels are scores, not classes."),
            click.option(
                "--tagging",
                is_flag=True,
                help='Your data are tagged words: CoNLL files, or JSONL or Parquet with lists, {"words": […], "labels": '
                "[…]}.",
            ),
            click.option(
                "--max-length",
                "max_seq_length",
                type=click.IntRange(2),
                help="Cut texts, or questions with a part of their context, to this many tokens.  [default: the "
                f"checkpoint's, else {MAX_SEQ_LENGTH}; {QUESTION_LENGTH} for questions]",
            ),
        ],
    )


restore_option = click.option(
    "--restore",
    required=True,
    metavar="CKPT",
    help="Model folder (Hugging Face layout), or a name on the hub (name@revision).",
)

# Settings that only mean something where thresholds are learned.
SOFT_ONLY = {
    "regularization",
    "temperature",
    "temperature_end",
    "mask_attention",
    "mask_floor",
    "threshold_learning_rate",
    "threshold_weight_decay",
}
PRUNED_ONLY = {"target_flops", "distill_weight"}


def settings_options(stage: str) -> Any:
    """The options of a stage, made from the fields of `Settings`."""

    def decorate(command: Any) -> Any:
        options = []
        for setting in fields(Settings):
            if setting.name in SOFT_ONLY and stage != "soft" or setting.name in PRUNED_ONLY and stage == "finetune":
                continue
            metadata = dict(setting.metadata)
            help, flags = metadata.pop("help"), metadata.pop("flags") or (f"--{setting.name.replace('_', '-')}",)
            default = STAGES[stage].get(setting.name, setting.default)
            options.append(
                click.option(
                    *flags, setting.name, default=default, help=help, show_default=default is not None, **metadata
                )
            )
        return apply(command, options)

    return decorate


output_options = [
    click.option(
        "--output",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Where the checkpoint goes.  [default: see above]",
    ),
    click.option("--overwrite", is_flag=True, help="Replace the run that the output folder holds."),
    click.option(
        "--resume",
        is_flag=True,
        help="Go on with the interrupted run that the output folder holds; without one, start.",
    ),
    click.option(
        "--tensorboard",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Write losses, scores, FLOPs and thresholds for TensorBoard, too (needs tensorboard).",
    ),
]
THRESHOLD = click.option(
    "--final-token-threshold",
    "--threshold",
    type=float,
    metavar="θ",
    help=f"Of the last layer; layer l of L gets θ·l/L.  [default: the checkpoint's, else {FINAL_TOKEN_THRESHOLD}]",
)
KEEP_RATE = click.option(
    "--token-keep-rate",
    type=float,
    metavar="R",
    help=f"Share kept in the last layer; negative is steeper.  [default: the checkpoint's, else {TOKEN_KEEP_RATE}]",
)
SCORE_NORM = click.option(
    "--score-norm",
    type=click.Choice(["max_length", "length"]),
    help="What scores are averaged over: the --max-length (as the authors) or the text's own length (as the paper's "
    "formula).  [default: the checkpoint's, else max-length]",
)


PROTECT = click.option(
    "--protect-question/--prune-question",
    default=None,
    help="SQuAD: whether the question's tokens are safe from pruning.  [default: the checkpoint's, else they are not]",
)
MAX_TOKENS = click.option(
    "--max-tokens", type=click.IntRange(1), help="Tokens run together, where that is fewer than --batch-size texts."
)
DISTILL = click.option(
    "--distill",
    metavar="CKPT",
    help="Learn from the answers of this model too, usually the unpruned fine-tuned one. They are kept in the cache of "
    "`datasets`, as answers-*.safetensors.",
)


def stage_command(stage: str, *extra: Any) -> Any:
    """Registers a training stage: its options, and the call."""

    def decorate(function: Any) -> Any:
        def callback(**given: Any) -> None:
            run_stage_command(stage, given)

        callback.__doc__ = function.__doc__
        command = apply(
            callback, [restore_option, data_options, *extra, settings_options(stage), *output_options, machine_options]
        )
        return main.command(stage)(command)

    return decorate


@stage_command("finetune")
def finetune() -> None:
    """Plain fine-tuning, no pruning: the first step, and the dense model to compare with.

    \b
    python ltp.py finetune --task MRPC --restore roberta-base
    python ltp.py finetune --restore roberta-base --data reviews.csv --dev-data reviews-dev.csv --text-column body

    Writes checkpoints/base/TASK/finetune/lr_LR. A small model wants a higher rate and more epochs than RoBERTa-base.
    """


@stage_command("soft", THRESHOLD, SCORE_NORM, PROTECT, DISTILL)
def soft() -> None:
    """Learn the thresholds together with the weights (first stage of LTP).

    Every layer's output is multiplied by the soft mask σ((score - θ) / τ), and λ · (share of tokens kept, summed over the
    layers) is added to the loss. No token is dropped yet, so this stage costs as much as fine-tuning. Evaluation shows what
    dropping would do. Follow with `hard`.

    With --target-flops the thresholds start where they meet the target, λ, now the weight of the FLOPs, is found while
    training, and the thresholds are scaled once more at the end. Defaults are then --mask-attention, --mask-floor 0.02,
    --temperature 1e-3, --temperature-end 2e-4 and --lr-threshold 1e-4 (the last three at 128 tokens, in proportion to
    1 / max length).

    \b
    python ltp.py soft --task MRPC --restore checkpoints/base/MRPC/finetune/lr_2e-05 --lambda 0.1
    python ltp.py soft --task MRPC --restore checkpoints/base/MRPC/finetune/lr_2e-05 --target-flops 0.5

    Writes checkpoints/base/TASK/absolute_threshold/rate_θ/temperature_τ/lambda_λ/lr_LR (or .../flops_TARGET/lr_LR).
    """


@stage_command("hard", DISTILL)
def hard() -> None:
    """Drop tokens by the learned thresholds, now frozen, and adapt the weights (second stage of LTP).

    A token whose score falls below its layer's threshold is gone from the next product on, so each step is cheaper than a
    dense one. With --target-flops the thresholds' common scale follows the target at every evaluation.

    \b
    python ltp.py hard --task MRPC --restore CKPT_of_soft --lr 1e-5

    Writes CKPT/hard/lr_LR.
    """


@stage_command("topk", KEEP_RATE, PROTECT, DISTILL)
def topk() -> None:
    """Baseline: keep a fixed share of each text's tokens in each layer, the highest scores (SpAtten's schedule).

    The first max(3, 15% of L) layers keep all, then the share falls linearly to --token-keep-rate in the last layer.

    \b
    python ltp.py topk --task MRPC --restore CKPT_of_finetune --token-keep-rate 0.2

    Writes CKPT/topk/lr_LR.
    """


@stage_command("manual", THRESHOLD, SCORE_NORM, PROTECT, DISTILL)
def manual() -> None:
    """Baseline: fixed thresholds θ·l/L that are never learned, tokens dropped from the start.

    \b
    python ltp.py manual --task MRPC --restore CKPT_of_finetune --final-token-threshold 0.01

    Writes CKPT/manual/lr_LR.
    """


def run_stage_command(stage: str, given: dict[str, Any]) -> None:
    if given["overwrite"] and given["resume"]:
        raise click.UsageError("--resume goes on with a run and --overwrite replaces it; pass one of them")
    if given.get("target_flops") and given.get("final_token_threshold") is not None:
        raise click.UsageError("--target-flops finds the height of the thresholds by itself; pass it or --threshold")
    if given.get("target_flops") and given.get("token_keep_rate") is not None:
        raise click.UsageError("--target-flops finds the keep rate by itself; pass it or --token-keep-rate")
    if stage == "soft" and given["target_flops"]:
        from model import find_model, load_config

        length = given["max_seq_length"] or load_config(find_model(given["restore"])).max_seq_length
        source_of = click.get_current_context().get_parameter_source
        if source_of("regularization") != ParameterSource.DEFAULT:
            raise click.UsageError("--target-flops finds λ by itself; pass it or --lambda")
        given |= {k: v for k, v in soft_target(length).items() if source_of(k) == ParameterSource.DEFAULT}
    settings = Settings(**(STAGES[stage] | {f.name: given.pop(f.name) for f in fields(Settings) if f.name in given}))
    source = make_source(given)
    with screen() as (show, progress):
        show("loading ...")
        from model import find_model
        from train import PruningOptions, check_settings, run_stage, start_process

        check_settings(settings)
        process = start_process(given["device"], given["precision"], given["threads"], settings.seed)
        show, progress = (show, progress) if process.main else (quiet, quiet)
        options = PruningOptions(**{f.name: given[f.name] for f in fields(PruningOptions) if f.name in given})
        folder, result = run_stage(
            stage,
            find_model(given["restore"]),
            source,
            settings,
            options,
            given["output"],
            given["overwrite"],
            given["resume"],
            process,
            show,
            progress,
            given["tensorboard"],
            find_model(given["distill"], "--distill") if given.get("distill") else None,
        )
    if process.main:
        evaluation_table([(stage, result.best)])
        time = "" if math.isnan(result.seconds_per_step) else f", {result.seconds_per_step:.3f} s each (median)"
        click.echo(f"{plural(result.steps, 'step')}{time}. Checkpoint: {folder}")
        following = {"finetune": "soft", "soft": "hard"}.get(stage, "eval")
        given["target_flops"] = settings.target_flops
        same = ("task", "data", "dev_data", "text_column", "pair_column", "label_column")
        same += ("target_flops", "distill") if following == "hard" else ()
        words = [w for name in same if given[name] for w in (f"--{name.replace('_', '-')}", str(given[name]))]
        words += ["--regression"] * given["regression"] + ["--tagging"] * given["tagging"] + ["--restore", str(folder)]
        click.echo(f"Next: python ltp.py {following} {shlex.join(words)}")


def make_source(given: dict[str, Any]) -> Any:
    """The task and its data from the options. Raises: InputError."""
    from data import Source, custom_task, find_task

    columns = [given[name] for name in ("text_column", "pair_column", "label_column")]
    if given["task"]:
        if any(columns) or given["regression"] or given["tagging"]:
            raise InputError(
                "--task knows its data; omit --text-column, --pair-column, --label-column, --regression and --tagging"
            )
        return Source(find_task(given["task"]), given["data"], given["dev_data"])
    if not given["data"]:
        raise InputError("pass --task NAME for GLUE, or --data PATH for your own data")
    if given["tagging"] and (given["pair_column"] or given["regression"]):
        raise InputError("--tagging has one text and labels; omit --pair-column and --regression")
    return Source(custom_task(*columns, given["regression"], given["tagging"]), given["data"], given["dev_data"])


def check_files(source: Any, **files: Path | None) -> None:
    """Raises InputError for an output, by the name of its option, that is a file of the data, or another output."""
    taken = {path.resolve(): "one of the data" for path in source.files()} if source else {}
    for name, file in files.items():
        if file is not None:
            if file.resolve() in taken:
                raise InputError(f"--{name} {file}: is {taken[file.resolve()]}; choose another file")
            taken[file.resolve()] = f"that of --{name}, too"


@main.command("eval")
@restore_option
@data_options
@click.option(
    "--batch-size", "--bs", default=32, show_default=True, type=click.IntRange(1), help="Examples run together."
)
@MAX_TOKENS
@click.option("--dense", is_flag=True, help="Ignore the checkpoint's pruning.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the result there too.",
)
@click.option(
    "--predictions",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help='SQuAD: write each question\'s answer, {"id": "text"}, as the official script reads it.',
)
@click.option(
    "--nbest",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="SQuAD: write each question's best answers with their places, scores and probabilities (among these and \"no "
    'answer"), and no_answer_score: how much better "no answer" scores than the best of them.',
)
@machine_options
def eval_command(**given: Any) -> None:
    """Evaluate a checkpoint: metrics, FLOPs beside dense, tokens kept in each layer.

    \b
    python ltp.py eval --task MRPC --restore CKPT --json result.json

    FLOPs are the encoder layers' (embeddings and head are not counted), 2 per multiply-accumulate, by the formula
    4·D²·n_in + 2·D·n_in² + 2·D·F·n_out per layer, n_in before and n_out after pruning.

    Of SQuAD 2.0, best_f1 is reached with best_f1_threshold as the --no-answer-threshold of `predict`.
    """
    source = make_source(given)
    check_files(source, json=given["json_file"], predictions=given["predictions"], nbest=given["nbest"])
    from model import find_model, write_file
    from train import evaluate_checkpoint, start_process

    if (given["predictions"] or given["nbest"]) and source.task.head != "span":
        raise InputError(
            f"--predictions and --nbest are for questions on texts, which {source.task.title} does not have"
        )
    process = start_process(given["device"], given["precision"], given["threads"])
    show = (lambda line: click.echo(line, err=True)) if process.main else quiet

    def collect(examples: Any, logits: Any) -> None:
        files = ((given["predictions"], "texts"), (given["nbest"], "nbest"))
        wanted = [(file, content) for file, content in files if file and process.main]
        found = examples.find(logits) if wanted else None
        for file, content in wanted:
            text = json.dumps(getattr(examples, content)(found), indent=1, ensure_ascii=False) + "\n"
            write_file(file, lambda path: path.write_text(text, encoding="utf-8"))

    evaluation = evaluate_checkpoint(
        find_model(given["restore"]),
        source,
        process,
        given["batch_size"],
        given["max_seq_length"],
        given["dense"],
        show,
        given["max_tokens"],
        collect,
    )
    if not process.main:
        return
    record = {"task": source.task.name} | vars(evaluation)
    evaluation_table([("dense" if given["dense"] else "eval", record)])
    if given["json_file"]:
        write_file(given["json_file"], lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))


@main.command()
@restore_option
@data_options
@click.option(
    "--lengths", metavar="N,N,…", help="Instead of data: random tokens, each sequence of one of these lengths."
)
@click.option("--examples", default=256, show_default=True, type=click.IntRange(1), help="How many to time.")
@click.option(
    "--batch-size",
    "--bs",
    "batch_sizes",
    multiple=True,
    default=(1, 32),
    show_default=True,
    type=click.IntRange(1),
    help="May be given several times.",
)
@click.option(
    "--repeats", default=5, show_default=True, type=click.IntRange(1), help="Timed passes, after one to warm up."
)
@click.option("--seed", default=42, show_default=True, type=click.IntRange(0, 2**31), help="Of the choice of examples.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the figures there too.",
)
@click.option("--card", is_flag=True, help="Add the figures to the checkpoint's model card, README.md.")
@machine_options
def bench(**given: Any) -> None:
    """Measure a checkpoint's speed: pruned beside dense, in turn in one run, medians after a warm-up.

    \b
    python ltp.py bench --restore CKPT --task MRPC --data glue/
    python ltp.py bench --restore CKPT --lengths 32,64,128 --batch-size 1 --batch-size 64

    "FLOPs into time" is the measured speed-up over the FLOPs reduction by the formula of `eval`. Dense runs have the
    last layer's saving too (only the first token is computed there), which the formula leaves out, and gain more by it;
    "done" is the reduction with the saving counted in both.
    """
    if bool(given["lengths"]) == bool(given["task"] or given["data"]):
        raise click.UsageError("pass --task or --data, or else --lengths")
    try:
        lengths = [int(n) for n in given["lengths"].split(",")] if given["lengths"] else None
    except ValueError:
        lengths = [0]
    if lengths and min(lengths) < 1:
        raise click.UsageError(f"--lengths {given['lengths']}: expected whole numbers of at least 1, with commas")
    source = None if lengths else make_source(given)
    check_files(source, json=given["json_file"])
    from card import add_speed, check_card
    from model import find_model, write_file
    from train import bench_checkpoint, start_process

    process = start_process(given["device"], given["precision"], given["threads"], given["seed"])
    folder = find_model(given["restore"])
    if given["card"]:
        check_card(folder)
    result = bench_checkpoint(
        folder,
        source,
        lengths,
        given["examples"],
        list(given["batch_sizes"]),
        given["repeats"],
        process,
        given["max_seq_length"],
        given["seed"],
    )
    if not process.main:
        return
    speed_table(result)
    if given["json_file"]:
        write_file(given["json_file"], lambda path: path.write_text(json.dumps(result, indent=2) + "\n"))
    if given["card"]:
        add_speed(folder, result)


@main.command()
@click.argument("text", required=False)
@click.option("--restore", required=True, metavar="CKPT", help="Model folder, or a name on the hub (name@revision).")
@click.option("--pair", metavar="TEXT", help="The second text, for a task on pairs.")
@click.option(
    "--input",
    "input_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help='JSON lines {"text": …}, {"text": …, "text_pair": …} or {"token_ids": […]}; {"words": […]} of a tagger; '
    '{"question": …, "context": …}. Any may have an "id", which its answer repeats.',
)
@click.option(
    "--output",
    "output_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Where the answers go.  [default: standard output]",
)
@click.option("--batch-size", "--bs", default=32, show_default=True, type=click.IntRange(1), help="Lines run together.")
@MAX_TOKENS
@click.option(
    "--no-answer-threshold",
    type=float,
    metavar="T",
    help="Questions: answer nothing where no_answer_score is above T; 0 takes what is likelier, `eval` tells the best for "
    "its data.  [default: always answer]",
)
@click.option(
    "--max-length",
    "max_seq_length",
    type=click.IntRange(2),
    help="Cut texts to this many tokens.  [default: the checkpoint's]",
)
@click.option("--dense", is_flag=True, help="Ignore the checkpoint's pruning.")
@machine_options
def predict(text: str | None, **given: Any) -> None:
    """Classify TEXT, tag its words, or answer it from the text in --pair; or so for each line of a file, in order, in
    memory that does not grow with the file.

    \b
    python ltp.py predict --restore CKPT "a gripping, funny film"
    python ltp.py predict --restore CKPT --input texts.jsonl --output answers.jsonl
    python ltp.py predict --restore CKPT_of_SQuAD "Who wrote it?" --pair "It was written by Ada Berg in 1912."

    An answer is {"label": …, "logits": […], "tokens": N, "kept": [tokens leaving each layer]}.

    Of a tagger it is {"words", "labels", …}. The words of a TEXT stand between blanks; {"words": […]} says them itself.
    Words beyond --max-length are not read, and their label is null.

    Of a question it is {"answer", "start", "end", "score", "no_answer_score", "windows", …}. Places are in characters,
    no_answer_score is how much better "no answer" scores, tokens and kept are summed over the windows.
    """
    if (text is None) == (given["input_file"] is None):
        raise click.UsageError("pass either TEXT or --input FILE")
    if text is not None and given["output_file"] or text is None and given["pair"] is not None:
        raise click.UsageError("--pair goes with TEXT, and --output with --input")
    if text is None and not given["input_file"].is_file():
        raise InputError(f"--input {given['input_file']}: no such file")
    from model import find_model
    from train import Predictor, predict_file, start_process

    process = start_process(given["device"], given["precision"], given["threads"])
    predictor = Predictor(
        find_model(given["restore"]),
        process,
        given["batch_size"],
        given["max_seq_length"],
        given["dense"],
        given["max_tokens"],
        given["no_answer_threshold"],
    )
    head = predictor.model.config.head
    if given["no_answer_threshold"] is not None and head != "span":
        raise InputError(f"--no-answer-threshold is for questions on texts, which {given['restore']} does not answer")
    if text is not None:
        record = make_record(given["restore"], head, text, given["pair"])
        answer = json.dumps(predictor.answer([("TEXT", record)])[0], ensure_ascii=False)
        if process.main:
            click.echo(answer)
        cut = predictor.truncated
    else:
        with screen() as (_, progress):
            progress = progress if process.main else quiet
            count = predict_file(predictor, given["input_file"], given["output_file"], progress)
        cut = sum(process.gather(predictor.truncated))
        if process.main:
            click.echo(f"{count:,} lines answered", err=True)
    if cut and process.main:
        click.echo(f"{cut:,} longer than {predictor.max_length} tokens were cut", err=True)


def make_record(restore: str, head: str, text: str, pair: str | None) -> dict[str, str]:
    """TEXT and --pair as `Predictor.answer` takes them. Raises: InputError where the model wants one text, or two."""
    if head == "span" and pair is None:
        raise InputError(f"{restore}: asks for --pair, the text to find the answer in")
    if head == "token" and pair is not None:
        raise InputError(f"{restore}: tags one text; omit --pair")
    for name, given in (("TEXT", text), ("--pair", pair)):
        if head != "sequence" and given is not None and not given.strip():
            raise InputError(f"{name}: is empty, and {restore} needs some text there")
    if head == "span":
        return {"question": text, "context": pair}
    return {"text": text} if pair is None else {"text": text, "text_pair": pair}


@main.command()
@click.argument("texts", metavar="TEXT...", nargs=-1, required=True)
@click.option("--restore", required=True, metavar="CKPT", help="Model folder, or a name on the hub (name@revision).")
@click.option(
    "--pair",
    "pairs",
    metavar="TEXT",
    multiple=True,
    help="The second text, for a task on pairs, or the one that holds a question's answer: one per TEXT.",
)
@click.option(
    "--html",
    "html_file",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a page to look at instead: one file, no network.",
)
@click.option(
    "--max-length",
    "max_seq_length",
    type=click.IntRange(2),
    help="Cut texts to this many tokens.  [default: the checkpoint's]",
)
@machine_options
def inspect(texts: tuple[str, ...], pairs: tuple[str, ...], **given: Any) -> None:
    """Show which tokens of TEXT survive which layer, and what the model answers with and without pruning.

    \b
    python ltp.py inspect --restore CKPT "a gripping, funny film"
    python ltp.py inspect --restore CKPT --html look.html "a gripping, funny film" "not worth the ticket"
    python ltp.py inspect --restore CKPT_of_SQuAD "Who wrote it?" --pair "It was written by Ada Berg in 1912."

    Survivors are the stronger coloured the more attention they receive, dropped tokens are dimmed (dots, where the
    output has no colours). FLOPs are a layer's, relative to the dense model's.
    """
    file = given["html_file"]
    if file and file.is_file() and file.stat().st_size:
        with open(file, "rb") as old:
            if old.read(14).lower() != b"<!doctype html":
                raise InputError(f"--html {file}: exists and is no page; choose another file")
    if pairs and len(pairs) != len(texts):
        raise click.UsageError(f"{len(texts)} TEXT and {len(pairs)} --pair: pass one --pair for each TEXT, or none")
    from look import examine, page
    from model import find_model, write_file
    from train import Predictor, start_process

    process = start_process(given["device"], given["precision"], given["threads"])
    predictor = Predictor(find_model(given["restore"]), process, 1, given["max_seq_length"], dense=False)
    head = predictor.model.config.head
    records = [make_record(given["restore"], head, *both) for both in zip(texts, pairs or [None] * len(texts))]
    examples = examine(predictor, [(f"TEXT {number}", record) for number, record in enumerate(records, 1)])
    if given["html_file"]:
        html = page(examples, {"name": given["restore"], "pruning": predictor.model.pruning})
        write_file(given["html_file"], lambda path: path.write_text(html, encoding="utf-8"))
        click.echo(f"{given['html_file']}: open it in a browser")
    else:
        print_examples(examples)
    if predictor.truncated:
        click.echo(f"{predictor.truncated:,} longer than {predictor.max_length} tokens were cut", err=True)


@main.command("sweep")
@restore_option
@data_options
@click.option(
    "--method",
    "methods",
    multiple=True,
    type=click.Choice(["ltp", "manual", "topk"]),
    default=("ltp", "manual", "topk"),
    show_default=True,
    help="May be given several times, as may the following ones, which make the grid.",
)
@click.option(
    "--target-flops",
    multiple=True,
    type=click.FloatRange(0, 1, min_open=True),
    help="Shares of the dense FLOPs.  [default: 0.5, 0.33, 0.25; none with --lambda]",
)
@click.option(
    "--lambda", "regularization", multiple=True, type=click.FloatRange(0), help="λ of ltp, instead of targets."
)
@click.option("--temperature", multiple=True, type=click.FloatRange(0, min_open=True), help="τ of ltp.")
@click.option("--lr-threshold", "threshold_learning_rate", multiple=True, type=click.FloatRange(0), help="Of ltp.")
@click.option(
    "--lr", "learning_rate", multiple=True, type=click.FloatRange(0), help="Peak learning rates of the weights."
)
@click.option("--seed", multiple=True, type=click.IntRange(0, 2**31), help="Of order, dropout and new weights.")
@click.option("--epochs", type=click.FloatRange(0, min_open=True), help="Of ltp's soft stage.  [default: as in `soft`]")
@click.option(
    "--adapt-epochs",
    type=click.FloatRange(0, min_open=True),
    help="Of ltp's hard stage, of manual and of topk.  [default: as in `hard`]",
)
@click.option("--batch-size", "--bs", type=click.IntRange(1), help="Examples per optimizer step.  [default: 32]")
@DISTILL
@click.option(
    "--output", required=True, type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Where all goes."
)
@click.option("--speed/--no-speed", default=True, show_default=True, help="Measure each model's speed at the end.")
@machine_options
def sweep_command(**given: Any) -> None:
    """Train a grid of pruned models, and draw accuracy against FLOPs.

    \b
    python ltp.py sweep --task MRPC --restore CKPT_of_finetune --distill CKPT_of_finetune --output frontier
    python ltp.py sweep --task MRPC --restore CKPT_of_finetune --method ltp --lambda 0.05 --lambda 0.1 --output lambdas

    Each cell is trained as its own commands would (they are shown), one after the other, in DIR/CELL/STAGE. The same
    command again goes on where it was stopped and skips what is done; a larger grid adds to a smaller one.
    DIR/results.jsonl has a line for each model, DIR/frontier.png the figure (needs matplotlib). Speed is measured at the
    end, beside dense, and should find an idle machine; delete a cell's speed.json to measure it again.
    """
    source = make_source(given)
    with screen() as (show, progress):
        show("loading ...")
        from look import new_figure, plot_frontier, read_run, save_figure
        from model import find_model, write_file
        from sweep import AXES, run_sweep
        from train import start_process

        new_figure()  # without matplotlib it is better to stop now
        process = start_process(given["device"], given["precision"], given["threads"])
        show, progress = (show, progress) if process.main else (quiet, quiet)
        grid = {name: list(given[name]) for name in AXES}
        if not grid["target_flops"] and not grid["regularization"]:
            grid["target_flops"] = [0.5, 0.33, 0.25]
        if grid["target_flops"] and grid["regularization"]:
            raise click.UsageError("a target finds λ itself; pass --target-flops or --lambda")
        common = {name: given[name] for name in ("epochs", "adapt_epochs", "batch_size", "max_seq_length")}
        distill = find_model(given["distill"], "--distill") if given["distill"] else None
        rows = run_sweep(
            find_model(given["restore"]),
            source,
            list(given["methods"]),
            grid,
            common,
            distill,
            given["output"],
            process,
            given["speed"],
            show,
            progress,
        )
    if process.main:
        evaluation_table([(row["name"], row) for row in rows])
        figure = plot_frontier([read_run(given["output"], "")])
        write_file(given["output"] / "frontier.png", lambda path: save_figure(figure, path, "png"))
        click.echo(f"{given['output']}: results.jsonl, frontier.png, and the checkpoints")


@main.command("export")
@click.option("--restore", required=True, metavar="CKPT", help="Model folder, or a name on the hub (name@revision).")
@click.option(
    "--output",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The .onnx file to write.",
)
@click.option("--dense", is_flag=True, help="Ignore the checkpoint's pruning.")
def export_command(restore: str, output: Path, dense: bool) -> None:
    """Write a checkpoint as ONNX that drops tokens inside the graph, for one text at a time.

    \b
    python ltp.py export --restore CKPT --output model.onnx

    Inputs are input_ids (1, tokens) and, for models that tell segments apart, token_type_ids; outputs are logits
    (1, labels) and kept (layers), the tokens leaving each layer. The file is compared with the model in ONNX Runtime,
    on several lengths, before it is left in place. Needs onnx and onnxscript, and onnxruntime to compare.
    """
    from export import export_model
    from model import find_model, load_model, write_file

    changes = {"prune_mode": None} if dense else {}
    model = load_model(find_model(restore), **changes).model
    told = []
    write_file(output, lambda path: told.append(export_model(model, path)))
    click.echo(f"{output}: {told[0]}")


@main.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A .png or .svg file.",
)
@click.option(
    "--kind",
    type=click.Choice(["curves", "kept", "lengths", "tradeoff", "frontier"]),
    help="What to draw.  [default: curves of one run, tradeoff of several, lengths of answers, frontier of sweeps]",
)
def plot(runs: tuple[Path, ...], output: Path, kind: str | None) -> None:
    """Draw runs: their folders, results of `eval --json`, answers of `predict --output`, or what `sweep` left.

    \b
    curves     loss, score, relative FLOPs and thresholds over the steps      run folders
    tradeoff   accuracy against relative FLOPs                                run folders, eval results
    kept       share of the tokens left after each layer                      runs, eval results, answers (with spread)
    lengths    tokens leaving the last layer that keeps more than one         answers
               against tokens of the text
    frontier   accuracy against relative FLOPs by method, a panel a task      folders of sweeps, or their results.jsonl

    \b
    python ltp.py plot --output curves.svg demo/soft
    python ltp.py plot --output tradeoff.png demo/finetune demo/hard demo/topk demo/manual

    Needs matplotlib.
    """
    format = output.suffix.lower()[1:]
    if format not in ("png", "svg"):
        raise click.UsageError(f"--output {output}: expected a name that ends in .png or .svg")
    from look import PLOTS, natural_kind, read_runs, save_figure
    from model import write_file

    found = read_runs(list(runs))
    figure = PLOTS[kind or natural_kind(found)](found)
    write_file(output, lambda path: save_figure(figure, path, format))


@main.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    metavar="DIR",
    help="Where everything goes.",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier demo there.")
@click.option(
    "--seed", default=42, show_default=True, type=click.IntRange(0, 2**31), help="Of data, weights and training."
)
@machine_options
def demo(output: Path, overwrite: bool, seed: int, **given: Any) -> None:
    """The whole pipeline in miniature: no network, minutes on a CPU.

    Makes reviews in which a few words matter, trains a tokenizer and a small RoBERTa on them from scratch, and then
    runs finetune, soft, hard, topk and manual exactly as the commands do, showing each command line.
    """
    with screen() as (show, progress):
        show("loading ...")
        from data import demo_rows
        from look import examine
        from train import Predictor, run_demo, start_process

        process = start_process(given["device"], given["precision"], given["threads"], seed)
        rows = run_demo(output, seed, overwrite, process, show, progress)
    evaluation_table(rows)
    click.echo("\nOne example, and what is left of it after each layer:")
    predictor = Predictor(output / "hard", process, 1, None, dense=False)
    print_examples(examine(predictor, [("example", demo_rows(1, seed)[0])]))
    click.echo(
        "\nOn real data (GLUE from the hub, or --data with your own files):\n"
        "  python ltp.py finetune --task MRPC --restore roberta-base\n"
        "  python ltp.py soft     --task MRPC --restore checkpoints/base/MRPC/finetune/lr_2e-05\n"
        "then hard, topk and manual as above."
    )


# ----------------------------------------------------------------------------------------------------------------------
# Printing


def quiet(*args: Any, **state: Any) -> None:
    pass


def screen() -> Any:
    """A context that gives (show, progress): a line above the bar, and the bar's state."""
    import contextlib

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextlib.contextmanager
    def opened():
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            tasks: list[Any] = []

            def progress(step: int, steps: int | None, **state: Any) -> None:
                description = "  ".join(f"{k} {v:.4f}" for k, v in state.items() if v is not None)
                if not tasks:
                    tasks.append(bar.add_task(description, total=steps))
                bar.update(tasks[0], completed=step, total=steps, description=description)

            yield (lambda line: console.print(line, markup=False)), progress

    return opened()


def evaluation_table(rows: list[tuple[str, dict[str, Any]]]) -> None:
    """Prints evaluations side by side on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False)
    names = list(dict.fromkeys(name for _, record in rows for name in record["metrics"]))
    names, others = (names, []) if len(names) <= 4 else (names[:2], names[2:])
    sizes = list(dict.fromkeys(size for _, record in rows for size in record.get("speedup", ())))
    for name in (
        "",
        *names,
        "score",
        "GFLOPs",
        "rel. FLOPs",
        *(f"speed at {size}" for size in sizes),
        "kept after each layer",
    ):
        table.add_column(name, justify="left" if name in ("", "kept after each layer") else "right", no_wrap=True)
    for title, record in rows:
        cells = [
            title,
            *(f"{record['metrics'][name]:.4f}" for name in names),
            f"{record['score']:.4f}",
            f"{record['gflops']:.3g}",
            f"{record['relative_flops']:.3f}",
        ]
        cells += [f"{record['speedup'][size]:.2f}x" if "speedup" in record else "" for size in sizes]
        table.add_row(*cells, " ".join(f"{share:.2f}" for share in record["kept"]))
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)
    for title, record in rows if others else ():
        found = ", ".join(f"{name.replace('_', ' ')} {record['metrics'][name]:.4f}" for name in others)
        click.echo(f"{title}: {found}")


def print_examples(examples: list[dict[str, Any]]) -> None:
    """Prints each text once a layer on standard output."""
    from rich.console import Console

    from look import print_example

    console = Console(highlight=False)
    for example in examples:
        print_example(example, console if console.is_terminal else Console(width=160, highlight=False))


def speed_table(result: dict[str, Any]) -> None:
    """Prints what `bench` measured, and under which conditions."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_edge=False, pad_edge=False)
    for name in ("batch", "", "ms per batch", "p95", "examples/s", "FLOPs", "done", "speed-up", "FLOPs into time"):
        table.add_column(name, justify="left" if name == "" else "right", no_wrap=True)
    for s in result["speeds"]:
        table.add_row(
            str(s["batch_size"]),
            "dense",
            f"{1e3 * s['dense_latency']:.2f}",
            f"{1e3 * s['dense_latency_p95']:.2f}",
            f"{s['dense_examples_per_second']:.1f}",
            "1.00x",
            "1.00x",
            "1.00x",
            "",
        )
        table.add_row(
            "",
            "pruned",
            f"{1e3 * s['latency']:.2f}",
            f"{1e3 * s['latency_p95']:.2f}",
            f"{s['examples_per_second']:.1f}",
            f"{s['flops_reduction']:.2f}x",
            f"{s['done_reduction']:.2f}x",
            f"{s['speedup']:.2f}x",
            f"{s['flops_to_time']:.2f}",
        )
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)
    c = result["conditions"]
    lengths = ", ".join(f"{share} of them at most {n:.0f}" for share, n in c["length_quantiles"].items())
    click.echo(
        f"\n{c['checkpoint']} ({c['pruning']}) on {c['examples']} examples of {c['data']}, {c['mean_length']:.1f} tokens on "
        f"average ({lengths}). {c['device']}, {c['precision']}, {c['threads']} threads, torch {c['torch']}; {c['statistic']} "
        f"of {c['repeats']} passes; {c['peak_memory_bytes'] / 2**20:.0f} MiB at the peak"
    )


if __name__ == "__main__":
    main()
