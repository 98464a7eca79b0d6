"""Settings of a training stage: every default once. The command line makes its options and their help from them.

Imports the standard library only, so that `--help` answers at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from support.errors import InputError

# Pruning settings live in a checkpoint's config.json; these values hold where it has none.
FINAL_TOKEN_THRESHOLD = 0.01  # θ_final, the last layer's threshold before learning: the authors' value
TOKEN_KEEP_RATE = 0.2  # share of tokens that top-k keeps in the last layer
MAX_SEQ_LENGTH = 128  # a text is cut to this many tokens
QUESTION_LENGTH = 384  # a question with a part of its context is cut to this many tokens

TASK_NAMES = ("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "SQuAD", "SQuAD2")

# Stages, and the defaults in which they differ from `Settings`. The epochs are the authors'. Soft training keeps its
# last checkpoint: the best score belongs to the checkpoint that prunes least.
STAGES: dict[str, dict[str, Any]] = {
    "finetune": {},
    "soft": {"epochs": 10.0, "load_best": False},
    "hard": {"epochs": 5.0},
    "topk": {"epochs": 5.0},
    "manual": {"epochs": 5.0},
}


def setting(default: Any, help: str, *flags: str, **click_options: Any) -> Any:
    """A dataclass field with its help text and command-line spellings. Without `flags` its name is the spelling."""
    return field(default=default, metadata={"help": help, "flags": flags, **click_options})


@dataclass
class Settings:
    """How a training stage runs. `STAGES` holds the defaults that differ from stage to stage."""

    learning_rate: float = setting(2e-5, "Peak learning rate of the weights.", "--lr", "--learning-rate")
    weight_decay: float = setting(0.0, "AdamW's weight decay; biases and norms have none.")
    batch_size: int = setting(32, "Examples per optimizer step, summed over all processes.", "--batch-size", "--bs")
    epochs: float = setting(3.0, "Passes over the training data; may be a fraction.", "--epochs", "--epoch")
    accumulate: int = setting(1, "Split each batch into this many parts and run them in turn, to save memory.")
    warmup: float = setting(0.06, "Share of the steps in which the learning rates rise; then they fall linearly to 0.")
    max_grad_norm: float = setting(
        1.0, "Clip the weights' gradient to this norm. That of the thresholds is not clipped."
    )
    regularization: float = setting(
        0.1,
        "λ, the weight of the kept tokens in the loss. A higher λ prunes more (0.01 to 0.2 in the paper).",
        "--lambda",
        "--lambda-threshold",
    )
    temperature: float = setting(
        5e-4, "τ, the softness of the soft mask. A lower τ is closer to dropping tokens (1e-4 to 2e-3 in the paper)."
    )
    threshold_learning_rate: float = setting(
        2e-5, "Peak learning rate of the thresholds. With --target-flops it stays at the peak.", "--lr-threshold"
    )
    threshold_weight_decay: float = setting(0.0, "Weight decay of the thresholds.", "--weight-decay-threshold")
    save_steps: int | None = setting(
        None,
        "Evaluate and save after every N steps.  [default: after every epoch]",
        "--save-steps",
        "--save-step",
        type=int,
    )
    target_flops: float | None = setting(
        None,
        "Prune to this share of the dense FLOPs, such as 0.5. Training then finds λ (soft), the thresholds' scale "
        "(hard, manual) or the keep rate (topk). In soft other defaults change, too: `soft --help` lists them.",
        type=float,
    )
    temperature_end: float | None = setting(
        None,
        "τ falls to this value by the end, if it is above. Soft and hard decisions then come to agree.",
        type=float,
    )
    mask_attention: bool = setting(
        False,
        "What a soft mask multiplies: the attention that later layers pay to the token, which comes closer to dropping "
        "it, or the layer's output, as in the paper.",
        "--mask-attention/--mask-output",
    )
    distill_weight: float = setting(
        0.5, "With --distill: weight of the teacher's answers in the loss; the labels have the rest."
    )
    load_best: bool = setting(
        True, "Keep the checkpoint with the best score, or the last one.", "--load-best/--no-load", " /--no-load-best"
    )
    seed: int = setting(42, "Seed of the data order, dropout and new weights.")


@dataclass
class PruningOptions:
    """Pruning settings that a stage may change in the checkpoint's configuration; None keeps the checkpoint's value."""

    final_token_threshold: float | None = None
    token_keep_rate: float | None = None
    keep_rates: list[float] | None = None
    score_norm: str | None = None
    max_seq_length: int | None = None
    protect_question: bool | None = None
    read_dropped: bool | None = None


def flag(name: str) -> str:
    """The command-line spelling of a setting; of a switch, the one that turns it on.

    >>> flag("learning_rate"), flag("warmup")
    ('--lr', '--warmup')
    """
    metadata = next(f.metadata for f in fields(Settings) if f.name == name)
    return (metadata["flags"] or (f"--{name.replace('_', '-')}",))[0].split("/")[0]


def soft_target(max_length: int, score_norm: str = "max_length") -> dict[str, Any]:
    """Defaults of soft training with --target-flops: masks on attention, fast thresholds, a τ that falls.

    The last three are on the scale of the scores. With score_norm "max_length" the scores are divided by `max_length`,
    and the values were chosen at 128 tokens.
    """
    scale = 128 / max_length if score_norm == "max_length" else 1.0
    return {
        "mask_attention": True,
        "temperature": 1e-3 * scale,
        "temperature_end": 2e-4 * scale,
        "threshold_learning_rate": 1e-4 * scale,
    }


# Smallest allowed values. A positive fraction stands for "more than 0".
LOWEST = {
    "batch_size": 1,
    "accumulate": 1,
    "epochs": 1e-9,
    "learning_rate": 0,
    "max_grad_norm": 1e-9,
    "warmup": 0,
    "temperature": 1e-12,
    "threshold_learning_rate": 0,
    "weight_decay": 0,
    "regularization": 0,
    "threshold_weight_decay": 0,
    "seed": 0,
    "distill_weight": 0,
}


def check_settings(settings: Settings) -> None:
    """Raises InputError, naming the option and its value, for a setting out of range."""

    def bad(name: str, expected: str) -> InputError:
        return InputError(f"{flag(name)} {getattr(settings, name)}: {expected}")

    for name, low in LOWEST.items():
        value = getattr(settings, name)
        if not (math.isfinite(value) and value >= low):
            raise bad(name, "expected more than 0" if 0 < low < 1 else f"expected at least {low}")
    if settings.save_steps is not None and settings.save_steps < 1:
        raise bad("save_steps", "expected at least 1")
    if settings.target_flops is not None and not 0 < settings.target_flops <= 1:
        raise bad("target_flops", "expected more than 0 and at most 1")
    if settings.temperature_end is not None and not settings.temperature_end > 0:
        raise bad("temperature_end", "expected more than 0")
    if settings.distill_weight > 1:
        raise bad("distill_weight", "expected at most 1")
    if settings.seed > 2**31:
        raise bad("seed", f"expected at most {2**31}")
    if settings.epochs > 1e6:
        raise bad("epochs", "expected at most 1e6")
    if settings.warmup > 1:
        raise bad("warmup", "is a share of the steps, expected 0 to 1")
