"""Help texts and defaults of the options. Help must answer at once."""

import re
import resource
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from ltp import main
from runs.stage import EvaluationOptions
from support.settings import STAGES, Settings
from tools.bench import BenchOptions

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "demo",
    "finetune",
    "soft",
    "hard",
    "topk",
    "manual",
    "sweep",
    "eval",
    "bench",
    "predict",
    "inspect",
    "export",
    "plot",
)


def run(*words: str):
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name):
    shown = run(name, "--help").stdout
    assert shown.startswith(f"Usage: main {name}") and main.commands[name].help
    for parameter in main.commands[name].params:
        if parameter.param_type_name == "option":
            assert parameter.help and all(option in shown for option in parameter.opts), parameter.name


def test_help_lists_the_commands_in_the_order_of_the_workflow():
    listed = re.findall(r"^  (\w+) ", run("--help").stdout.split("Commands:\n")[1], re.MULTILINE)
    assert tuple(listed) == COMMANDS


def test_help_imports_little_and_answers_at_once():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "ltp.py", "soft", "--help"], capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0 and "Usage" in result.stdout
    modules = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert {"click", "support.settings"} <= modules  # names are read as they are written
    packages = {name.split(".")[0] for name in modules}
    assert packages.isdisjoint(
        {"torch", "numpy", "datasets", "tokenizers", "safetensors", "rich", "tasks", "runs", "tools"}
    )
    # Processor time: the machine may be busy.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("stage", STAGES)
def test_settings_are_options_with_the_defaults_of_their_stage(stage):
    options = {option.name: option for option in main.commands[stage].params}
    names = [field.name for field in fields(Settings) if field.name in options]
    for name in names:
        assert options[name].default == (Settings(**STAGES[stage])).__dict__[name]
    missing = {field.name for field in fields(Settings)} - set(names)
    thresholds = {"temperature", "temperature_end", "threshold_learning_rate", "threshold_weight_decay"}
    thresholds.add("regularization")
    pruning = {"target_flops", "distill_weight"}
    assert missing == {"soft": set(), "finetune": thresholds | pruning}.get(stage, thresholds)


def test_soft_tells_what_a_target_changes():
    shown = " ".join(run("soft", "--help").stdout.split())
    assert "--temperature 0.001, --temperature-end 0.0002, --lr-threshold 0.0001" in shown


@pytest.mark.parametrize(
    "command, options, names",
    [
        ("bench", BenchOptions(), ("batch_sizes", "examples", "repeats", "seed")),
        ("eval", EvaluationOptions(), ("batch_size",)),
    ],
)
def test_commands_have_the_defaults_of_their_dataclass(command, options, names):
    defaults = {option.name: option.get_default(click.Context(main)) for option in main.commands[command].params}
    assert {name: defaults[name] for name in names} == {name: getattr(options, name) for name in names}
