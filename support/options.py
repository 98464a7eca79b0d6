"""The options of the command line: a table a command, and tables that commands share. Also the stages' help texts.

In a command's help the sections go from what every user needs to what few need, and so do the options of a section.

Defaults come from support/settings.py. Imports click and the standard library only, so that --help answers at once.
"""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import click

from support.program import Option
from support.settings import (
    FINAL_TOKEN_THRESHOLD,
    MAX_SEQ_LENGTH,
    QUESTION_LENGTH,
    STAGES,
    TASK_NAMES,
    TOKEN_KEEP_RATE,
    Settings,
    flag,
    soft_target,
)

ANY_PATH = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)
WHOLE = click.IntRange(1)
LENGTH = click.IntRange(2)  # the first and the last token alone are two
SEED = click.IntRange(0, 2**31)
ABOVE_ZERO = click.FloatRange(0, min_open=True)
FROM_ZERO = click.FloatRange(0)


class Rates(click.ParamType):
    """Numbers from 0 to 1 with commas between them."""

    name = "rates"

    def convert(self, value: Any, param: Any, context: Any) -> list[float]:
        try:
            rates = [float(part) for part in value.split(",")]
        except ValueError:
            self.fail(f"{value!r}: expected numbers with commas", param, context)
        if not all(0 <= rate <= 1 for rate in rates):
            self.fail(f"{value!r}: a rate is a share, from 0 to 1", param, context)
        return rates


def table(*options: Any) -> Any:
    """A decorator that gives a command these options, in this order."""

    def decorate(command: Any) -> Any:
        for add in reversed(options):
            command = add(command)
        return command

    return decorate


def section(title: str, *options: Any) -> Any:
    """A decorator that gives a command these options, in this order, in a section of its help."""

    def decorate(command: Any) -> Any:
        others = len(getattr(command, "__click_params__", ()))
        command = table(*options)(command)
        for parameter in command.__click_params__[others:]:
            parameter.section = title
        return command

    return decorate


option = partial(click.option, cls=Option)

# ----------------------------------------------------------------------------------------------------------------------
# Options that several commands have


def restore_option(files: str = "Model folder (Hugging Face layout)") -> Any:
    return option("--restore", required=True, metavar="CKPT", help=f"{files}, or a name on the hub (name@revision).")


def batch_option(help: str) -> Any:
    return option("--batch-size", "--bs", default=32, show_default=True, type=WHOLE, help=help)


def json_option(content: str) -> Any:
    return option("--json", "json_file", type=FILE, metavar="FILE", help=f"Also write the {content} to this file.")


def machine_section(*options: Any) -> Any:
    """These options, and those of device, precision and threads."""
    return section(
        "Machine",
        *options,
        option("--device", metavar="NAME", help="cpu, cuda or cuda:N.  [default: cuda if there is a GPU]"),
        option(
            "--precision",
            type=click.Choice(["fp32", "bf16"]),
            help="Precision of matrix products. Scores and thresholds are always fp32. On a CPU with AVX512_BF16, bf16 "
            "takes 0.5 to 0.9 of the time.  [default: bf16 on CUDA, else fp32]",
        ),
        option("--threads", type=click.IntRange(1, 1024), help="Number of CPU threads.  [default: torch's choice]"),
    )


