"""The command line of Learned Token Pruning. `python ltp.py --help` lists the commands.

The options are tables in support/options.py, and each command makes one call into runs/ or tools/. A command imports
what it needs when it runs: --help must answer at once, and torch takes seconds.
"""

from __future__ import annotations

import math
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from support.errors import InputError, Interrupted, plural
from support.options import (
    STAGE_HELP,
    SWEEP_TARGETS,
    bench_options,
    demo_options,
    eval_options,
    export_options,
    inspect_options,
    plot_options,
    predict_options,
    stage_options,
    sweep_options,
)
from support.program import Program, hyphens, run
from support.settings import STAGES, PruningOptions, Settings, check_settings, soft_target


@click.group(
    cls=Program,
    context_settings={"token_normalize_func": hyphens, "help_option_names": ["-h", "--help"], "max_content_width": 110},
)
def main() -> None:
    """Learned Token Pruning (LTP) makes RoBERTa- and BERT-class models cheaper: it drops tokens with little attention.

    \b
    LTP:        finetune -> soft (learns thresholds) -> hard (drops tokens)
    Baselines:  finetune -> topk,  finetune -> manual

    `python ltp.py COMMAND --help` explains a command and its options.
    """


@main.command(section="First try")
@demo_options
def demo(output: Path, overwrite: bool, seed: int, **options: Any) -> None:
    """Run the whole pipeline in miniature, in a minute or two on a CPU.

    The demo needs no network. It writes short reviews in which a few words matter, and trains a tokenizer and a small
    RoBERTa on them from scratch. Then it runs finetune, soft, hard, topk and manual exactly as the commands do, and
    shows each command line. DIR/index.html shows the results.
    """
    from support.console import print_table, screen

    with screen() as (show, progress):
        show("loading ...")
        from tools.commands import start
        from tools.demo import COLUMNS, demo_rows, result_rows, run_demo, write_page
        from tools.inspect import examine, print_examples
        from tools.predict import Predictor

        process = start(options, seed)
        rows = run_demo(output, seed, overwrite, process=process, show=show, progress=progress)
        records = [("example", row) for row in demo_rows(8, 2 * seed + 1)]  # the first of the evaluation set
        examples = examine(Predictor(output / "hard", process), records)
        write_page(output, rows, examples)
    print_table(COLUMNS, result_rows(rows))
    click.echo("\nOne example, and what is left of it after each layer:")
    print_examples(examples[:1])
    click.echo(f"\nThe table, the figures and more examples: {output / 'index.html'}")
    click.echo(
        "\nOn real data (GLUE from the hub, or --data with your own files):\n"
        "  python ltp.py finetune --task MRPC --restore roberta-base\n"
        "and then the command that it prints; hard, topk and manual as above."
    )


# ----------------------------------------------------------------------------------------------------------------------
# Training


def stage_command(stage: str) -> None:
    """Registers a stage of training."""

    @main.command(stage, section="Train", help=STAGE_HELP[stage])
    @stage_options(stage)
    def command(**options: Any) -> None:
        train_stage(stage, options)


for stage in STAGES:
    stage_command(stage)


def train_stage(stage: str, options: dict[str, Any]) -> None:
    """Runs a stage of training, and prints its best evaluation and the next command."""
    if options["overwrite"] and options["resume"]:
        raise click.UsageError("--resume goes on with a run and --overwrite replaces it; pass one of them")
    source_of = click.get_current_context().get_parameter_source
    if source_of("distill_weight") not in (None, ParameterSource.DEFAULT) and not options["distill"]:
        raise click.UsageError("--distill-weight goes with --distill, whose model gives the answers")
    if options.get("target_flops"):
        options |= target_defaults(stage, options)
    values = {field.name: options[field.name] for field in fields(Settings) if field.name in options}
    settings = Settings(**(STAGES[stage] | values))
    check_settings(settings)
    from support.console import evaluation_table, quiet, screen

    with screen() as (show, progress):
        show("loading ...")
        from runs.stage import StageRequest, run_stage
        from support.checkpoint import find_model
        from tools.commands import make_source, next_command, start

        request = StageRequest(
            stage=stage,
            source=make_source(options),
            restore=find_model(options["restore"]),
            settings=settings,
            options=PruningOptions(**{f.name: options[f.name] for f in fields(PruningOptions) if f.name in options}),
            distill=find_model(options["distill"], "--distill") if options.get("distill") else None,
            distill_data=options.get("distill_data"),
            **{name: options[name] for name in ("output", "overwrite", "resume", "tensorboard")},
        )
        process = start(options, settings.seed)
        show, progress = (show, progress) if process.main else (quiet, quiet)
        try:
            folder, result = run_stage(request, process, show, progress)
        except Interrupted as error:
            raise Interrupted(f"{error}; the same command with --resume goes on", error.number) from None
    if process.main:
        evaluation_table([(stage, result.best)])
        times = result.seconds_per_step, result.mean_seconds_per_step
        speed = "" if math.isnan(times[0]) else ", {:.3f} s each (median; mean {:.3f} s)".format(*times)
        click.echo(f"{plural(result.steps, 'step')}{speed}. Checkpoint: {folder}")
        click.echo(f"Next: {next_command(stage, folder, options)}")


