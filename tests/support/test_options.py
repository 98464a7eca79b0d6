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
SECTIONS = {
    "First try": ["demo"],
    "Train": ["finetune", "soft", "hard", "topk", "manual", "sweep"],
    "Look at a model": ["eval", "bench", "inspect", "plot"],
    "Use a model": ["predict", "export"],
}
COMMANDS = [name for names in SECTIONS.values() for name in names]


def run(*words: str):
    result = CliRunner(env={"COLUMNS": "80"}).invoke(main, words)
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name):
    shown = run(name, "--help").stdout
    assert shown.startswith(f"Usage: main {name}") and main.commands[name].help
    for parameter in main.commands[name].params:
        if parameter.param_type_name == "option":
            assert parameter.help and all(option in shown for option in parameter.opts), parameter.name


def listed(help: str) -> dict[str, list[str]]:
    """The sections of a help text, and the first words of their rows."""
    parts = re.split(r"^(\w.*):\n", help, flags=re.MULTILINE)[1:]
    return {title: re.findall(r"^  (\S+?),? ", rows, re.MULTILINE) for title, rows in zip(parts[::2], parts[1::2])}


def test_help_lists_the_commands_in_the_order_of_the_workflow():
    assert list(listed(run("--help").stdout).items()) == [("Options", ["-h"]), *SECTIONS.items()]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_terminal_of_80_columns(name):
    """No summary of a command is cut, no option is broken, and no example is wrapped by the terminal."""
    shown = run("--help").stdout + run(name, "--help").stdout
    assert "..." not in run("--help").stdout.replace("[ARGS]...", "")
    assert max(map(len, shown.splitlines())) <= 80 and not re.search(r"--[\w-]+-\n", shown)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_options_by_section_and_the_rarely_needed_ones_last(name):
    sections = listed(run(name, "--help").stdout)
    options = [parameter for parameter in main.commands[name].params if parameter.param_type_name == "option"]
    assert sum(map(len, sections.values())) == len(options) + 1 and sections["Help"] == ["-h"]
    order = ["Model and data", "Pruning", "Training", "Output", "Your own data", "Optimizer", "Machine", "Help"]
    titles = [title for title in sections if title in order]
    assert titles == sorted(titles, key=order.index) and titles[-1] == "Help"


HEAVY = {"torch", "numpy", "datasets", "tokenizers", "transformers", "safetensors", "pandas", "pyarrow", "matplotlib"}
# Runs a script as `python script words` does, for each line of words; then lists what is loaded.
RUN = """
import runpy, sys
script, *lines = sys.argv[1:]
sys.path[0] = script.rpartition("/")[0]
for line in lines:
    sys.argv = [script, *line.split()]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, (line, end.code)
print("LOADED", *sys.modules)
"""


def run_and_list(script: Path, *lines: str) -> tuple[str, set[str]]:
    """Runs a script once for each line of words, in one process. Returns its output and the modules that it loaded."""
    command = [sys.executable, "-c", RUN, str(script), *lines]
    result = subprocess.run(command, cwd=script.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    output, loaded = result.stdout.rsplit("LOADED", 1)
    return output, set(loaded.split())


def packages(modules: set[str]) -> set[str]:
    return {name.split(".")[0] for name in modules}


def test_help_imports_little_and_answers_at_once():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output, loaded = run_and_list(ROOT / "ltp.py", "--help", *(f"{name} --help" for name in COMMANDS))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert output.count("Usage: ") == 1 + len(COMMANDS)
    assert {"click", "support.settings"} <= loaded
    assert packages(loaded).isdisjoint(HEAVY | {"rich", "tasks", "runs", "tools"})
    # Processor time: the machine may be busy.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_prediction_and_training_import_no_tables(tmp_path):
    """They take a second and 100 MB, and `predict` reads none."""
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport tools.predict, train\n")
    _, loaded = run_and_list(script, "")
    assert {"tools.predict", "train", "tasks.squad"} <= loaded
    assert packages(loaded).isdisjoint({"datasets", "pandas", "pyarrow"})


def test_a_heavy_package_would_be_seen(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\ndef main():\n    import numpy.linalg\nmain()\nsys.exit(0)\n")
    output, loaded = run_and_list(script, "")
    assert output == "" and packages(loaded) & HEAVY == {"numpy"}


@pytest.mark.parametrize("stage", STAGES)
def test_settings_are_options_with_the_defaults_of_their_stage(stage):
    options = {option.name: option for option in main.commands[stage].params}
    names = [field.name for field in fields(Settings) if field.name in options]
    for name in names:
        assert options[name].default == (Settings(**STAGES[stage])).__dict__[name]
    missing = {field.name for field in fields(Settings)} - set(names)
    thresholds = {"temperature", "temperature_end", "threshold_learning_rate", "threshold_weight_decay"}
    thresholds |= {"regularization", "mask_attention"}
    pruning = {"target_flops", "distill_weight"}
    assert missing == {"soft": set(), "finetune": thresholds | pruning}.get(stage, thresholds)


def test_soft_tells_what_a_target_changes():
    shown = re.sub(r"-\n +|\s+", lambda gap: gap[0].strip() or " ", run("soft", "--help").stdout)
    assert "(classifiers) --mask-attention --temperature 0.001 --temperature-end 0.0002 --lr-threshold 0.0001" in shown
    assert re.search(r"--mask-attention / --mask-output .*? \[default: mask-output\]", shown)


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
