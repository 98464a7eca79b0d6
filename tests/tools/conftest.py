"""Fixtures of the tools' tests: an untrained model that prunes, and two runs."""

import shutil
from pathlib import Path

import pytest
import torch
from stages import stage

from support.checkpoint import load_model, save_model
from support.process import Process
from tools.predict import Predictor, predict_file


@pytest.fixture(scope="session")
def hard(demo, tmp_path_factory) -> Path:
    """The demo's untrained model with thresholds at which some tokens go in each layer but the first."""
    folder = tmp_path_factory.mktemp("hard") / "hard"
    shutil.copytree(demo / "model", folder)
    model = load_model(folder, ("negative", "positive"), prune_mode="absolute_threshold").model
    model.thresholds.data = torch.tensor([0.0, 0.004, 0.0065, 0.009])
    save_model(folder, model)
    return folder


@pytest.fixture(scope="session")
def runs(demo, source, tmp_path_factory) -> Path:
    """Folders of two short trainings, the second with an evaluation every step, and the answers of the second."""
    folder = tmp_path_factory.mktemp("runs")
    stage(source, "finetune", demo / "model", folder / "dense", batch_size=50, epochs=0.4, load_best=True)
    soft = {"batch_size": 50, "save_steps": 1, "threshold_learning_rate": 3e-3}
    stage(source, "soft", folder / "dense", folder / "soft", **soft)
    predict_file(Predictor(folder / "soft", Process()), demo / "data" / "dev.jsonl", folder / "answers.jsonl")
    return folder