def target_defaults(stage: str, options: dict[str, Any]) -> dict[str, Any]:
    """The settings that --target-flops changes where the user gave none. Raises: click.UsageError if options clash."""
    if options.get("final_token_threshold") is not None:
        raise click.UsageError("--target-flops finds the height of the thresholds by itself; pass it or --threshold")
    for name in ("token_keep_rate", "keep_rates"):
        if options.get(name) is not None:
            raise click.UsageError(f"--target-flops finds the keep rate by itself; pass it or --{hyphens(name)}")
    if stage != "soft":
        return {}
    source_of = click.get_current_context().get_parameter_source
    if source_of("regularization") != ParameterSource.DEFAULT:
        raise click.UsageError("--target-flops finds λ by itself; pass it or --lambda")
    from support.checkpoint import find_model, load_config

    config = load_config(find_model(options["restore"]))
    scale = options["max_seq_length"] or config.max_seq_length, options["score_norm"] or config.score_norm
    return {name: value for name, value in soft_target(*scale).items() if source_of(name) == ParameterSource.DEFAULT}


@main.command(section="Train")
@sweep_options
def sweep(**options: Any) -> None:
    """Train a grid of pruned models, and draw accuracy against FLOPs.

    \b
    python ltp.py sweep --task MRPC --restore CKPT --distill CKPT --output grid
    python ltp.py sweep --task MRPC --restore CKPT --output lambdas \\
        --method ltp --lambda 0.05 --lambda 0.1

    CKPT is a model of `finetune`. Each model of the grid is trained as its own commands would train it, one after the
    other, in DIR/CELL/STAGE; the commands are shown. The same command again goes on where it was stopped, and skips
    finished models. A larger grid adds to a smaller one. DIR/results.jsonl has a line for each model, and
    DIR/frontier.png is the figure.

    At the end each model's speed is measured beside the dense model's. The machine should be idle then. Delete a cell's
    speed.json to measure it again.
    """
    if options["target_flops"] and options["regularization"]:
        raise click.UsageError("a target finds λ itself; pass --target-flops or --lambda")
    from support.console import evaluation_table, quiet, screen

    with screen() as (show, progress):
        show("loading ...")
        from runs.sweep import AXES, SweepRequest, run_sweep
        from support.checkpoint import find_model
        from support.files import write_file
        from tools.bench import BenchOptions, bench_checkpoint
        from tools.commands import make_source, start
        from tools.plot import plot_frontier, read_run, save_figure

        grid = {name: list(options[name]) for name in AXES}
        if not grid["target_flops"] and not grid["regularization"]:
            grid["target_flops"] = list(SWEEP_TARGETS)
        request = SweepRequest(
            restore=find_model(options["restore"]),
            source=make_source(options),
            methods=list(options["methods"]),
            grid=grid,
            distill=find_model(options["distill"], "--distill") if options["distill"] else None,
            **{name: options[name] for name in ("output", "epochs", "adapt_epochs", "batch_size")},
            **{name: options[name] for name in ("distill_data", "max_seq_length", "read_dropped")},
        )
        process = start(options)
        show, progress = (show, progress) if process.main else (quiet, quiet)

        def measure(folder: Path) -> dict[str, Any]:
            return bench_checkpoint(folder, request.source, options=BenchOptions(repeats=3), process=process)

        rows = run_sweep(request, process, measure=measure if options["speed"] else None, show=show, progress=progress)
    if process.main:
        evaluation_table([(row["name"], row) for row in rows])
        figure = plot_frontier([read_run(options["output"], "")])
        write_file(options["output"] / "frontier.png", lambda path: save_figure(figure, path, "png"))
        click.echo(f"{options['output']}: results.jsonl, frontier.png, and the checkpoints")


