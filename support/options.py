"""The options of the command line: a table a command, and tables that commands share. Also the stages' help texts.

Defaults come from support/settings.py. Imports click and the standard library only, so that --help answers at once.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

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
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


# ----------------------------------------------------------------------------------------------------------------------
# Options that several commands have


def restore_option(files: str = "Model folder (Hugging Face layout)") -> Any:
    return click.option(
        "--restore", required=True, metavar="CKPT", help=f"{files}, or a name on the hub (name@revision)."
    )


def batch_option(help: str) -> Any:
    return click.option("--batch-size", "--bs", default=32, show_default=True, type=WHOLE, help=help)


def json_option(content: str) -> Any:
    return click.option(
        "--json", "json_file", type=FILE, metavar="FILE", help=f"Also write the {content} to this file."
    )


machine_options = table(
    click.option("--device", metavar="NAME", help="cpu, cuda or cuda:N.  [default: cuda if there is any]"),
    click.option(
        "--precision",
        type=click.Choice(["fp32", "bf16"]),
        help="Precision of matrix products; of scores and thresholds it is fp32. On a CPU with AVX512_BF16, bf16 takes "
        "0.5 to 0.9 of the time.  [default: bf16 on CUDA, else fp32]",
    ),
    click.option("--threads", type=WHOLE, help="Number of CPU threads.  [default: torch's choice]"),
)
data_options = table(
    click.option("--task", help=f"{', '.join(TASK_NAMES)} (also SST2, STSB). Omit it to use your own data."),
    click.option(
        "--data",
        type=ANY_PATH,
        metavar="PATH",
        help="A folder with train.* and dev.*, or one file. Formats: GLUE's TSV, .csv, .tsv, .jsonl, .parquet; for "
        "SQuAD also .json; for --tagging also .conll; all but .parquet also as .gz.  [default: the task's data on "
        "the hub]",
    ),
    click.option(
        "--dev-data",
        type=ANY_PATH,
        metavar="FILE",
        help="File to evaluate on, if --data is a file or a folder without one.",
    ),
    click.option("--text-column", metavar="NAME", help="Column of the text in your own data.  [default: text]"),
    click.option("--pair-column", metavar="NAME", help="Column of the second text, for pairs of texts."),
    click.option("--label-column", metavar="NAME", help="Column of the class or score.  [default: label]"),
    click.option("--regression", is_flag=True, help="The labels of your own data are scores, not classes."),
    click.option(
        "--tagging",
        is_flag=True,
        help="Your own data are words with a label each: CoNLL files, or JSONL or Parquet with lists, "
        '{"words": […], "labels": […]}.',
    ),
    click.option(
        "--max-length",
        "max_seq_length",
        type=LENGTH,
        help="Cut texts to this many tokens; a question gets a part of its context.  [default: the checkpoint's, else "
        f"{MAX_SEQ_LENGTH}; {QUESTION_LENGTH} for questions, also in `finetune` from a checkpoint without a question "
        "head]",
    ),
)
length_option = click.option(
    "--max-length", "max_seq_length", type=LENGTH, help="Cut texts to this many tokens.  [default: the checkpoint's]"
)
dense_option = click.option("--dense", is_flag=True, help="Run the model without pruning.")
max_tokens_option = click.option(
    "--max-tokens", type=WHOLE, help="Run at most this many tokens together, if --batch-size texts have more."
)
distill_option = click.option(
    "--distill",
    metavar="CKPT",
    help="Also learn from the answers of this model, usually the fine-tuned one without pruning. The cache of "
    "`datasets` keeps the answers, as answers-*.safetensors.",
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

threshold_option = click.option(
    "--final-token-threshold",
    "--threshold",
    type=float,
    metavar="θ",
    help="Threshold of the last layer; layer l of L gets θ·l/L.  [default: the checkpoint's, else "
    f"{FINAL_TOKEN_THRESHOLD}]",
)
keep_rate_option = click.option(
    "--token-keep-rate",
    type=float,
    metavar="R",
    help="Share of the tokens that the last layer keeps. A negative rate falls more steeply.  [default: the "
    f"checkpoint's, else {TOKEN_KEEP_RATE}]",
)
keep_rates_option = click.option(
    "--keep-rates",
    type=Rates(),
    metavar="R,R,…",
    help="Share of the tokens that each layer keeps, one number a layer, instead of the schedule: to keep as many as "
    "another model, which `eval` lists.  [default: the checkpoint's, else the schedule]",
)
score_norm_option = click.option(
    "--score-norm",
    type=click.Choice(["max_length", "length"]),
    help="Divide the attention that a token receives by --max-length (as the authors' code), or by the text's own "
    "length (as the paper's formula).  [default: the checkpoint's, else max-length]",
)
protect_option = click.option(
    "--protect-question/--prune-question",
    default=None,
    help="SQuAD: keep all tokens of the question, or prune them too.  [default: the checkpoint's, else prune]",
)
STAGE_OPTIONS: dict[str, tuple[Any, ...]] = {
    "finetune": (),
    "soft": (threshold_option, score_norm_option, protect_option, distill_option),
    "hard": (distill_option,),
    "topk": (keep_rate_option, keep_rates_option, protect_option, distill_option),
    "manual": (threshold_option, score_norm_option, protect_option, distill_option),
}
TARGET_SETTINGS = ", ".join(
    flag(name) + ("" if value is True else f" {value:g}") for name, value in soft_target(128).items()
)
STAGE_HELP = {
    "finetune": """Fine-tune without pruning: the first step, and the dense model to compare with.

    \b
    python ltp.py finetune --task MRPC --restore roberta-base
    python ltp.py finetune --restore roberta-base --data reviews.csv --dev-data reviews-dev.csv --text-column body

    Writes checkpoints/base/TASK/finetune/lr_LR. A small model needs a higher rate and more epochs than RoBERTa-base.
    """,
    "soft": f"""Learn thresholds and weights together (first stage of LTP).

    Each layer's output is multiplied by the soft mask σ((score - θ) / τ). The loss gets λ · (share of tokens kept,
    summed over the layers). This stage drops no token, so it costs as much as fine-tuning; its evaluations drop tokens
    as inference does. Run `hard` next.

    With --target-flops, training finds λ, which then weighs the FLOPs. The thresholds start where they meet the target,
    and are scaled to it once more at the end. Other defaults change: at 128 tokens to {TARGET_SETTINGS}, at other
    lengths in proportion to 1 / --max-length. With --score-norm length they do not depend on the length.

    \b
    python ltp.py soft --task MRPC --restore checkpoints/base/MRPC/finetune/lr_2e-05 --lambda 0.1
    python ltp.py soft --task MRPC --restore checkpoints/base/MRPC/finetune/lr_2e-05 --target-flops 0.5

    Writes checkpoints/base/TASK/absolute_threshold/rate_θ/temperature_τ/lambda_λ/lr_LR (or .../flops_TARGET/lr_LR).
    """,
    "hard": """Drop tokens, and adapt the weights (second stage of LTP).

    The thresholds are those that `soft` learned, frozen. A token whose score is below its layer's threshold leaves
    before the next matrix product, so a step is cheaper than a dense one. With --target-flops, each evaluation first
    scales all thresholds to the target.

    \b
    python ltp.py hard --task MRPC --restore CKPT_of_soft --lr 1e-5

    Writes CKPT/hard/lr_LR.
    """,
    "topk": """Baseline: keep a fixed share of each text's tokens.

    Each layer keeps the tokens with the highest scores (SpAtten's schedule). The first layers keep all tokens. Then the
    share falls linearly to --token-keep-rate in the last layer. --keep-rates gives each layer a share of its own.

    \b
    python ltp.py topk --task MRPC --restore CKPT_of_finetune --token-keep-rate 0.2

    Writes CKPT/topk/lr_LR.
    """,
    "manual": """Baseline: drop tokens by fixed thresholds θ·l/L.

    The thresholds are not learned, and tokens are dropped from the start.

    \b
    python ltp.py manual --task MRPC --restore CKPT_of_finetune --final-token-threshold 0.01

    Writes CKPT/manual/lr_LR.
    """,
}
output_options = table(
    click.option("--output", type=ANY_PATH, metavar="DIR", help="Folder of the checkpoint.  [default: see above]"),
    click.option("--overwrite", is_flag=True, help="Replace the run in the output folder."),
    click.option("--resume", is_flag=True, help="Go on with the interrupted run in the output folder, or start one."),
    click.option(
        "--tensorboard",
        type=FOLDER,
        metavar="DIR",
        help="Also write losses, scores, FLOPs and thresholds for TensorBoard (needs tensorboard).",
    ),
)


def stage_options(stage: str) -> Any:
    """All options of a stage of training."""
    own, settings = STAGE_OPTIONS[stage], settings_options(stage)
    return table(restore_option(), data_options, *own, settings, output_options, machine_options)


def settings_options(stage: str) -> Any:
    """The options of a stage that are fields of `Settings`."""
    hidden = (set() if stage == "soft" else SOFT_ONLY) | (PRUNED_ONLY if stage == "finetune" else set())
    options = []
    for field in fields(Settings):
        if field.name not in hidden:
            choices = dict(field.metadata)
            flags = choices.pop("flags") or (f"--{field.name.replace('_', '-')}",)
            default = STAGES[stage].get(field.name, field.default)
            options.append(
                click.option(*flags, field.name, default=default, show_default=default is not None, **choices)
            )
    return table(*options)


def several(*flags: str, type: Any, help: str) -> Any:
    """An option that may be given several times."""
    return click.option(*flags, multiple=True, type=type, help=help)


SWEEP_TARGETS = (0.5, 0.33, 0.25)
sweep_options = table(
    restore_option(),
    data_options,
    click.option(
        "--method",
        "methods",
        multiple=True,
        type=click.Choice(["ltp", "manual", "topk"]),
        default=("ltp", "manual", "topk"),
        show_default=True,
        help="May be given several times. So may the options up to --seed: the grid has all their combinations.",
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
    click.option("--epochs", type=ABOVE_ZERO, help="Epochs of ltp's soft stage.  [default: as in `soft`]"),
    click.option(
        "--adapt-epochs",
        type=ABOVE_ZERO,
        help="Epochs of ltp's hard stage, of manual and of topk.  [default: as in `hard`]",
    ),
    click.option(
        "--batch-size", "--bs", type=WHOLE, help=f"Examples per optimizer step.  [default: {Settings.batch_size}]"
    ),
    distill_option,
    click.option("--output", required=True, type=FOLDER, metavar="DIR", help="Folder of everything that is written."),
    click.option("--speed/--no-speed", default=True, show_default=True, help="Measure each model's speed at the end."),
    machine_options,
)

# ----------------------------------------------------------------------------------------------------------------------
# Trained models

eval_options = table(
    restore_option(),
    data_options,
    batch_option("Examples to run together."),
    max_tokens_option,
    dense_option,
    json_option("result"),
    click.option(
        "--predictions",
        type=FILE,
        metavar="FILE",
        help='SQuAD: write the answer to each question, {"id": "text"}, as the official script reads it.',
    ),
    click.option(
        "--nbest",
        type=FILE,
        metavar="FILE",
        help="SQuAD: write the best answers to each question with their places, scores and probabilities (among these "
        'and "no answer"), and no_answer_score: how much better "no answer" scores than the best of them.',
    ),
    machine_options,
)
bench_options = table(
    restore_option(),
    data_options,
    click.option("--lengths", metavar="N,N,…", help="Time random tokens, in sequences of these lengths, and no data."),
    click.option("--examples", default=256, show_default=True, type=WHOLE, help="Number of examples to time."),
    click.option(
        "--batch-size",
        "--bs",
        "batch_sizes",
        multiple=True,
        default=(1, 32),
        show_default=True,
        type=WHOLE,
        help="Examples to run together. May be given several times.",
    ),
    click.option("--repeats", default=5, show_default=True, type=WHOLE, help="Timed passes, after one to warm up."),
    click.option(
        "--beside",
        multiple=True,
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        metavar="FILE",
        help="Time this file of `export`, too, on the same batches. May be given several times.",
    ),
    click.option("--seed", default=42, show_default=True, type=SEED, help="Seed of the choice of examples."),
    json_option("figures"),
    click.option("--card", is_flag=True, help="Add the figures to the checkpoint's model card, README.md."),
    machine_options,
)
predict_options = table(
    click.argument("text", required=False),
    restore_option("Model folder"),
    click.option("--pair", metavar="TEXT", help="The second text, for a task on pairs."),
    click.option(
        "--input",
        "input_file",
        metavar="FILE",
        type=ANY_PATH,
        help='JSON lines, a file or "-" for standard input: {"text": …}, {"text": …, "text_pair": …} or {"token_ids": '
        '[…]}; for a tagger also {"words": […]}; for questions {"question": …, "context": …}. The answer repeats '
        'an "id".',
    ),
    click.option(
        "--output",
        "output_file",
        metavar="FILE",
        type=ANY_PATH,
        help="File of the answers.  [default: standard output]",
    ),
    batch_option("Lines to run together."),
    max_tokens_option,
    click.option(
        "--no-answer-threshold",
        type=float,
        metavar="T",
        help="Questions: give no answer if no_answer_score is above T. 0 takes the likelier one; `eval` reports the "
        "best T for its data.  [default: always answer]",
    ),
    length_option,
    dense_option,
    machine_options,
)
inspect_options = table(
    click.argument("texts", metavar="TEXT...", nargs=-1, required=True),
    restore_option("Model folder"),
    click.option(
        "--pair",
        "pairs",
        metavar="TEXT",
        multiple=True,
        help="The second text, for a task on pairs, or the text with a question's answer: one for each TEXT.",
    ),
    click.option(
        "--html",
        "html_file",
        metavar="FILE",
        type=FILE,
        help="Write a page to open in a browser: one file, no network.",
    ),
    length_option,
    machine_options,
)
export_options = table(
    restore_option("Model folder"),
    click.option("--output", required=True, metavar="FILE", type=FILE, help="The .onnx file to write."),
    click.option(
        "--int8",
        is_flag=True,
        help="Products in int8: a smaller file, and a faster one. Meant for CPUs with VNNI: on others ONNX Runtime's "
        "products may overflow.",
    ),
    dense_option,
    data_options,
    machine_options,
)
plot_options = table(
    click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=ANY_PATH),
    click.option("--output", required=True, metavar="FILE", type=FILE, help="A .png or .svg file to write."),
    click.option(
        "--kind",
        type=click.Choice(["curves", "kept", "lengths", "tradeoff", "bops", "frontier"]),
        help="What to draw.  [default: curves of one run, tradeoff of several, bops where one is in int8, lengths of "
        "answers, frontier of sweeps]",
    ),
)
demo_options = table(
    click.option(
        "--output",
        type=ANY_PATH,
        default=Path("demo"),
        show_default=True,
        metavar="DIR",
        help="Folder of everything that is written.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace an earlier demo in this folder."),
    click.option("--seed", default=42, show_default=True, type=SEED, help="Seed of data, weights and training."),
    machine_options,
)