data_options = table(
    option("--task", metavar="NAME", help=f"{', '.join(TASK_NAMES)} (also SST2, STSB). Omit it to use your own data."),
    option(
        "--data",
        type=ANY_PATH,
        metavar="PATH",
        help="Folder with train.* and dev.*, or one file. Formats: GLUE's TSV, .csv, .tsv, .jsonl, .parquet; for "
        "SQuAD also .json; for --tagging also .conll; all but .parquet also as .gz.  [default: the task's data on "
        "the hub]",
    ),
    option(
        "--dev-data",
        type=ANY_PATH,
        metavar="FILE",
        help="File to evaluate on, where --data is one file, or a folder without a dev file.",
    ),
    option(
        "--max-length",
        "max_seq_length",
        type=LENGTH,
        help="Cut texts to this many tokens. The context of a question is read in windows that fit.  [default: the "
        f"checkpoint's, else {MAX_SEQ_LENGTH}; {QUESTION_LENGTH} for questions where the checkpoint answers none]",
    ),
)
own_data_section = section(
    "Your own data",
    option("--text-column", metavar="NAME", help="Column of the text.  [default: text; words with --tagging]"),
    option("--pair-column", metavar="NAME", help="Column of the second text, where an example is a pair of texts."),
    option(
        "--label-column", metavar="NAME", help="Column of the class or score.  [default: label; labels with --tagging]"
    ),
    option("--regression", is_flag=True, help="The labels are scores, not classes."),
    option(
        "--tagging",
        is_flag=True,
        help='Each word has a label: CoNLL files, or JSONL or Parquet with two lists, {"words": […], "labels": […]}.',
    ),
)
length_option = option(
    "--max-length", "max_seq_length", type=LENGTH, help="Cut texts to this many tokens.  [default: the checkpoint's]"
)
dense_option = option("--dense", is_flag=True, help="Leave out the pruning: take the dense model.")
max_tokens_option = option(
    "--max-tokens", type=WHOLE, help="Run fewer than --batch-size texts together where they have more tokens than this."
)
distill_option = option(
    "--distill",
    metavar="CKPT",
    help="Also learn from the answers of this model, usually the fine-tuned one without pruning. The cache of "
    "`datasets` keeps the answers, as answers-*.safetensors.",
)
distill_data_option = option(
    "--distill-data",
    type=FILE,
    metavar="FILE",
    help="With --distill: also learn the teacher's answers to these texts, in files like those of --data. They need no "
    "labels. An epoch is longer by them.",
)

# ----------------------------------------------------------------------------------------------------------------------
# Training

# Settings that have a meaning only where thresholds are learned, and those that have one only where tokens are pruned.
SOFT_ONLY = {
    "regularization",
    "temperature",
    "temperature_end",
    "mask_attention",
    "threshold_learning_rate",
    "threshold_weight_decay",
}
PRUNED_ONLY = {"target_flops", "distill_weight"}

