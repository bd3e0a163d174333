"""docs/options.md is what the commands say of themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.scripts import load_script
from typer.testing import CliRunner

from puzzlemoe_offline.cli.main import app
from puzzlemoe_offline.recipe import PairRecipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def options_page():
    return load_script("tools/options_page.py")


def test_it_is_current(options_page):
    assert (ROOT / "docs" / "options.md").read_text() == options_page.page(), "run python tools/options_page.py"


def test_it_has_every_option_that_the_commands_take(options_page):
    page = options_page.page()
    for command in app.registered_commands:
        name = command.name or command.callback.__name__.removesuffix("_command")
        lines = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
        flags = {word.strip(",") for word in lines.split() if word.startswith("--")} - {"--help"}
        section = page.split(f"## puzzlemoe {name} ")[1].split("\n## puzzlemoe")[0]
        section += page.split("\n## Recipes")[1] if "(#recipes)" in section else ""
        assert flags, lines
        assert {flag for flag in flags if f"`{flag}`" not in section} == set(), name
    assert all(f"`--{field.replace('_', '-')}`" in page for field in PairRecipe.model_fields if field != "method")
