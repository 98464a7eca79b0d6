"""Training and evaluation: one hand-written loop for every stage, in one process or in many under torchrun.

    stage      training pass                     evaluation        learns                   thresholds at the start
    finetune   dense                             dense             weights                  none
    soft       masks multiply, nothing dropped   drops below θ     weights and thresholds   a ladder, or the model's
    hard       drops below θ                     the same          weights                  those that `soft` learned
    manual     drops below θ                     the same          weights                  a ladder
    topk       keeps the highest scores          the same          weights                  none

runs/stage.py loads the model, sets the thresholds of this table, and calls `train`. With a FLOPs target, `soft` finds λ
while it trains, and the thresholds are multiplied by one factor that meets the target: before the first step (in
runs/stage.py), at the end of `soft`, and at each evaluation of `hard` and `manual`. Nothing else changes thresholds
that are not learned.

The defaults (support/settings.py): 32 examples a batch; a peak learning rate of 2e-5, for weights and thresholds; 10
epochs of `soft` with λ = 0.1 and τ = 5e-4; 5 epochs of `hard`. With a target the thresholds learn at 1e-4, and τ falls
from 1e-3 to 2e-4.

Read from top to bottom: optimizer, schedule, losses, budget, the step, the loop.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from data import IGNORED, Examples, epoch_batches, token_batches
from model import Config, Hard, Model, Output, Pruner, SelfAttention, Soft, UnscoredLastLayer, macs, send
from support.errors import InputError, Interrupted
from support.process import Process
from support.settings import Settings
from tasks.base import Task, task_loss
from tasks.evaluation import evaluate

# How the checkpoint of each stage prunes in inference, in the words of its config.json.
PRUNE_MODES = {
    "finetune": None,
    "soft": "absolute_threshold",
    "hard": "absolute_threshold",
    "manual": "absolute_threshold",
    "topk": "topk",
}

# ----------------------------------------------------------------------------------------------------------------------
# Optimizer and schedule


def make_optimizer(model: Model, settings: Settings) -> torch.optim.AdamW:
    """AdamW with three groups: weights, weights without decay (biases and norms), and thresholds where they learn."""
    weights = weights_of(model)
    matrices = [weight for weight in weights if weight.ndim > 1]
    vectors = [weight for weight in weights if weight.ndim == 1]
    groups = [
        {"params": matrices, "lr": settings.learning_rate, "weight_decay": settings.weight_decay},
        {"params": vectors, "lr": settings.learning_rate, "weight_decay": 0.0},
    ]
    if model.thresholds.requires_grad:
        rates = {"lr": settings.threshold_learning_rate, "weight_decay": settings.threshold_weight_decay}
        groups.append({"params": [model.thresholds], **rates})
    return torch.optim.AdamW(groups, eps=1e-8, fused=True)


def weights_of(model: Model) -> list[Tensor]:
    """All parameters but the thresholds."""
    return [parameter for name, parameter in model.named_parameters() if name != "thresholds"]


def rate_factor(step: int, steps: int, warmup: float, fall: bool = True) -> float:
    """The learning rate at `step` (from 0) as a share of its peak: linearly up over warmup · steps, linearly down to 0.

    Without `fall` it stays at the peak.
    """
    rising = max(1, round(steps * warmup))
    up, down = (step + 1) / rising, (steps - step) / max(1, steps - rising + 1)
    return min(up, down if fall else 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# Losses, summed over K choices. A choice is what one row of logits decides: the class or score of a sequence, the tag
# of a token, the token where an answer starts. A target of IGNORED does not count

DISTILL_TEMPERATURE = 2.0


def distillation_loss(logits: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """How far answers are from the teacher's. logits and teacher (K, C), targets (K,) -> ().

    Kullback-Leibler divergence at DISTILL_TEMPERATURE, times its square (Hinton et al., arXiv 1503.02531); squared
    error where there is one output.
    """
    if logits.size(1) == 1:
        return F.mse_loss(logits.float(), teacher, reduction="sum")
    student, teacher = ((x.float() / DISTILL_TEMPERATURE).log_softmax(-1) for x in (logits, teacher))
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return DISTILL_TEMPERATURE**2 * divergence.where(targets != IGNORED, 0.0).sum()


def mask_sum(output: Output) -> Tensor:
    """Σ_l Σ_t m_l(t) of a soft pass: (). Over the number of tokens, it is the regulariser of equation 9.

    (The FLOPs of a budget count products of masks instead: a token that an earlier mask has closed costs nothing.)
    """
    return torch.stack([step.decision.mask.sum() for step in output.steps]).sum()


# ----------------------------------------------------------------------------------------------------------------------
# Budget: pruning to a share of the dense FLOPs

BUDGET_MARGIN = 0.03  # a checkpoint that takes this much more than its target is worse than any that does not
SAMPLE = 256  # training examples on which the thresholds are scaled to a target


def relative_flops(config: Config, lengths: Tensor, kept: Tensor) -> float:
    """FLOPs of sequences (B,) of which `kept` (L, B) tokens survive the layers, as a share of the dense model's."""
    return float(macs(config, lengths, kept).sum() / macs(config, lengths, lengths.expand(len(kept), -1)).sum())


