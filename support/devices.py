"""A model moved to a process's device and converted to what is fastest there: see cpu.py and cuda.py."""

from __future__ import annotations

import torch

from model import Model
from support.cpu import pack_weights, use_fast_dropout
from support.cuda import use_gpu
from support.errors import InputError
from support.process import Process


def for_inference(model: Model, process: Process) -> Model:
    """For weights that stay as they are: in bf16 all but the thresholds are rounded to it. Returns the model.

    Raises: InputError for an exported model that should round.
    """
    if not isinstance(model, Model):  # an exported one
        if process.device.type == "cpu" and process.precision != "fp32":
            raise InputError(f"--precision {process.precision}: an exported model computes as it was exported")
        return model
    model = use_gpu(model.to(process.device), process.precision)
    if process.precision == "bf16":
        thresholds = model.thresholds.data
        model.to(torch.bfloat16).thresholds.data = thresholds
    return pack_weights(model)


def for_training(model: Model, process: Process) -> Model:
    """For training, and the evaluations on its way. Returns the model."""
    return use_fast_dropout(use_gpu(model.to(process.device), process.precision))
