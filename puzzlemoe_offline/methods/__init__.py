"""Ways to make experts smaller, one file each, and the table of those that are for comparison: each of them writes an
ordinary dense checkpoint of what it computes."""

from __future__ import annotations

from puzzlemoe_offline.methods.base import LayerMethod
from puzzlemoe_offline.methods.dropping import DropExperts
from puzzlemoe_offline.methods.gptq import Gptq
from puzzlemoe_offline.methods.hc_smoe import HcSmoe
from puzzlemoe_offline.methods.merge_three import MergeThree
from puzzlemoe_offline.methods.rounding import RoundToNearest
from puzzlemoe_offline.methods.single_trellis import SingleTrellis
from puzzlemoe_offline.methods.wanda import Wanda

BASELINES: dict[str, LayerMethod] = {
    "int8": RoundToNearest(8),
    "int4": RoundToNearest(4),
    "int3": RoundToNearest(3),
    "int2": RoundToNearest(2),
    "gptq-int4": Gptq(4),
    "gptq-int3": Gptq(3),
    "gptq-int2": Gptq(2),
    **{f"{single.code.name}-single": single for single in map(SingleTrellis, (8, 6, 4))},
    "wanda-2:4": Wanda(),
    "drop-50": DropExperts(0.5),
    "drop-25": DropExperts(0.25),
    "hc-smoe-50": HcSmoe(0.5),
    "hc-smoe-25": HcSmoe(0.25),
    "paper-3": MergeThree(),
}
"""By the name that `puzzlemoe baseline --method` takes; the number after drop and hc-smoe is the percentage of experts
that goes."""