class Budget:
    """Steers λ so that the soft masks take `target` of the dense FLOPs, as a proportional-integral controller does."""

    PROPORTIONAL, INTEGRAL = 10.0, 0.3  # gains: λ for an error of 1, and what the integral grows by in a step
    LOWEST, HIGHEST = -1.0, 30.0  # bounds of the integral; a negative λ asks for more tokens

    def __init__(self, target: float):
        self.target = target
        self.integral = 0.0

    def update(self, relative: float) -> float:
        """The next step's λ, after a batch that took `relative` of its dense FLOPs."""
        error = relative - self.target
        self.integral = min(max(self.integral + self.INTEGRAL * error, self.LOWEST), self.HIGHEST)
        return self.integral + self.PROPORTIONAL * error


@torch.inference_mode()
def scale_thresholds(model: Model, examples: Examples, target: float, process: Process) -> float | None:
    """Multiplies the thresholds by the factor with which a sample of the examples takes `target` of the dense FLOPs.

    The main process finds the factor, and all take it. Returns it; None, with the thresholds as they were, where no
    factor prunes enough.
    """
    start = model.thresholds.detach().clone()
    factor = find_factor(model, examples, target, process) if process.main else None
    factor = process.broadcast(factor)
    model.thresholds.data.copy_(start * (factor or 1.0))
    return factor


@torch.inference_mode()
def find_factor(model: Model, examples: Examples, target: float, process: Process) -> float | None:
    """The factor of `scale_thresholds`, by bisection, dropping tokens as inference does. Changes the thresholds.

    Examples without labels may be of another kind, and do not count.
    """
    model.eval()
    sample = np.random.default_rng(0).permutation(len(examples) - examples.unlabelled)[:SAMPLE]
    sample = sample[np.argsort(examples.lengths[sample], kind="stable")]
    batches = [examples.batch(indices).to(process.device) for indices in token_batches(sample, examples.lengths, 64)]
    lengths = torch.cat([batch.lengths for batch in batches])
    start = model.thresholds.clone()

    def cost(factor: float) -> float:
        """The share of the dense FLOPs with the thresholds times the factor."""
        model.thresholds.copy_(start * factor)
        pruner = Hard(model.thresholds)
        with process.autocast(model):
            kept = torch.cat([model(batch, pruner).kept for batch in batches], 1)
        return relative_flops(model.config, lengths, kept)

    low, high = 0.0, 1.0
    while cost(high) > target:
        if high > 10_000:
            return None
        low, high = high, 2 * high
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= target else (middle, high)
    return high


# ----------------------------------------------------------------------------------------------------------------------
# The step


