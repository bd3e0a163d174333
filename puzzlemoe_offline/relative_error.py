"""How far something is from what it stands for."""

from __future__ import annotations

import math


def relative_error(error: float, energy: float) -> float | None:
    """||difference|| / ||original||, of their squares; 0 of zeros that are still zeros.

    None where there is no such number: of zeros that are zeros no more, and of sums that are not finite.
    """
    if not math.isfinite(error) or not math.isfinite(energy):
        return None
    if energy == 0:
        return 0.0 if error == 0 else None
    return math.sqrt(error / energy)
