"""What a compression run will take, before it starts: sizes from the headers, memory and time by estimate.

Experts that no partner suits stay dense, which is found only when they are merged: they make the model larger than
planned here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from puzzlemoe_offline.calibration.routed_tokens import AT_ONCE
from puzzlemoe_offline.calibration.statistics import ProjectionInputs, add_products
from puzzlemoe_offline.methods.mergemoe import MergeMoe
from puzzlemoe_offline.methods.pairs import PairMethod
from puzzlemoe_offline.model.layerwise import ACTIVATION_BYTES, activation_dtype
from puzzlemoe_offline.run.devices import WAITING, most_begun, other_gpus
from puzzlemoe_offline.run.job import Job, Sizes
from puzzlemoe_offline.words.factors import inverse_factors
from puzzlemoe_offline.words.nearest import SCORES
from puzzlemoe_offline.words.pack import ENTRIES, TOGETHER, Losses, pack_matrices, pairs_at_once
from puzzlemoe_vllm.format.codes import TrellisCode

SCRATCH_BYTES_PER_ENTRY = 100
"""float32 tensors of a block of rows that fitting holds at once, and its words."""

DECODED_BYTES_PER_ENTRY = 24
"""int64 and float32 tensors of a whole matrix that reading words back holds at once."""


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, time in seconds.

    peak_host and peak_device: what the run holds beyond the Python process itself (on a CPU run the device's part is in
    the host's), of several GPUs on the first, which holds most; disk: what it writes, at most at one time.
    devices: GPUs that take part, 1 on a CPU.
    """

    sizes: Sizes
    disk: int
    peak_host: int
    peak_device: int
    seconds: float
    devices: int


def make_plan(job: Job) -> Plan:
    """Sizes from the headers, memory from the shapes, time from half a second of measuring this machine.

    The job's method is that of a recipe.
    """
    checkpoint = job.checkpoint
    on_cpu, others = not job.on_gpu, len(other_gpus(job.model.device))
    width = activation_dtype(job.device).itemsize
    plain = [checkpoint.layer(layer).plain for layer in range(checkpoint.layers)]
    layer_other = max(sum(map(checkpoint.written_bytes, names)) for names in plain)
    embedding = max(map(checkpoint.written_bytes, checkpoint.outside))
    copied = sum(checkpoint.copied_bytes.values())
    expert, moe_layers = checkpoint.expert_bytes, len(checkpoint.moe_layers)
    layer_experts, packed = expert * checkpoint.experts, job.experts_after // moe_layers
    on_device = layer_experts + packed + layer_other * width // 2 + expert * width // 2 + embedding * width // 2
    on_device += _scratch_bytes(job) + _seen_bytes(job)
    if not on_cpu:  # the next layer is read ahead, and experts take all tokens of a batch at once
        on_device += layer_experts + (ACTIVATION_BYTES if job.tokens else 0)
    if others:  # those that wait for another GPU
        on_device += WAITING * (layer_experts + _seen_bytes(job))
    # From a GPU the packed layer goes to pinned memory, whose blocks have powers of two as sizes; the last one, and the
    # hidden states after it, may not be written yet, nor those that were begun before them.  Experts that are read go
    # through pinned memory too.
    pinned = job.states_bytes + 2 * packed
    host = layer_other + (job.states_bytes + on_device if on_cpu else (2 + most_begun(others)) * pinned + 2 * expert)
    host = max(host, copied)
    return Plan(
        sizes=job.sizes,
        disk=job.disk_bytes,
        peak_host=host,
        peak_device=0 if on_cpu else on_device,
        seconds=_seconds(job, 1 + others),
        devices=1 + others,
    )


def _seen_bytes(job: Job) -> int:
    """Second moments of what every expert of a layer sees, float32; of hidden values, or else all tokens."""
    match job.method:
        case PairMethod(recipe) if recipe.compensate:
            checkpoint, width = job.checkpoint, activation_dtype(job.device).itemsize
            hidden, intermediate = checkpoint.expert_sizes
            squares = hidden**2 + (0 if recipe.correct_down else intermediate**2)
            token = hidden * width + checkpoint.experts_per_token * (8 + width) if recipe.correct_down else 0
            return 4 * checkpoint.experts * squares + token * job.tokens
    return 0