# ----------------------------------------------------------------------------------------------------------------------
# Trained models


@main.command("eval", section="Look at a model")
@eval_options
def evaluate(**options: Any) -> None:
    """Measure the score, FLOPs, and tokens kept in each layer.

    \b
    python ltp.py eval --task MRPC --restore CKPT --json result.json

    FLOPs are those of the encoder layers, without embeddings and head. A multiply-accumulate is 2 FLOPs. A layer makes
    4·D²·n_in + 2·D·n_in² + 2·D·F·n_out multiply-accumulates, with n_in tokens before and n_out after pruning.

    SQuAD 2.0: the result has best_f1 and best_f1_threshold. The first is the F1 of answers that `predict` gives with
    the second as its --no-answer-threshold.
    """
    from runs.stage import EvaluationOptions, evaluate_checkpoint
    from support.checkpoint import find_model
    from support.console import evaluation_table, quiet
    from support.files import write_json
    from tools.commands import check_files, make_source, start, write_answers

    source = make_source(options)
    check_files(source, json=options["json_file"], predictions=options["predictions"], nbest=options["nbest"])
    if (options["predictions"] or options["nbest"]) and source.task.head != "span":
        raise InputError(
            f"--predictions and --nbest are for questions on texts, which {source.task.title} does not have"
        )
    process = start(options)
    show = (lambda line: click.echo(line, err=True)) if process.main else quiet
    same = {name: options[name] for name in ("batch_size", "max_tokens", "dense")}
    choices = EvaluationOptions(max_length=options["max_seq_length"], **same)
    folder = find_model(options["restore"])
    evaluation, sets, logits = evaluate_checkpoint(folder, source, process, options=choices, show=show)
    if not process.main:
        return
    record = {"task": source.task.name} | vars(evaluation)
    evaluation_table([("dense" if options["dense"] else "eval", record)])
    if options["json_file"]:
        write_json(options["json_file"], record)
    if source.task.head == "span":
        write_answers(sets[""].details, logits[""], predictions=options["predictions"], nbest=options["nbest"])


@main.command(section="Look at a model")
@bench_options
def bench(**options: Any) -> None:
    """Measure speed beside the dense model and exported files.

    \b
    python ltp.py bench --restore CKPT --task MRPC --beside model.onnx
    python ltp.py bench --restore CKPT --lengths 32,64,128 --batch-size 64

    All are timed in turn in one run, and the figures are medians after a warm-up. An exported file runs on the CPU.
    Speed-ups are over the dense checkpoint, or over the file where --restore names one. MB are those of the weights on
    disk.

    "FLOPs into time" is the measured speed-up divided by the reduction of FLOPs, counted as `eval` counts them. That
    count leaves out one saving: in the last layer a classifier computes the first token alone, with and without
    pruning. "computed" is the reduction with that saving. It is smaller, since the dense model saves more there.
    """
    if bool(options["lengths"]) == bool(options["task"] or options["data"]):
        raise click.UsageError("pass --task or --data, or else --lengths")
    of_texts = {"--max-length": "max_seq_length"}
    of_texts |= {f"--{hyphens(name)}": name for name in ("dev_data", "text_column", "pair_column", "label_column")}
    of_texts |= {"--regression": "regression", "--tagging": "tagging"}
    for flag, name in of_texts.items():
        if options["lengths"] and options[name]:
            raise click.UsageError(f"--lengths times random tokens, and {flag} is for texts; pass one of them")
    lengths = [int(part) if part.strip().isdecimal() else 0 for part in (options["lengths"] or "1").split(",")]
    if min(lengths) < 1:
        raise click.UsageError(f"--lengths {options['lengths']}: expected whole numbers of at least 1, with commas")
    from runs.card import add_speed, check_card
    from support.checkpoint import find_model
    from support.console import speed_table
    from support.files import write_json
    from tools.bench import BenchOptions, bench_checkpoint
    from tools.commands import check_files, make_source, start_alone

    source = None if options["lengths"] else make_source(options)
    check_files(source, json=options["json_file"])
    process = start_alone(options, options["seed"])
    if process is None:
        return
    folder = find_model(options["restore"])
    if options["card"]:
        check_card(folder)
    same = {name: options[name] for name in ("batch_sizes", "examples", "repeats", "seed", "beside")}
    choices = BenchOptions(lengths=lengths, max_length=options["max_seq_length"], **same)
    result = bench_checkpoint(folder, source, options=choices, process=process)
    speed_table(result)
    if options["json_file"]:
        write_json(options["json_file"], result)
    if options["card"]:
        add_speed(folder, result)


