"""Fixtures of the runs' tests: an own cache of data sets, and a model fine-tuned on the demo's task."""

from pathlib import Path

import pytest
from stages import stage


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """A cache of data sets for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="session")
def finetuned(demo, source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finetune"
    stage(source, "finetune", demo / "model", folder)
    return folder
