"""When merging has lost an expert."""

from __future__ import annotations

LOST = 0.9
"""An expert is lost when what stands for it, a projection's weights or its output, differs from it by more than this
part of its norm: zeros, which differ by 1, are hardly further from it.

Partners that suit each other lose a tenth (angle8) to two thirds (the paper's rule, an expert that few tokens use).
Beside one whose weights are thousands of times larger an expert is all but masked out, or buried under the partner's
errors; beside one that is all but zero it comes off well, and the partner comes alive."""