threshold_option = option(
    "--final-token-threshold",
    "--threshold",
    type=float,
    metavar="θ",
    help="Threshold of the last layer. Layer l of L has θ·l/L. Soft training starts from these.  [default: the "
    f"checkpoint's, else {FINAL_TOKEN_THRESHOLD}]",
)
keep_rate_option = option(
    "--token-keep-rate",
    type=float,
    metavar="R",
    help="Share of the tokens that the last layer keeps. A negative R prunes more: the share reaches 0 before the last "
    f"layer, and one token stays.  [default: the checkpoint's, else {TOKEN_KEEP_RATE}]",
)
keep_rates_option = option(
    "--keep-rates",
    type=Rates(),
    metavar="R,R,…",
    help="Share of the tokens that each layer keeps, one number a layer, in place of the schedule. `eval` lists the "
    "shares of any model, and top-k can keep the same.  [default: the checkpoint's, else the schedule]",
)
score_norm_option = option(
    "--score-norm",
    type=click.Choice(["max_length", "length"]),
    help="What divides the attention that a token receives: --max-length, as in the authors' code, or the text's own "
    "length, as in the paper's formula.  [default: the checkpoint's, else max-length]",
)
protect_option = option(
    "--protect-question/--prune-question",
    default=None,
    help="SQuAD: keep all tokens of the question, or prune them too.  [default: the checkpoint's, else prune]",
)
read_option = option(
    "--read-dropped/--ignore-dropped",
    default=None,
    help="Classifiers: the head also reads the states of dropped tokens, as they were when they left, or the first "
    "token alone.  [default: read in `soft` with --target-flops; else the checkpoint's, else ignore]",
)
# How a stage prunes, besides the settings.
STAGE_OPTIONS: dict[str, tuple[Any, ...]] = {
    "finetune": (),
    "soft": (threshold_option, score_norm_option, protect_option, read_option),
    "hard": (),
    "topk": (keep_rate_option, keep_rates_option, protect_option, read_option),
    "manual": (threshold_option, score_norm_option, protect_option, read_option),
}
TARGET_SETTINGS = "\n      ".join(
    flag(name) + ("" if value is True else f" {value:g}") for name, value in soft_target(128).items()
)
STAGE_HELP = {
    "finetune": """Fine-tune the dense model: all other stages start from it.

    \b
    python ltp.py finetune --task MRPC --restore roberta-base
    python ltp.py finetune --restore roberta-base --text-column body \\
        --data reviews.csv --dev-data reviews-dev.csv

    Writes checkpoints/base/TASK/finetune/lr_LR. A small model needs a higher rate and more epochs than RoBERTa-base.
    """,
    "soft": f"""Learn thresholds and weights together (first stage of LTP).

    A soft mask σ((score - θ) / τ) multiplies each token's state, or the attention that others pay to it
    (--mask-attention). The loss gets λ · (share of tokens kept, summed over the layers). No token is dropped, so this
    stage costs as much as fine-tuning. Its evaluations drop tokens as inference does. Run `hard` next.

    With --target-flops, training finds λ, which then weighs the FLOPs. The thresholds start where they meet the target,
    and are scaled to it once more at the end.

    \b
    Other defaults change with it:
      --read-dropped (classifiers)
      {TARGET_SETTINGS}

    The last three are for 128 tokens. They are inversely proportional to the maximum length, but not with the
    score norm "length".

    \b
    python ltp.py soft --task MRPC --restore CKPT_of_finetune --lambda 0.1
    python ltp.py soft --task MRPC --restore CKPT_of_finetune --target-flops 0.5

    \b
    Writes checkpoints/base/TASK/absolute_threshold/rate_θ/temperature_τ/
           lambda_λ/lr_LR (with a target temperature_τ/flops_TARGET/lr_LR;
           read_dropped before flops_TARGET where dropped tokens are read)
    """,
    "hard": """Drop tokens, and adapt the weights (second stage of LTP).

    The thresholds are those that `soft` learned, frozen. A token whose score is below its layer's threshold leaves
    before the next matrix product, so a step is cheaper than a dense one. With --target-flops, each evaluation first
    scales all thresholds to the target.

    \b
    python ltp.py hard --task MRPC --restore CKPT_of_soft --lr 1e-5

    Writes CKPT/hard/lr_LR (with a target CKPT/hard/flops_TARGET/lr_LR).
    """,
    "topk": """Baseline: keep a fixed share of each text's tokens.

    Each layer keeps the tokens with the highest scores (SpAtten's schedule). The first layers keep all tokens. Then the
    share falls linearly to that of the last layer, --token-keep-rate. --keep-rates gives each layer its own share.

    \b
    python ltp.py topk --task MRPC --restore CKPT_of_finetune --token-keep-rate .2

    Writes CKPT/topk/lr_LR (with a target CKPT/topk/flops_TARGET/lr_LR).
    """,
    "manual": """Baseline: drop tokens by fixed thresholds θ·l/L.

    The thresholds are not learned, and tokens are dropped from the start.

    \b
    python ltp.py manual --task MRPC --restore CKPT_of_finetune --threshold 0.01

    Writes CKPT/manual/lr_LR (with a target CKPT/manual/flops_TARGET/lr_LR).
    """,
}
output_section = section(
    "Output",
    option("--output", type=ANY_PATH, metavar="DIR", help="Folder of the checkpoint.  [default: see above]"),
    option("--overwrite", is_flag=True, help="Replace the run in the output folder."),
    option("--resume", is_flag=True, help="Go on with the interrupted run in the output folder, or start one."),
    option(
        "--tensorboard",
        type=FOLDER,
        metavar="DIR",
        help="Also write losses, scores, FLOPs and thresholds for TensorBoard (needs tensorboard).",
    ),
)
PRUNING_SETTINGS = (
    "target_flops",
    "regularization",
    "temperature",
    "temperature_end",
    "threshold_learning_rate",
    "mask_attention",
)
OPTIMIZER_SETTINGS = ("warmup", "weight_decay", "threshold_weight_decay", "max_grad_norm", "accumulate")


def stage_options(stage: str) -> Any:
    """All options of a stage of training."""
    return table(
        section("Model and data", restore_option(), data_options),
        section("Pruning", *settings_options(stage, *PRUNING_SETTINGS), *STAGE_OPTIONS[stage]),
        section(
            "Training",
            *settings_options(stage, "epochs", "learning_rate", "batch_size"),
            *(() if stage == "finetune" else (distill_option, distill_data_option)),
            *settings_options(stage, "distill_weight", "seed", "save_steps", "load_best"),
        ),
        output_section,
        own_data_section,
        section("Optimizer", *settings_options(stage, *OPTIMIZER_SETTINGS)),
        machine_section(),
    )


