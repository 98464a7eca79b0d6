"""The loop, with a list for a run: what it tells its run, the best checkpoint, interruptions, resuming."""

import gc
import io
import math
import signal
import weakref
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from training import CLASSES, examples, mode_model

from support.errors import InputError, Interrupted
from support.process import Process
from support.settings import Settings
from tasks.base import Task
from tasks.classification import Classification
from tasks.evaluation import evaluate
from train import Trainer, train


class ListRun:
    """A run that keeps lists, and calls `at_step(trainer)` after each step."""

    def __init__(self, at_step=lambda trainer: None):
        self.losses, self.records, self.states, self.at_step = [], [], [], at_step
        self.stop_signal: int | None = None

    def note(self, trainer, loss, best):
        self.losses.append(loss)
        self.at_step(trainer)

    def record(self, trainer, record, saved):
        self.records.append((record, saved))

    def save_state(self, state):
        file = io.BytesIO()
        torch.save(state, file)
        self.states.append(file.getvalue())

    def last_checkpoint(self):
        return "The last checkpoint is on the Moon"

    def loaded(self, i: int = -1):
        return torch.load(io.BytesIO(self.states[i]), weights_only=True)


def make_trainer(mode: str = "finetune", task: Task = CLASSES, **changes) -> Trainer:
    """Six steps an epoch, with dropout, so that the state of the random generator matters."""
    model = mode_model(mode, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    settings = Settings(**{"batch_size": 4, "epochs": 2.0, "learning_rate": 1e-3, "save_steps": 5} | changes)
    torch.manual_seed(settings.seed)
    return Trainer(model, mode, task, examples(24), settings)


DEV = {"": examples(9, seed=7)}


@dataclass(frozen=True)
class Scripted(Classification):
    """A task whose scores are given beforehand."""

    scores: ClassVar[list[float]] = []

    def judge(self, examples, logits):
        return {"accuracy": 0.0}, self.scores.pop(0)


def scripted(*scores: float) -> Task:
    task = Scripted(*(getattr(CLASSES, name) for name in ("name", "labels", "metric", "text", "pair", "label")))
    task.scores[:] = scores
    return task


def test_the_loop_learns_and_tells_its_run():
    run, trainer = ListRun(), make_trainer("soft", epochs=4.0, learning_rate=3e-3)
    result = train(trainer, DEV, run)
    assert len(run.losses) == result.steps == 24 and np.mean(run.losses[-6:]) < np.mean(run.losses[:6])
    assert [record["step"] for record, _ in run.records] == [5, 10, 15, 20, 24] and len(run.states) == 5
    assert run.records[0][0]["train_loss"] == pytest.approx(np.mean(run.losses[:5]))
    assert run.records[1][0]["train_loss"] == pytest.approx(np.mean(run.losses[5:10]))
    assert run.records[0][0]["epoch"] == pytest.approx(5 / 6)
    assert result.best in [record for record, saved in run.records if saved]
    assert 0 < result.seconds_per_step and 0 < result.mean_seconds_per_step


def test_each_example_comes_once_an_epoch_and_a_run_may_end_within_one():
    trainer = make_trainer(epochs=1.5)
    batches = list(trainer.batches())
    assert len(batches) == trainer.steps == 9 and sorted(np.concatenate(batches[:6])) == list(range(24))
    trainer.completed = 4
    assert all(map(np.array_equal, trainer.batches(), batches[4:]))


@pytest.mark.parametrize("load_best, saved, step", [(True, [True, True, False], 4), (False, [True, True, True], 6)])
def test_the_best_or_the_last_checkpoint(load_best, saved, step):
    run, task = ListRun(), scripted(0.5, 0.9, 0.7)
    result = train(make_trainer(task=task, save_steps=2, epochs=1.0, load_best=load_best), DEV, run)
    assert [flag for _, flag in run.records] == saved and result.best["step"] == step


@pytest.mark.parametrize("mode", ["finetune", "soft", "hard", "topk"])
@pytest.mark.parametrize("stop", [3, 5])  # between two evaluations, and in the step before one
def test_stopped_and_resumed_is_straight_through(mode, stop):
    changes = {"target_flops": 0.5, "temperature_end": 1e-4, "threshold_learning_rate": 1e-3} if mode == "soft" else {}
    straight, straight_run = make_trainer(mode, **changes), ListRun()
    train(straight, DEV, straight_run)

    def interrupt(trainer):
        run.stop_signal = signal.SIGTERM if trainer.completed == stop - 1 else run.stop_signal

    run, stopped = ListRun(interrupt), make_trainer(mode, **changes)
    with pytest.raises(Interrupted, match=f"stopped after step {stop} of 12$") as caught:
        train(stopped, DEV, run)
    assert caught.value.number == signal.SIGTERM
    assert len(run.states) == 1  # also where an evaluation has just saved one
    resumed, last_run = make_trainer(mode, **changes), ListRun()
    torch.manual_seed(1)  # the state brings its own
    train(resumed, DEV, last_run, run.loaded())
    for (name, a), (_, b) in zip(straight.model.state_dict().items(), resumed.model.state_dict().items()):
        assert a.equal(b), name
    assert run.losses + last_run.losses == straight_run.losses
    timed = {"seconds": 0, "examples_per_second": 0}
    expected = [(record | timed, saved) for record, saved in straight_run.records]
    assert [(record | timed, saved) for record, saved in run.records + last_run.records] == expected
    if mode == "soft":
        assert len({record["lambda"] for record, _ in expected}) > 1  # λ was steered


def test_a_signal_in_the_last_step_leaves_the_evaluation_to_a_resumed_run():
    run = ListRun(lambda trainer: setattr(run, "stop_signal", signal.SIGINT) if trainer.completed == 11 else None)
    with pytest.raises(Interrupted, match="stopped after step 12 of 12"):
        train(make_trainer(), DEV, run)
    straight, resumed = ListRun(), ListRun()
    train(make_trainer(), DEV, straight)
    train(make_trainer(), DEV, resumed, run.loaded(-1))
    assert not resumed.losses
    names = ("step", "train_loss", "metrics", "loss")
    (ours, _), (theirs, _) = resumed.records[-1], straight.records[-1]
    assert [ours[name] for name in names] == [theirs[name] for name in names]


def test_a_signal_during_an_evaluation_is_obeyed_at_once():
    class Asked(ListRun):
        asked = 0

        @property
        def stop_signal(self):
            self.asked += 1
            return signal.SIGTERM if self.asked > 8 else None  # 5 steps ask, then each batch of the evaluation

        @stop_signal.setter
        def stop_signal(self, value):
            pass

    run, big = Asked(), {"": make_trainer().train_set}
    with pytest.raises(Interrupted, match="stopped after step 5 of 12") as caught:
        train(make_trainer(), big, run)
    assert caught.value.number == signal.SIGTERM and not run.records and len(run.states) == 1


def test_a_resumed_run_does_not_keep_the_state_that_it_came_from():
    first, alive = ListRun(), []
    train(make_trainer(), DEV, first)
    states = [first.loaded(0)]
    weights = weakref.ref(states[0]["model"]["layers.0.intermediate.weight"])
    assert weights() is not None

    def look(trainer):
        gc.collect()
        alive.append(weights() is not None)

    train(make_trainer(), DEV, ListRun(look), states.pop())
    assert alive and not any(alive)


def test_a_loss_that_is_not_finite_stops_the_run():
    message = r"step \d: the loss is not finite any more; lower the learning rate. The last checkpoint is on the Moon"
    with pytest.raises(InputError, match=message):
        train(make_trainer(learning_rate=1e30, warmup=0.0), DEV, ListRun())

    def poison(step: int):
        def at_step(trainer):
            if trainer.completed == step:
                trainer.model.head.output.bias.data.fill_(math.nan)

        return at_step

    for step, place in ((3, 4), (5, 5)):  # found in the next step, or by the evaluation before it
        run = ListRun(poison(step))
        with pytest.raises(InputError, match=f"step {place}: the loss is not finite any more"):
            train(make_trainer(), DEV, run)
        assert not run.records


def test_thresholds_follow_a_target_at_each_evaluation_of_hard_training():
    run, trainer = ListRun(), make_trainer("hard", target_flops=0.6)
    train(trainer, DEV, run)
    assert all(record["threshold_scale"] > 0 for record, _ in run.records)
    share = evaluate(trainer.model, CLASSES, {"": trainer.train_set}, Process())[0].relative_flops
    assert 0.5 < share <= 0.6
    assert torch.equal(trainer.pruner().pruner.thresholds, trainer.model.thresholds)  # the next step's
