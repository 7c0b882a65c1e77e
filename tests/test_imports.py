"""The one-way import rule of docs/design.md, and a package that is quick and quiet to import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import shiftaddvit

ROOT = Path(shiftaddvit.__file__).parent
FREE = {"errors", "files", "conditions", "processes", "schema", "intervals", "published", "search_terms", "__version__"}
"""Leaves that anything may use."""
LAYERS = {"numerics", "ops", "layers", "losses"}
MODELS = {"models"}
CORE = LAYERS | MODELS | {"reparam", "baselines", "serialization", "model_card"}
ALLOWED = {
    "errors": set(),
    "files": set(),
    "conditions": set(),
    "processes": set(),
    "schema": set(),
    "intervals": set(),
    "published": set(),
    "search_terms": set(),
    "numerics": set(),
    "ops": {"numerics"},
    "layers": {"numerics", "ops"},
    "losses": {"numerics", "ops", "layers"},
    "models": set(),
    "data": set(),
    "baselines": {"numerics", "ops", "layers"},
    "reparam": LAYERS | MODELS | {"baselines"},
    "model_card": {"layers"},
    "report": set(),
}
"""What a part may import of the others; parts not named are at the end of the arrows and may look at everything but the command line."""


def part(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(file: Path) -> set[tuple[str, int]]:
    """(part of shiftaddvit, line) for every import anywhere in the file."""
    package = ["shiftaddvit", *file.relative_to(ROOT).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [module if module.count(".") else f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            pieces = name.split(".")
            if pieces[0] == "shiftaddvit" and len(pieces) > 1:
                found.add((pieces[1], node.lineno))
    return found


FILES = sorted(file for file in ROOT.rglob("*.py") if file.name != "__main__.py" and "assets" not in file.parts)


def test_the_reader_of_imports_sees_relative_and_nested_ones(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "layers").mkdir()
    file = tmp_path / "layers" / "x.py"
    file.write_text("from . import y\nfrom ..ops import z\nfrom shiftaddvit import models\ndef f():\n    import shiftaddvit.train.stage\n")
    assert {name for name, _ in imported(file)} == {"layers", "ops", "models", "train"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file):
    here = part(file)
    for other, line in imported(file):
        if other in FREE or other == here or here == "__init__":
            continue
        if here in ALLOWED:
            assert other in ALLOWED[here], f"{here} must not import {other} (line {line})"
        elif here != "cli":
            assert other != "cli", f"{here} must not import the command line (line {line})"


@pytest.mark.parametrize("name", ["train", "evaluation", "cost", "engine", "autorecipe", "nvs", "portable", "hardware", "cli"])
def test_the_core_does_not_look_back(name):
    for file in FILES:
        if part(file) in CORE:
            assert name not in {other for other, _ in imported(file)}, f"{file.relative_to(ROOT)} imports {name}"


def test_only_the_command_line_uses_the_search():
    for file in FILES:
        if part(file) not in ("autorecipe", "cli"):
            assert "autorecipe" not in {other for other, _ in imported(file)}, file.relative_to(ROOT)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_loads_neither_torch_nor_timm():
    loaded = run("import sys, shiftaddvit; print(*sorted(sys.modules))").split()
    heavy = {"torch", "timm", "accelerate", "numpy", "rich", "triton", "torchvision"} & set(loaded)
    assert not heavy
    assert [name for name in loaded if name.startswith("shiftaddvit")] == ["shiftaddvit"]


def test_every_public_name_can_be_reached_and_listed():
    assert run("import shiftaddvit as s; print(all(getattr(s, name) is not None for name in dir(s)), len(dir(s)))").startswith("True")


def test_a_wrong_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'finetun'"):
        shiftaddvit.finetun