def settings_options(stage: str, *names: str) -> list[Any]:
    """The options of these fields of `Settings`, those left out that have no meaning in the stage."""
    hidden = (set() if stage == "soft" else SOFT_ONLY) | (PRUNED_ONLY if stage == "finetune" else set())
    by_name = {field.name: field for field in fields(Settings)}
    options = []
    for name in names:
        if name not in hidden:
            choices = dict(by_name[name].metadata)
            flags = choices.pop("flags") or (f"--{name.replace('_', '-')}",)
            default = STAGES[stage].get(name, by_name[name].default)
            options.append(option(*flags, name, default=default, show_default=default is not None, **choices))
    return options


def several(*flags: str, type: Any, help: str) -> Any:
    """An option that may be given several times."""
    return option(*flags, multiple=True, type=type, help=help)


SWEEP_TARGETS = (0.5, 0.33, 0.25)
sweep_options = table(
    section("Model and data", restore_option(), data_options),
    section(
        "Grid of all combinations (each option may be given several times)",
        option(
            "--method",
            "methods",
            multiple=True,
            type=click.Choice(["ltp", "manual", "topk"]),
            default=("ltp", "manual", "topk"),
            show_default=True,
            help="How to prune. ltp is `soft`, then `hard`.",
        ),
        several(
            "--target-flops",
            type=click.FloatRange(0, 1, min_open=True),
            help=f"Share of the dense FLOPs.  [default: {', '.join(map(str, SWEEP_TARGETS))}; none with --lambda]",
        ),
        several("--lambda", "regularization", type=FROM_ZERO, help="λ of ltp, instead of targets."),
        several("--temperature", type=ABOVE_ZERO, help="τ of ltp."),
        several(
            "--lr-threshold", "threshold_learning_rate", type=FROM_ZERO, help="Peak learning rate of ltp's thresholds."
        ),
        several("--lr", "learning_rate", type=FROM_ZERO, help="Peak learning rate of the weights."),
        several("--seed", type=SEED, help="Seed of the data order, dropout and new weights."),
    ),
    section(
        "Training",
        option("--epochs", type=ABOVE_ZERO, help="Epochs of ltp's soft stage.  [default: as in `soft`]"),
        option(
            "--adapt-epochs",
            type=ABOVE_ZERO,
            help="Epochs of ltp's hard stage, of manual and of topk.  [default: as in `hard`]",
        ),
        option(
            "--batch-size", "--bs", type=WHOLE, help=f"Examples per optimizer step.  [default: {Settings.batch_size}]"
        ),
        distill_option,
        distill_data_option,
        option(
            "--read-dropped/--ignore-dropped",
            default=None,
            help="Whether ltp's classifiers read dropped tokens; those of manual and topk do as CKPT does.  [default: "
            "as in `soft`]",
        ),
    ),
    section(
        "Output",
        option("--output", required=True, type=FOLDER, metavar="DIR", help="Folder of everything that is written."),
        option("--speed/--no-speed", default=True, show_default=True, help="Measure each model's speed at the end."),
    ),
    own_data_section,
    machine_section(),
)

# ----------------------------------------------------------------------------------------------------------------------
# Trained models

