"""A model moved to a process's device and converted to what is fastest there: see cpu.py and cuda.py."""

from __future__ import annotations

from model import Model
from support.cpu import pack_weights, use_fast_dropout
from support.cuda import use_flat_attention
from support.process import Process


def for_inference(model: Model, process: Process) -> Model:
    """For weights that stay as they are. Returns the model."""
    return pack_weights(use_flat_attention(model.to(process.device)))


def for_training(model: Model, process: Process, stage: str) -> Model:
    """For training, and the evaluations on its way. Returns the model."""
    return use_fast_dropout(use_flat_attention(model.to(process.device), learns_scores=stage == "soft"))
