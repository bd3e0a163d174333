"""A decode step of benchmarks/serving.py is one that gives every prompt a token: none in which others are still being
read, nor one that some have ended before."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from support.scripts import load_script


class Engine:
    """In the place of vLLM's: answers the prompts of each step that it is given, each after so many seconds."""

    def __init__(self, steps: list[tuple[float, str]]):
        self.steps, self.now, self.prompts = steps, 0.0, []

    def add_request(self, name, prompt, sampling):
        self.prompts.append((name, prompt, sampling))

    def has_unfinished_requests(self):
        return bool(self.steps)

    def step(self):
        seconds, names = self.steps.pop(0)
        self.now += seconds
        return [SimpleNamespace(request_id=name) for name in names]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([(3.0, "0"), (2.0, "01"), (0.5, "01"), (0.25, "01"), (8.0, "1")], [5.0, 0.5, 0.25]),
        ([(1.0, "0"), (1.0, "0"), (2.0, "1"), (0.5, "1")], [4.0]),
        ([(1.0, "01"), (0.25, ""), (0.25, "01")], [1.0, 0.5]),
    ],
    ids=["one prompt after the other", "never all at once", "a step without an answer"],
)
def test_steps_of_all_prompts_count(monkeypatch, steps, expected):
    serving, engine = load_script("benchmarks/serving.py"), Engine(steps)
    monkeypatch.setattr(serving.time, "perf_counter", lambda: engine.now)
    assert serving.step_seconds(engine, ["a", "b"], "greedy") == expected
    assert engine.prompts == [("0", "a", "greedy"), ("1", "b", "greedy")]
