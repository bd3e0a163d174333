"""What a compression run will take, before it starts: sizes exactly, memory and time by estimate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from puzzlemoe_offline.calibration.statistics import ProjectionInputs, add_moments
from puzzlemoe_offline.methods.pairs import ENTRIES, Losses, pack_matrix
from puzzlemoe_offline.model.layerwise import activation_dtype
from puzzlemoe_offline.run.compress import Job
from puzzlemoe_offline.run.report import expert_bytes, other_bytes
from puzzlemoe_offline.words.nearest import SCORES
from puzzlemoe_vllm.format.codes import get_code

SCRATCH_BYTES_PER_ENTRY = 100
"""float32 tensors of a block of rows that fitting holds at once, and its words."""

DECODED_BYTES_PER_ENTRY = 24
"""int64 and float32 tensors of a whole matrix that reading words back holds at once."""


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, time in seconds.

    peak_host and peak_device: what the run holds beyond the Python process itself (on a CPU run the device's part is in
    the host's); disk: what it writes, at most at one time.
    """

    experts_before: int
    experts_after: int
    other: int
    disk: int
    peak_host: int
    peak_device: int
    seconds: float


def make_plan(job: Job) -> Plan:
    """Sizes from the headers, memory from the shapes, time from half a second of measuring this machine."""
    checkpoint, recipe = job.checkpoint, job.recipe
    job.check()
    expert, share = expert_bytes(job), _share(job)
    layer_experts = expert * checkpoint.experts
    before = layer_experts * len(checkpoint.moe_layers)
    other = other_bytes(job)
    on_cpu = torch.device(job.device).type == "cpu"
    width = activation_dtype(job.device).itemsize
    layer_other = max(
        sum(
            checkpoint.nbytes(n)
            for n in checkpoint.names
            if checkpoint.layer_of(n) == layer and not checkpoint.is_expert(n)
        )
        for layer in range(checkpoint.layers)
    )
    tokens = job.calibration.tokens.numel() if job.calibration else 0
    states = _states(job)
    scratch = SCRATCH_BYTES_PER_ENTRY * ENTRIES[torch.device(job.device).type] + (4 * SCORES if on_cpu else 0)
    scratch = max(scratch, DECODED_BYTES_PER_ENTRY * expert // 6)
    embedding = max(checkpoint.nbytes(n) for n in checkpoint.names if checkpoint.layer_of(n) is None)
    if recipe.compensate:
        # float32: every expert's moments; of one pair the factors, their inverses, and a projection with its errors.
        hidden, intermediate = checkpoint.expert_sizes
        moments = hidden**2 + intermediate**2
        scratch += 4 * (checkpoint.experts * moments + 6 * max(hidden, intermediate) ** 2 + 4 * hidden * intermediate)
    if recipe.experts:
        # float32: every cluster's sums; float64: those of one, the factor and the solution.
        hidden, intermediate = checkpoint.expert_sizes
        scratch += (4 * recipe.experts + 8 * 3) * intermediate * (hidden + intermediate)
    packed = int(layer_experts * share)
    on_device = layer_experts + packed + layer_other * width // 2 + expert * width // 2 + scratch
    on_device += embedding * width // 2
    # From a GPU the packed layer goes to pinned memory, whose blocks have powers of two as sizes.
    host = states + layer_other + (on_device if on_cpu else expert + 2 * packed)
    return Plan(
        experts_before=before,
        experts_after=int(before * share),
        other=other,
        disk=disk_bytes(job),
        peak_host=host,
        peak_device=0 if on_cpu else on_device,
        seconds=_seconds(job, tokens, before, other),
    )


def disk_bytes(job: Job) -> int:
    """The packed model and, while the run lasts, the hidden states after two layers; from the headers."""
    experts = expert_bytes(job) * job.checkpoint.experts * len(job.checkpoint.moe_layers)
    return int(experts * _share(job)) + other_bytes(job) + 2 * _states(job)


def _share(job: Job) -> float:
    """Of the experts' bytes, what is left of them."""
    recipe = job.recipe
    if recipe.experts:
        return recipe.experts / job.checkpoint.experts
    return 1 - recipe.sparsity * (2 - get_code(recipe.code).bits_per_pair(job.group_size()) / 16)


def _states(job: Job) -> int:
    """Bytes of the calibration tokens' hidden states."""
    tokens = job.calibration.tokens.numel() if job.calibration else 0
    return tokens * job.checkpoint.expert_sizes[0] * activation_dtype(job.device).itemsize


def _seconds(job: Job, tokens: int, expert_total: int, other: int) -> float:
    """Matrix products of the calibration tokens plus merging every expert, at this machine's measured rates."""
    checkpoint = job.checkpoint
    active = expert_total / checkpoint.experts * checkpoint.experts_per_token
    products = 2 * tokens * (active + other) / 2
    if job.recipe.experts:
        return _clustering_products(job, products, tokens) / _product_rate(job.device)
    seconds = products / _product_rate(job.device)
    if job.recipe.compensate:
        chosen = tokens * checkpoint.experts_per_token * len(checkpoint.moe_layers)
        moments = 2 * chosen * sum(size**2 for size in checkpoint.expert_sizes)
        seconds += moments / _moments_rate(job.device)
    merged = expert_total / 2
    if job.recipe.pairing == "search":
        merged *= 2  # Trial merges are bounded by the layer's weights.
    return seconds + merged / _merge_rate(job)


def _clustering_products(job: Job, products: float, tokens: int) -> float:
    """Operations of MergeMoE, given those of the calibration tokens in the model: these twice, every member of a chosen
    cluster, the sums and their solution."""
    checkpoint, clusters = job.checkpoint, job.recipe.experts
    assert clusters is not None
    hidden, intermediate = checkpoint.expert_sizes
    layers = len(checkpoint.moe_layers)
    chosen = tokens * checkpoint.experts_per_token * layers
    members = 3 * hidden * intermediate * checkpoint.experts / clusters
    solution = layers * clusters * (intermediate**3 / 3 + 2 * hidden * intermediate**2)
    return 2 * products + 2 * chosen * (members + intermediate * (hidden + intermediate)) + solution


def _product_rate(device: str) -> float:
    """Measured operations per second of a matrix product in the run's dtype."""
    left, right = _activations(device), _activations(device)
    return _rate(lambda: left @ right)


def _moments_rate(device: str) -> float:
    """The same of gathering second moments."""
    rows = _activations(device)
    moments = torch.zeros(1024, 1024, device=device)

    def gather() -> Tensor:
        add_moments(moments, rows)
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


def _merge_rate(job: Job) -> float:
    """Measured weights per second of merging and packing."""
    # Compensation goes column by column: what a column takes depends little on its rows, if they are few.
    rows = min(*job.checkpoint.expert_sizes, ENTRIES[torch.device(job.device).type] // 1024)
    weights = torch.randn(2, rows, 1024, dtype=torch.bfloat16, device=job.device)
    seen = ProjectionInputs.unknown(1024, job.device)
    if job.recipe.compensate:
        seen = replace(seen, moments=torch.eye(1024, device=job.device))

    def pack(rows: int) -> None:
        pack_matrix((weights[0, :rows], weights[1, :rows]), (seen, seen), job.recipe, job.group_size(), Losses(), 0)

    pack(16)  # compiles and loads what the first use does; strides of fewer rows would be compiled as constants
    began = time.perf_counter()
    pack(rows)
    return weights.numel() / (time.perf_counter() - began)