def _scratch_bytes(job: Job) -> int:
    """What merging a layer holds beside its experts and their moments."""
    checkpoint, device = job.checkpoint, torch.device(job.device).type
    hidden, intermediate = checkpoint.expert_sizes
    scratch = SCRATCH_BYTES_PER_ENTRY * ENTRIES[device] + (4 * SCORES if device == "cpu" else 0)
    scratch = max(scratch, DECODED_BYTES_PER_ENTRY * checkpoint.expert_bytes // 6)
    match job.method:
        case PairMethod(recipe) as method if recipe.compensate:
            # float32, of one pair: the factors, their inverses, and a projection with its errors.
            pair = 6 * max(hidden, intermediate) ** 2 + 4 * hidden * intermediate
            pair = max(pair, 4 * TOGETHER if device == "cuda" else 0)
            if isinstance(method.code, TrellisCode):  # both experts (in bf16) and what down saw, with reordered neurons
                sizes = max(hidden, intermediate), min(hidden, intermediate)
                at_once = pairs_at_once(method.code, *sizes, torch.device(device))
                pair += at_once * (3 * hidden * intermediate + 2 * intermediate**2)
            if recipe.correct_down:  # what its experts' down projections see, lack and are to be, beside hidden values
                sizes = max(hidden, intermediate), min(hidden, intermediate)
                at_once = pairs_at_once(method.code, *sizes, torch.device(device))
                pair += at_once * (2 * intermediate**2 + 4 * hidden * intermediate)
                pair += min(job.tokens, AT_ONCE) * (4 * intermediate + 2 * hidden)
            scratch += 4 * pair
        case MergeMoe(recipe):
            # float32: every cluster's sums; float64: those of one, the factor and the solution.
            scratch += (4 * recipe.clusters + 8 * 3) * intermediate * (hidden + intermediate)
    return scratch


def _seconds(job: Job, devices: int) -> float:
    """Matrix products of the calibration tokens plus merging every expert, at this machine's measured rates.

    Of several GPUs one calibrates, all merge.
    """
    checkpoint = job.checkpoint
    active = checkpoint.routed_bytes / checkpoint.experts * checkpoint.experts_per_token
    products = 2 * job.tokens * (active + checkpoint.other_bytes) / 2
    match job.method:
        case MergeMoe(recipe):
            return _clustering_products(job, products, recipe.clusters) / _product_rate(job.device)
        case PairMethod(recipe) as method:
            seconds = products / _product_rate(job.device)
            if recipe.compensate:
                gathered = checkpoint.expert_sizes[: 1 if recipe.correct_down else 2]
                seconds += 2 * _slots(job) * sum(size**2 for size in gathered) / _moments_rate(job.device)
            # Trial merges of a search are bounded by the layer's weights; trellises have none.
            trials = recipe.pairing == "search" and not isinstance(method.code, TrellisCode)
            merged = checkpoint.routed_bytes / 2 * (2 if trials else 1)
            merging = merged / _merge_rate(job, method) + (_correction_seconds(job) if recipe.correct_down else 0)
            return max(seconds, (seconds + merging) / devices)
    raise AssertionError(f"no plan for {job.method}")


def _slots(job: Job) -> int:
    """Calibration tokens times the experts that each chooses, in all layers."""
    return job.tokens * job.checkpoint.experts_per_token * len(job.checkpoint.moe_layers)


def _correction_seconds(job: Job) -> float:
    """Of hidden values by the source's and by packed projections, what the output lacks, and both sums."""
    hidden, intermediate = job.checkpoint.expert_sizes
    products = 10 * _slots(job) * hidden * intermediate / _product_rate(job.device)
    return products + 2 * _slots(job) * intermediate * (intermediate + hidden) / _moments_rate(job.device)


def _clustering_products(job: Job, products: float, clusters: int) -> float:
    """Operations of MergeMoE, given those of the calibration tokens in the model: these twice, every member of a chosen
    cluster, the sums and their solution."""
    checkpoint = job.checkpoint
    hidden, intermediate = checkpoint.expert_sizes
    layers = len(checkpoint.moe_layers)
    members = 3 * hidden * intermediate * checkpoint.experts / clusters
    solution = layers * clusters * (intermediate**3 / 3 + 2 * hidden * intermediate**2)
    return 2 * products + 2 * _slots(job) * (members + intermediate * (hidden + intermediate)) + solution


def _product_rate(device: str) -> float:
    """Measured operations per second of a matrix product in the run's dtype."""
    left, right = _activations(device), _activations(device)
    return _rate(lambda: left @ right)


def _moments_rate(device: str) -> float:
    """The same of gathering second moments."""
    rows = _activations(device)
    moments = torch.zeros(1024, 1024, device=device)

    def gather() -> Tensor:
        add_products(moments, rows, rows)
        return moments

    return _rate(gather)


def _activations(device: str) -> Tensor:
    """Random ones [1024, 1024] in the run's dtype."""
    return torch.randn(1024, 1024, device=device, dtype=activation_dtype(device))


def _rate(product: Callable[[], Tensor]) -> float:
    """Measured operations per second of something that multiplies two matrices [1024, 1024]."""
    float(product()[0, 0])
    began, rounds = time.perf_counter(), 4
    for _ in range(rounds):
        out = product()
    float(out[0, 0])
    return rounds * 2 * 1024**3 / (time.perf_counter() - began)


def _merge_rate(job: Job, method: PairMethod) -> float:
    """Measured weights per second of merging and packing."""
    # Compensation goes column by column: what a column takes depends little on its rows, if they are few.
    device = torch.device(job.device).type
    rows = min(*job.checkpoint.expert_sizes, ENTRIES[device] // 1024)
    if isinstance(method.code, TrellisCode) and device == "cpu":
        rows = 16  # whose time is the same in every tile
    weights = torch.randn(2, rows, 1024, dtype=torch.bfloat16, device=job.device)
    seen = ProjectionInputs.unknown(1024, job.device)
    if method.recipe.compensate:
        seen = replace(seen, moments=torch.eye(1024, device=job.device))

    group = method.group_size(job.checkpoint)

    def pack(rows: int) -> None:
        factors = inverse_factors([seen, seen]) if method.recipe.compensate else None
        pair = weights[0, :rows], weights[1, :rows]
        pack_matrices([pair], [(seen, seen)], factors, method.recipe, group, [Losses()], 0)

    pack(16)  # compiles and loads what the first use does; strides of fewer rows would be compiled as constants
    began = time.perf_counter()
    pack(rows)
    return weights[:, :rows].numel() / (time.perf_counter() - began)
