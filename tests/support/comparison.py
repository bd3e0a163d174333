"""Comparing greedy generations of two runs whose kernels round differently."""

from __future__ import annotations

from support.engine import Step

TOLERANCE = 0.15
"""In log-probability.  Runs differ by up to 0.08 in rounding; a logit near 8 has a bf16 spacing of 1/16.  One pair with
its two experts exchanged makes differences of 0.6 and other tokens."""

SHARE = 0.6
"""Of all positions, how many must have been compared."""


def assert_same_generation(reference: list[list[Step]], other: list[list[Step]]) -> None:
    """Same tokens with log-probabilities within TOLERANCE.

    A sequence may part where the reference's two likeliest tokens are within TOLERANCE of each other; what follows is
    not compared.
    """
    compared = 0
    for number, (expected, found) in enumerate(zip(reference, other, strict=True)):
        for position, (want, got) in enumerate(zip(expected, found, strict=True)):
            where = f"sequence {number}, position {position}: {want} became {got}"
            if want.token != got.token:
                assert want.margin < TOLERANCE, where
                break
            assert abs(want.logprob - got.logprob) < TOLERANCE, where
            compared += 1
    total = sum(map(len, reference))
    assert compared >= SHARE * total, f"only {compared} of {total} positions could be compared"
