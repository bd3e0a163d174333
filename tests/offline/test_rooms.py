"""Imports go downwards through the rooms of the house, and nowhere in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("cli", "score", "run", "methods", "pairing", "words", "calibration", "model")
"""From the top; what lies beside them (recipe, version) is below all."""


def modules() -> dict[str, set[str]]:
    """The project's modules that each of its modules imports."""
    files = {}
    for package in ("puzzlemoe_offline", "puzzlemoe_vllm"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found = {}
    for name, path in files.items():
        imported: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
        found[name] = (imported & files.keys()) - {name}
    return found


def room(module: str) -> int:
    """Its height: 0 is the top."""
    parts = module.split(".")
    return ROOMS.index(parts[1]) if len(parts) > 1 and parts[1] in ROOMS else len(ROOMS)


def test_imports_go_downwards():
    upwards = [
        (name, other)
        for name, imported in modules().items()
        for other in imported
        if name.startswith("puzzlemoe_offline.") and room(name) < len(ROOMS) and room(other) < room(name)
    ]
    assert not upwards


def test_the_plugin_knows_nothing_of_the_tool():
    for name, imported in modules().items():
        assert not name.startswith("puzzlemoe_vllm") or not any(i.startswith("puzzlemoe_offline") for i in imported)


def test_no_circle():
    assert len(list(TopologicalSorter(modules()).static_order())) > 50
