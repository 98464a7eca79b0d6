"""Settings and errors: defaults, ranges, spellings."""

import doctest
import importlib
import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from model import Config
from support import settings as names
from support.errors import InputError
from support.settings import STAGES, Settings, check_settings, flag, soft_target

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 0}, "--batch-size 0: expected at least 1"),
        ({"learning_rate": math.nan}, "--lr nan"),
        ({"learning_rate": math.inf}, "--lr inf"),
        ({"epochs": 0}, "--epochs 0: expected more than 0"),
        ({"temperature": 0.0}, "--temperature 0"),
        ({"warmup": 2.0}, "--warmup 2.0"),
        ({"save_steps": 0}, "--save-steps 0"),
        ({"target_flops": 0.0}, "--target-flops 0.0"),
        ({"target_flops": 1.5}, "--target-flops 1.5"),
        ({"distill_weight": 1.1}, "--distill-weight 1.1"),
        ({"temperature_end": -1.0}, "--temperature-end -1.0"),
        ({"temperature_end": math.nan}, "--temperature-end nan"),
        ({"regularization": -1.0}, "--lambda -1.0"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 2**32}, "--seed 4294967296"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(InputError, match=message):
        check_settings(Settings(**change))


def test_every_stages_defaults_are_in_range():
    for changes in STAGES.values():
        check_settings(Settings(**changes))
    check_settings(Settings(**soft_target(512)))
    check_settings(Settings(target_flops=1.0, temperature_end=1e-9, save_steps=1, warmup=1.0, distill_weight=1.0))


def test_a_targets_defaults_are_on_the_scale_of_the_scores():
    at_128, at_512 = soft_target(128), soft_target(512, "max_length")
    assert soft_target(512, "length") == at_128
    assert at_128.pop("mask_attention") is at_512.pop("mask_attention") is True  # on no scale
    assert set(at_128) == {"temperature", "temperature_end", "threshold_learning_rate"}
    assert {name: value / 4 for name, value in at_128.items()} == pytest.approx(at_512)


def test_every_setting_has_help_and_spellings_are_unique():
    assert all(setting.metadata["help"] for setting in fields(Settings))
    assert flag("regularization") == "--lambda" and flag("max_grad_norm") == "--max-grad-norm"
    assert len({flag(setting.name) for setting in fields(Settings)}) == len(fields(Settings))


def test_defaults_of_the_configuration_are_the_same():
    config = Config(10, 2, 2, 1, 3, 20)
    assert config.final_token_threshold == names.FINAL_TOKEN_THRESHOLD
    assert config.token_keep_rate == names.TOKEN_KEEP_RATE
    assert config.max_seq_length == names.MAX_SEQ_LENGTH


def test_the_command_lines_imports_are_light():
    code = (
        "import sys, support.errors, support.settings, support.console\n"
        "print([name for name in ('torch', 'numpy', 'datasets', 'tokenizers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("name", ["errors", "settings", "files", "checkpoint"])
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(f"support.{name}"))
    assert result.attempted and not result.failed
