"""Scripts that are run by hand now and then ask for names that are there, and call them as they are to be called."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


def imported(tree: ast.Module) -> dict[str, Any]:
    """What a script has of neuroweave, by the names that it gives them."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "neuroweave":
            module = importlib.import_module(node.module)
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                there = hasattr(module, name.name)
                found[name.asname or name.name] = (
                    getattr(module, name.name) if there else importlib.import_module(whole)
                )
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_what_a_script_uses_is_there_and_takes_what_it_gives(script: Path) -> None:
    tree = ast.parse(script.read_text())
    names = imported(tree)
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names):
            continue
        known = all(keyword.arg for keyword in node.keywords) and not any(isinstance(a, ast.Starred) for a in node.args)
        if known and inspect.isfunction(names[node.func.id]):
            given = {str(keyword.arg): None for keyword in node.keywords}
            inspect.signature(names[node.func.id]).bind(*node.args, **given)