eval_options = table(
    section("Model and data", restore_option("Model folder, exported .onnx file"), data_options, dense_option),
    section(
        "Output",
        json_option("result"),
        option(
            "--predictions",
            type=FILE,
            metavar="FILE",
            help='SQuAD: write the answer to each question, {"id": "text"}, as the official script reads it.',
        ),
        option(
            "--nbest",
            type=FILE,
            metavar="FILE",
            help="SQuAD: write the best answers to each question, with their places, scores and probabilities (among "
            'these and "no answer"). no_answer_score is how much better "no answer" scores than the best of them.',
        ),
    ),
    own_data_section,
    machine_section(batch_option("Examples to run together."), max_tokens_option),
)
bench_options = table(
    section(
        "Model and data",
        restore_option("Model folder, exported .onnx file"),
        option(
            "--beside",
            multiple=True,
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            metavar="FILE",
            help="Also time this exported .onnx file, on the same batches. May be given several times.",
        ),
        data_options,
        option(
            "--lengths", metavar="N,N,…", help="Time random tokens, in sequences of these lengths, instead of data."
        ),
    ),
    section(
        "Timing",
        option(
            "--batch-size",
            "--bs",
            "batch_sizes",
            multiple=True,
            default=(1, 32),
            show_default=True,
            type=WHOLE,
            help="Examples to run together. May be given several times.",
        ),
        option("--examples", default=256, show_default=True, type=WHOLE, help="Number of examples to time."),
        option("--repeats", default=5, show_default=True, type=WHOLE, help="Timed passes, after one to warm up."),
        option("--seed", default=42, show_default=True, type=SEED, help="Seed of the choice of examples."),
    ),
    section(
        "Output",
        json_option("figures"),
        option("--card", is_flag=True, help="Add the figures to the checkpoint's model card, README.md."),
    ),
    own_data_section,
    machine_section(),
)
inspect_options = table(
    click.argument("texts", metavar="TEXT...", nargs=-1, required=True),
    section(
        "Model and texts",
        restore_option("Model folder"),
        option(
            "--pair",
            "pairs",
            metavar="TEXT",
            multiple=True,
            help="The second text, for a task on pairs, or the text with a question's answer: one for each TEXT.",
        ),
        length_option,
    ),
    section(
        "Output",
        option(
            "--html",
            "html_file",
            metavar="FILE",
            type=FILE,
            help="Write a page to open in a browser: one file, no network.",
        ),
    ),
    machine_section(),
)
plot_options = table(
    click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=ANY_PATH),
    section(
        "Figure",
        option("--output", required=True, metavar="FILE", type=FILE, help="A .png or .svg file to write."),
        option(
            "--kind",
            type=click.Choice(["curves", "kept", "lengths", "tradeoff", "bops", "frontier"]),
            help="What to draw.  [default: curves of one run, tradeoff of several, bops where one is in int8, lengths "
            "of answers, frontier of sweeps]",
        ),
    ),
)
predict_options = table(
    click.argument("text", required=False),
    section(
        "Model and texts",
        restore_option("Model folder, exported .onnx file"),
        option(
            "--pair", metavar="TEXT", help="The second text, for a task on pairs, or the text with a question's answer."
        ),
        option(
            "--input",
            "input_file",
            metavar="FILE",
            type=ANY_PATH,
            help='File of JSON lines, or "-" for standard input. A line is {"text": …}, {"text": …, "text_pair": …} '
            'or {"token_ids": […]}; for a tagger also {"words": […]}; for questions {"question": …, "context": …}. '
            'The answer repeats an "id".',
        ),
        length_option,
        dense_option,
    ),
    section(
        "Answers",
        option(
            "--output",
            "output_file",
            metavar="FILE",
            type=ANY_PATH,
            help="File of the answers.  [default: standard output]",
        ),
        option(
            "--no-answer-threshold",
            type=float,
            metavar="T",
            help="Questions: give no answer if no_answer_score is above T. With 0 the likelier of both wins. `eval` "
            "reports the best T for its data.  [default: always answer]",
        ),
    ),
    machine_section(batch_option("Lines to run together."), max_tokens_option),
)
export_options = table(
    section(
        "Model and file",
        restore_option("Model folder"),
        option("--output", required=True, metavar="FILE", type=FILE, help="The .onnx file to write."),
        option(
            "--int8",
            is_flag=True,
            help="Compute matrix products in int8: the file is smaller and faster. Meant for CPUs with VNNI: on others "
            "ONNX Runtime's products may overflow.",
        ),
        dense_option,
    ),
    section("Data to compare the file with the checkpoint on", data_options),
    own_data_section,
    machine_section(),
)
demo_options = table(
    section(
        "Demo",
        option(
            "--output",
            type=ANY_PATH,
            default=Path("demo"),
            show_default=True,
            metavar="DIR",
            help="Folder of everything that is written.",
        ),
        option("--overwrite", is_flag=True, help="Replace an earlier demo in this folder."),
        option("--seed", default=42, show_default=True, type=SEED, help="Seed of data, weights and training."),
    ),
    machine_section(),
)
