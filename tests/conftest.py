"""Folders that tests share, and the report of what ran."""

import os
from pathlib import Path

import pytest
from support.groups import GroupReport

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(GroupReport())


@pytest.fixture(scope="session")
def example() -> Path:
    """The example of the repository: model/, calibration.txt, heldout.txt."""
    return ROOT / "examples" / "tiny-moe"


@pytest.fixture(scope="session")
def data() -> Path:
    """A folder of larger models and texts, from PUZZLEMOE_TEST_DATA."""
    folder = os.environ.get("PUZZLEMOE_TEST_DATA")
    if not folder:
        pytest.skip("PUZZLEMOE_TEST_DATA names no folder with models/ and text/")
    return Path(folder)