@main.command(section="Look at a model")
@inspect_options
def inspect(texts: tuple[str, ...], pairs: tuple[str, ...], **options: Any) -> None:
    """Show which tokens of a TEXT survive which layer.

    \b
    python ltp.py inspect --restore CKPT "a gripping, funny film"
    python ltp.py inspect --restore CKPT --html look.html "one text" "another"
    python ltp.py inspect --restore CKPT_of_SQuAD "Who wrote it?" \\
        --pair "It was written by Ada Berg in 1912."

    The more attention a surviving token receives, the stronger its colour. Dropped tokens are dimmed, or dots where the
    output has no colours. FLOPs are those of one layer, relative to the dense model's. The last line is what the model
    answers with and without pruning.
    """
    if pairs and len(pairs) != len(texts):
        raise click.UsageError(f"{len(texts)} TEXT and {len(pairs)} --pair: pass one --pair for each TEXT, or none")
    from support.checkpoint import find_model
    from support.files import write_text
    from tools.commands import check_page, make_record, report_cut, start_alone
    from tools.inspect import examine, page, print_examples
    from tools.predict import Predictor, pruning_name

    file, restore = options["html_file"], options["restore"]
    check_page(file)
    process = start_alone(options)
    if process is None:
        return
    predictor = Predictor(find_model(restore), process, 1, options["max_seq_length"])
    config = predictor.model.config
    records = [make_record(restore, config.head, *both) for both in zip(texts, pairs or [None] * len(texts))]
    examples = examine(predictor, [(f"TEXT {number}", record) for number, record in enumerate(records, 1)])
    if file:
        write_text(file, page(examples, {"name": restore, "pruning": pruning_name(config)}))
        click.echo(f"{file}: open it in a browser")
    else:
        print_examples(examples)
    report_cut(predictor, predictor.reader.truncated, click.echo)


@main.command(section="Look at a model")
@plot_options
def plot(runs: tuple[Path, ...], output: Path, kind: str | None) -> None:
    """Draw training curves, trade-offs or token counts of RUNs.

    A RUN is the folder of a training or of a sweep, a result of `eval --json`, or a file of `predict --output`.

    \b
    --kind    what it draws                              of which RUNs
    curves    loss, score, relative FLOPs, thresholds    training folders
              over the steps
    tradeoff  score against relative FLOPs               trainings, results
    bops      score against relative bit operations,     trainings, results
              a panel for each task
    kept      share of the tokens left after each layer  trainings, results,
                                                         answers (with spread)
    lengths   tokens left after the last layer with      answers
              more than one, against tokens of the text
    frontier  score against relative FLOPs by method,    sweep folders, or
              a panel for each task                      their results.jsonl

    \b
    python ltp.py plot --output curves.svg demo/soft
    python ltp.py plot --output tradeoff.png demo/finetune demo/hard demo/topk
    """
    suffix = output.suffix.lower()[1:]
    if suffix not in ("png", "svg"):
        raise click.UsageError(f"--output {output}: expected a name that ends in .png or .svg")
    from support.files import write_file
    from tools.plot import PLOTS, natural_kind, read_runs, save_figure

    records = read_runs(list(runs))
    kind = kind or natural_kind(records)
    figure = PLOTS[kind](records)
    write_file(output, lambda path: save_figure(figure, path, suffix))
    click.echo(f"{output}: {kind}")