class Trainer:
    """A model in training: its optimizer, its schedule, its step."""

    def __init__(
        self,
        model: Model,
        stage: str,
        task: Task,
        train_set: Examples,
        settings: Settings,
        process: Process = Process(),
    ):
        """stage: a row of the table above. model: with the thresholds that the stage starts from."""
        model.config = replace(model.config, prune_mode=PRUNE_MODES[stage])  # how evaluation will prune
        model.thresholds.requires_grad_(stage == "soft")
        self.model, self.stage, self.task = model.to(process.device), stage, task
        self.train_set, self.settings, self.process = train_set, settings, process
        self.replica = DistributedDataParallel(model) if process.world > 1 else model
        self.optimizer = make_optimizer(model, settings)
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.steps_per_epoch = math.ceil(len(train_set) / settings.batch_size)
        self.steps = max(1, round(settings.epochs * self.steps_per_epoch))
        self.save_steps = settings.save_steps or self.steps_per_epoch
        self.completed = 0  # steps
        self.recent_losses: list[float] = []  # of the steps since the last evaluation
        self.soft_flops = 0.0  # relative FLOPs of the last step by its soft masks; 0 in other stages
        self.budget = Budget(settings.target_flops) if stage == "soft" and settings.target_flops else None
        self.regularization = 0.0 if self.budget else settings.regularization  # λ
        # The pruner of stages that learn no thresholds is made once: making it waits for the device.
        self.frozen_pruner = UnscoredLastLayer(model)

    def pruner(self) -> Pruner:
        """The pruner of the next training pass."""
        if self.stage == "soft":
            return Soft(self.model.thresholds, self.temperature(), self.settings.mask_attention)
        return self.frozen_pruner

    def temperature(self) -> float:
        """τ falls exponentially to `temperature_end`, if that is lower."""
        start, end = self.settings.temperature, self.settings.temperature_end or self.settings.temperature
        return start * min(1.0, end / start) ** (self.completed / self.steps)

    def set_rates(self) -> None:
        """Sets the learning rates of the next step."""
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates):
            # With a budget the thresholds' rate stays constant: λ keeps changing until the last step.
            steered = self.budget is not None and group["params"][0] is self.model.thresholds
            group["lr"] = peak * rate_factor(self.completed, self.steps, self.settings.warmup, fall=not steered)

    def batches(self) -> Iterator[np.ndarray]:
        """The global batches of the steps that remain, as indices, epoch after epoch."""
        step, length = self.completed, self.steps_per_epoch
        while step < self.steps:
            epoch, first = divmod(step, length)
            batches = epoch_batches(self.train_set.lengths, self.settings.batch_size, self.settings.seed, epoch)
            batches = batches[first : first + self.steps - step]
            yield from batches
            step += len(batches)

    def step(self, indices: np.ndarray, stop: Callable[[], bool] = lambda: False) -> tuple[float, bool]:
        """One optimizer step on a global batch. stop: tells whether this process was asked to stop.

        Returns the batch's mean loss, without λ's part, and whether any process was asked to stop. Beside the model's
        own passes it waits for the device once.
        Raises: FloatingPointError for a loss or gradient that is not finite.
        """
        self.set_rates()
        self.model.train()
        loss_and_flops = self.backward(indices)
        sums = self.process.sum(torch.cat([loss_and_flops, loss_and_flops.new_full((1,), float(stop()))]))
        norm = torch.nn.utils.clip_grad_norm_(weights_of(self.model), self.settings.max_grad_norm)
        if self.stage == "soft":
            norm = norm + self.model.thresholds.grad.norm()  # checked, but not clipped
        loss, self.soft_flops, stops, norm = torch.cat([sums, norm.double()[None]]).tolist()  # waits for the device
        if not math.isfinite(loss + norm):
            raise FloatingPointError(
                f"step {self.completed + 1}: the loss is not finite any more; lower the learning rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.stage == "soft":
            self.model.thresholds.data.clamp_(min=0.0)  # below 0 the sigmoid is flat, and there is no way back
        if self.budget:
            self.regularization = self.budget.update(self.soft_flops)
        self.completed += 1
        self.recent_losses.append(loss)
        return loss, stops > 0

    def backward(self, indices: np.ndarray) -> Tensor:
        """Leaves the gradient of a global batch in the parameters.

        Loss = mean task loss over the batch + λ Σ_l mean of m over its tokens (equation 9 of the paper); with a budget,
        λ · relative FLOPs instead. All means are over the global batch: each process and each part contributes its sum,
        divided by the counts of the whole. So neither the number of processes nor `accumulate` changes the gradient.
        Returns this process's part of the loss, without λ's part, and of the relative FLOPs: (2,) float64.
        """
        lengths, world = torch.from_numpy(self.train_set.lengths[indices]), self.process.world
        num_targets, num_tokens = max(1, self.task.count_targets(self.train_set, indices)), int(lengths.sum())
        dense = int(macs(self.model.config, lengths, lengths.expand(len(self.model.layers), -1)).sum())
        totals = torch.zeros(2, dtype=torch.float64, device=self.process.device)
        parts = np.array_split(indices, min(self.settings.accumulate, len(indices)))
        for i, part in enumerate(parts):
            mine = part[self.process.rank :: world]
            # DistributedDataParallel takes the mean over processes: times their number it is the sum. Every process
            # must take part in it, so one without examples computes one that counts nothing.
            count_as = world if len(mine) else 0
            exchange_later = world > 1 and i + 1 < len(parts)
            with self.replica.no_sync() if exchange_later else contextlib.nullcontext():
                loss, used, masks = self.losses(mine if len(mine) else part[:1])
                loss, flops = loss / num_targets, used / dense
                penalty = flops if self.budget else masks / num_tokens
                (count_as * (loss + self.regularization * penalty)).backward()
            if len(mine):
                totals += torch.stack([loss, flops]).detach()
        clear_flat_gradients(self.model)
        return totals

    def losses(self, indices: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Runs some examples. Returns three sums over them: the loss (the task's mixed with the teacher's), the
        multiply-accumulates by the soft counts, and the soft masks. The last two are 0 in other stages."""
        batch = self.train_set.batch(indices).to(self.process.device)
        targets = send(self.task.targets(self.train_set, indices), self.process.device)
        with self.process.autocast(self.model):
            output = self.replica(batch, self.pruner())
        lengths = torch.from_numpy(self.train_set.lengths[indices])  # on the host
        choices = self.task.choices(output.logits, lengths)
        loss = task_loss(choices, targets)
        if self.train_set.teacher is not None:
            rows = indices if self.task.head == "sequence" else self.train_set.rows(indices)
            teacher = self.task.choices(send(self.train_set.teacher[rows], self.process.device), lengths)
            weight = self.settings.distill_weight
            loss = (1 - weight) * loss + weight * distillation_loss(choices, teacher, targets)
        if self.stage != "soft":
            return loss, loss.new_zeros(()), loss.new_zeros(())
        return loss, macs(self.model.config, batch.lengths, output.kept).sum(), mask_sum(output)

    def meet_target(self) -> float | None:
        """Scales the thresholds to a FLOPs target: after the last step of `soft`, always in `hard` and `manual`.

        Returns the factor, None without a target. `frozen_pruner` holds the same tensor, and a factor above 0 leaves in
        place which layers can drop: it need not be remade.
        """
        last = self.completed == self.steps
        if self.settings.target_flops and (self.stage in ("hard", "manual") or (self.stage == "soft" and last)):
            return scale_thresholds(self.model, self.train_set, self.settings.target_flops, self.process)
        return None

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs of the trainer. Every process must call it."""
        return {
            "step": self.completed,
            "losses": self.recent_losses,
            "soft_flops": self.soft_flops,
            "regularization": self.regularization,
            "integral": self.budget and self.budget.integral,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.process.gather(self.process.random_state()),  # in rank order
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was made. With another number of processes dropout differs, the data order does not."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.completed, self.regularization = state["step"], state["regularization"]
        self.recent_losses, self.soft_flops = state["losses"], state["soft_flops"]
        if self.budget:
            self.budget.integral = state["integral"]
        self.frozen_pruner = UnscoredLastLayer(self.model)
        if len(state["random"]) == self.process.world:
            self.process.set_random_state(state["random"][self.process.rank])
        else:
            torch.manual_seed(self.settings.seed + self.completed * self.process.world + self.process.rank)


def clear_flat_gradients(model: Model) -> None:
    """Sets gradients to 0 that are 0 but for rounding: Adam would make whole steps in a random direction of them.

    A key's bias adds the same to all logits of a query, and a span head's bias the same to the logits of all tokens;
    softmax ignores both.
    """
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.query_key_value.bias.grad.chunk(3)[1].zero_()
    if model.config.head == "span":
        model.head.output.bias.grad.zero_()


# ----------------------------------------------------------------------------------------------------------------------
# The loop


class Run(Protocol):
    """What the loop calls. runs/folder.py writes a folder; a test may keep lists."""

    stop_signal: int | None  # the signal that asked this process to stop

    def note(self, trainer: Trainer, loss: float, best: dict[str, Any] | None) -> None: ...  # after each step

    def record(self, trainer: Trainer, record: dict[str, Any], saved: bool) -> None: ...  # saved: keep this checkpoint

    def save_state(self, state: dict[str, Any]) -> None: ...  # what a resumed run needs

    def last_checkpoint(self) -> str: ...  # a sentence on where the last good checkpoint is


@dataclass
class Result:
    """What a training run leaves behind."""

    best: dict[str, Any]  # the record of the evaluation that belongs to the checkpoint
    steps: int
    seconds_per_step: float  # median of this process's steps, without evaluation; nan if it made none
    mean_seconds_per_step: float


def train(trainer: Trainer, dev_sets: dict[str, Examples], run: Run, state: dict[str, Any] | None = None) -> Result:
    """Trains to the last step, and evaluates at the end of each epoch or every `save_steps` steps.

    state: what `run.save_state` was given, to go on from there. Evaluation prunes as inference will.
    Raises: InputError when loss or gradient are not finite any more; Interrupted after a signal, with the state saved.
    """
    best, due, times = None, False, []
    if state:
        trainer.load_state(state)
        best, due = state["best"], state["due"]
        state = None  # frees its copy of the model
    try:
        if due:  # the run was stopped on the way to this evaluation, or before its end
            best = assess(trainer, dev_sets, run, best)
        for indices in trainer.batches():
            start = time.perf_counter()
            loss, stop = trainer.step(indices, stop=lambda: run.stop_signal is not None)
            times.append(time.perf_counter() - start)
            run.note(trainer, loss, best)
            due = trainer.completed == trainer.steps or trainer.completed % trainer.save_steps == 0
            if due or stop:
                # Saved before the evaluation: whatever ends the run during it, a resumed one begins with it.
                run.save_state(trainer.state() | {"best": best, "due": due})
            if stop:
                raise interrupted(trainer, run)
            if due:
                best = assess(trainer, dev_sets, run, best)
    except FloatingPointError as error:
        raise InputError(f"{error}. {run.last_checkpoint()}") from None
    median, mean = (float(f(times)) if times else math.nan for f in (np.median, np.mean))
    return Result(best, trainer.steps, median, mean)


def interrupted(trainer: Trainer, run: Run) -> Interrupted:
    """The error after a signal, when the state is saved."""
    message = f"stopped after step {trainer.completed} of {trainer.steps}"
    return Interrupted(message, run.stop_signal or signal.SIGTERM)  # without one, it was another process's signal


def assess(trainer: Trainer, dev_sets: dict[str, Examples], run: Run, best: dict[str, Any] | None) -> dict[str, Any]:
    """Evaluates, has the run keep the checkpoint if it is the best, and returns the record of the best."""

    def check() -> None:
        if run.stop_signal is not None:
            raise interrupted(trainer, run)

    record = evaluation_record(trainer, dev_sets, check)
    trainer.recent_losses = []
    saved = best is None or is_better(record, best, trainer.settings)
    run.record(trainer, record, saved)
    return record if saved else best


def evaluation_record(trainer: Trainer, dev_sets: dict[str, Examples], check: Callable[[], object]) -> dict[str, Any]:
    """Meets the target, evaluates, and describes both.

    check: see `predict_logits`. Raises: FloatingPointError for a loss that is not finite.
    """
    scale = trainer.meet_target()
    evaluation, _ = evaluate(
        trainer.model, trainer.task, dev_sets, trainer.process, trainer.settings.batch_size, check=check
    )
    if not math.isfinite(evaluation.loss):
        raise FloatingPointError(f"step {trainer.completed}: the loss is not finite any more; lower the learning rate")
    record: dict[str, Any] = {
        "step": trainer.completed,
        "epoch": trainer.completed / trainer.steps_per_epoch,
        "train_loss": sum(trainer.recent_losses) / len(trainer.recent_losses),
    }
    if trainer.stage == "soft":
        record |= {"soft_relative_flops": trainer.soft_flops, "lambda": trainer.regularization}
    if scale:
        record |= {"threshold_scale": scale}
    by_threshold = PRUNE_MODES[trainer.stage] == "absolute_threshold"
    return record | asdict(evaluation) | {"thresholds": trainer.model.thresholds.tolist() if by_threshold else None}


def is_better(record: dict[str, Any], best: dict[str, Any], settings: Settings) -> bool:
    """Whether a checkpoint takes the place of the best one so far: a higher score, within the budget first."""
    if not settings.load_best:
        return True
    if settings.target_flops:
        limit = settings.target_flops + BUDGET_MARGIN
        best_fits, fits = best["relative_flops"] <= limit, record["relative_flops"] <= limit
        if fits != best_fits:
            return fits
    return record["score"] > best["score"]
