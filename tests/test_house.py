"""How the files lean on each other. What the command line loads is in support/test_options.py."""

import ast
import graphlib
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from model import Config
from support import settings

ROOT = Path(__file__).parent.parent
PACKAGES = ("support", "tasks", "runs", "tools")

# What each part may import of the others, from the ground up. benchmarks and tests are in no list.
MAY_IMPORT = {
    "model": set(),
    "support": {"support"},
    "support.checkpoint": {"support", "model"},
    "support.cpu": {"support", "model"},
    "support.cuda": {"support", "model"},
    "support.onnx_file": {"support", "model"},
    "support.devices": {"support", "model"},
    "data": {"support", "model"},
    "tasks": {"support", "model", "data", "tasks"},
    "train": {"support", "model", "data", "tasks.base", "tasks.evaluation"},
    "runs": {"support", "model", "data", "tasks", "train", "runs"},
    "tools": {"support", "model", "data", "tasks", "train", "runs", "tools"},
    "ltp": {"support", "model", "data", "tasks", "train", "runs", "tools"},
}
# These load the standard library alone, so that `--help` is quick.
LIGHT = ("support", "support.errors", "support.settings")


class House:
    """The Python files under a folder, and what they import."""

    def __init__(self, root: Path):
        self.root = root
        inner = (path for name in PACKAGES for path in (root / name).rglob("*.py"))
        self.files = {self.module_name(path): path for path in sorted([*root.glob("*.py"), *inner])}

    def module_name(self, path: Path) -> str:
        """The name that imports a file: support/files.py -> support.files, support/__init__.py -> support."""
        parts = path.relative_to(self.root).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def imports(self, name: str) -> set[str]:
        """The modules that a file imports anywhere, also inside of functions and by a constant name at run time."""
        names, path = set(), self.files[name]
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                attributes = {f"{base}.{alias.name}" for alias in node.names}
                submodules = attributes & self.files.keys()  # `from support import errors` imports support.errors
                names |= submodules if submodules == attributes else submodules | {base}
            elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if function in ("import_module", "__import__"):
                    names.add(node.args[0].value)
        return names

    def wrong_imports(self, name: str) -> set[str]:
        """The imports of a file that point up, or to benchmarks or tests."""
        own = {"benchmarks", "tests", "conftest", "small_models", *(part.split(".")[0] for part in MAY_IMPORT)}
        allowed = MAY_IMPORT[part_of(name)]
        ours = {name for name in self.imports(name) if name.split(".")[0] in own}
        return {name for name in ours if not any(within(name, part) for part in allowed)}


def within(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


def part_of(name: str) -> str | None:
    """The entry of MAY_IMPORT for a module: the longest that fits."""
    return max((part for part in MAY_IMPORT if within(name, part)), key=len, default=None)


HOUSE = House(ROOT)


# ---- the house ----


def test_every_file_has_its_place():
    assert {"model", "support.settings"} <= HOUSE.files.keys()
    assert not [name for name in HOUSE.files if part_of(name) is None]


@pytest.mark.parametrize("name", [name for name in HOUSE.files if part_of(name)])
def test_imports_point_one_way(name):
    assert not HOUSE.wrong_imports(name)


def test_no_two_files_import_each_other():
    graph = {name: HOUSE.imports(name) & HOUSE.files.keys() for name in HOUSE.files}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize(
    "name, text, wrong",
    [
        ("model.py", "import math, torch", set()),
        ("model.py", "from support.errors import InputError", {"support.errors"}),
        ("data.py", "def f():\n    if 1:\n        from tasks import base", {"tasks.base"}),
        ("data.py", "import model, support.files", set()),
        ("support/files.py", "from . import errors", set()),
        ("support/files.py", "from ..train import x", {"train"}),
        ("support/files.py", "import model", {"model"}),
        ("support/cpu.py", "from model import Model", set()),
        ("train.py", "from tasks.base import Task", set()),
        ("train.py", "from tasks import find_task", {"tasks"}),
        ("train.py", "from tasks import base, find_task", {"tasks"}),
        ("train.py", "from tasks.squad import x", {"tasks.squad"}),
        ("runs/stage.py", "import tools.plot as plot", {"tools.plot"}),
        ("ltp.py", "import importlib\nimportlib.import_module('benchmarks.steps')", {"benchmarks.steps"}),
        ("tools/plot.py", "from tests.reference import forward", {"tests.reference"}),
        ("tools/plot.py", "import ltp", {"ltp"}),
    ],
)
def test_an_import_that_points_up_is_found(name, text, wrong, tmp_path):
    for file in ("model.py", "train.py", "support/errors.py", "tasks/base.py", "tasks/squad.py", name):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / name).write_text(text)
    house = House(tmp_path)
    assert house.wrong_imports(house.module_name(tmp_path / name)) == wrong


@pytest.mark.parametrize("name", LIGHT)
def test_settings_and_errors_load_the_standard_library_alone(name):
    assert {n for n in HOUSE.imports(name) if n.split(".")[0] not in sys.stdlib_module_names} <= set(LIGHT)


def test_tests_are_no_packages():
    """tests/support as a package would hide the project's support."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_nothing_runs_on_import():
    """Files define things. Commands are made in ltp.py alone."""
    for name, path in HOUSE.files.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body if part_of(name) not in (None, "ltp") else ():
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert is_docstring or not isinstance(node, (ast.For, ast.While, ast.With, ast.Expr)), (
                f"{name}:{node.lineno}"
            )


def test_the_files_name_no_machine():
    for name, path in HOUSE.files.items():
        assert not re.search(r"/(work|home|root|Users)/", path.read_text(encoding="utf-8")), name


# ---- one fact, one value ----


def test_settings_and_config_have_the_same_defaults():
    defaults = {field.name: field.default for field in fields(Config)}
    for name in ("final_token_threshold", "token_keep_rate", "max_seq_length"):
        assert getattr(settings, name.upper()) == defaults[name]
    options = {field.name: field.default for field in fields(settings.PruningOptions)}
    assert options.keys() <= defaults.keys() and set(options.values()) == {None}