@main.command(section="Use a model")
@predict_options
def predict(text: str | None, **options: Any) -> None:
    """Classify a TEXT, tag its words, or answer a question.

    A question is answered from the text in --pair. With --input, each line of a file is answered. Answers are in the
    order of the lines, and memory does not grow with the file.

    \b
    python ltp.py predict --restore CKPT "a gripping, funny film"
    python ltp.py predict --restore CKPT --input texts.jsonl --output out.jsonl
    python ltp.py predict --restore CKPT_of_SQuAD "Who wrote it?" \\
        --pair "It was written by Ada Berg in 1912."

    A classifier's answer is {"label": …, "logits": […], "tokens": N, "kept": [tokens left after each layer]}.

    A tagger's answer is {"words", "labels", "tokens", "kept"}. The words of a TEXT are separated by blanks; {"words":
    […]} names them. Words that a cut text has lost get the label null.

    The answer to a question is {"answer", "start", "end", "score", "no_answer_score", "windows", "tokens", "kept"}.
    Start and end count characters. no_answer_score is how much better "no answer" scores. A long context is read in
    several windows; tokens and kept are sums over them.
    """
    file = options["input_file"]
    if (text is None) == (file is None):
        raise click.UsageError("pass either TEXT or --input FILE")
    if text is not None and options["output_file"] or text is None and options["pair"] is not None:
        raise click.UsageError("--pair goes with TEXT, and --output with --input")
    if file and str(file) == "-":
        file = Path("/dev/stdin")
    output = None if str(options["output_file"]) == "-" else options["output_file"]
    if file and (not file.exists() or file.is_dir()):
        raise InputError(f"--input {file}: {'is a folder; name a file' if file.exists() else 'no such file'}")
    from support.checkpoint import find_model
    from support.console import quiet, screen
    from support.files import json_line
    from tools.commands import make_record, report_cut, start
    from tools.predict import Predictor, predict_file

    process = start(options)
    predictor = Predictor(
        find_model(options["restore"]),
        process,
        batch_size=options["batch_size"],
        max_length=options["max_seq_length"],
        dense=options["dense"],
        max_tokens=options["max_tokens"],
        no_answer_threshold=options["no_answer_threshold"],
    )
    head = predictor.model.config.head
    if options["no_answer_threshold"] is not None and head != "span":
        raise InputError(f"--no-answer-threshold is for questions on texts, which {options['restore']} does not answer")
    if file:
        with screen() as (_, progress):
            count = predict_file(predictor, file, output, progress if process.main else quiet)
        cut = sum(process.gather(predictor.reader.truncated))
    else:
        record = make_record(options["restore"], head, text, options["pair"])
        answer = json_line(predictor.answer([("TEXT", record)])[0], sys.stdout)
        cut = predictor.reader.truncated
    if process.main:
        click.echo(f"{plural(count, 'line')} answered", err=True) if file else click.echo(answer, nl=False)
        report_cut(predictor, cut, click.echo)


@main.command(section="Use a model")
@export_options
def export(**options: Any) -> None:
    """Write a checkpoint as an ONNX file, to serve without PyTorch.

    \b
    python ltp.py export --restore CKPT --output model.onnx
    python ltp.py export --restore CKPT --output int8.onnx --int8 --task MRPC

    The graph takes padded texts, and drops tokens inside. Inputs are input_ids and attention_mask (texts, tokens),
    token_type_ids for models with several segments and those that read dropped tokens, and question_length (texts)
    where the question is protected. Outputs are logits (texts, labels) or (texts, tokens, labels), and kept (texts,
    layers), the tokens leaving each layer. ONNX Runtime runs the new file on several lengths, and its answers are
    compared with the model's before the file takes its place. The tokenizer is in the file, too: `eval`, `predict` and
    `bench` take it as --restore, and serving/serve.py answers without PyTorch. Needs onnx and onnxscript, and
    onnxruntime to compare.

    --int8 rounds after the comparison. What that costs depends on the model: with --task or --data the file is run
    beside the checkpoint on the evaluation data.
    """
    if options["output"].suffix != ".onnx":  # by which --restore knows an exported file
        raise click.UsageError(f"--output {options['output']}: expected a name that ends in .onnx")
    from runs.checks import check_task
    from support.checkpoint import find_model, load_config
    from tools.commands import make_source, start_alone
    from tools.export import describe_agreement, export_checkpoint

    source = make_source(options) if options["task"] or options["data"] else None
    process = start_alone(options)
    if process is None:
        return
    folder, output, dense = find_model(options["restore"]), options["output"], options["dense"]
    if source:
        check_task(folder, load_config(folder), source.task)  # before anything is written
    click.echo(f"{output}: {export_checkpoint(folder, output, options['int8'], dense)}")
    if source:
        click.echo(describe_agreement(folder, output, source, process, dense, options["max_seq_length"]))


if __name__ == "__main__":
    run(main)
