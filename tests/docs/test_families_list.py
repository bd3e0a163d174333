"""README.md lists the families that the table has."""

from __future__ import annotations

from pathlib import Path

from puzzlemoe_offline.model.families import FAMILIES

README = Path(__file__).resolve().parents[2] / "README.md"


def listed() -> str:
    """The list as the table makes it."""
    remote = " with `--trust-remote-code`"
    return ", ".join(
        f"{family.title} (`{name}`{remote if family.remote_config else ''})" for name, family in FAMILIES.items()
    )


def test_readme_lists_the_rows():
    text = README.read_text().split("## Families and limits\n")[1].split(". Another is")[0]
    assert " ".join(text.split()) == listed()
