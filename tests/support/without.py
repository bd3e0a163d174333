"""Python where some packages are not installed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable

WITHOUT = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {packages} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path = [Without(finder) for finder in sys.meta_path]
"""


def run(code: str, packages: Iterable[str] = ("vllm",)) -> subprocess.CompletedProcess[str]:
    """Runs code where those packages cannot be found."""
    program = WITHOUT.format(packages=set(packages)) + code
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
