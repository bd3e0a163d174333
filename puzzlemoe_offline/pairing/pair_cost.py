"""What merging any two experts would cost in accuracy, estimated on a sample of their rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from puzzlemoe_offline.calibration.statistics import FEW_TOKENS, ExpertStatistics, projection_inputs
from puzzlemoe_offline.model.expert import PROJECTIONS, Expert
from puzzlemoe_offline.recipe import PairRecipe
from puzzlemoe_offline.words.nearest import fit, own_importance, pair_importance
from puzzlemoe_vllm.format.codes import UnencodableWeight, get_code

ROWS = 128
"""Most rows of a projection that are sampled."""

ENTRIES = {"cpu": 1 << 14, "cuda": 1 << 20}
"""Weights fitted at once: few enough for the cache of a CPU, enough to keep a GPU busy."""


def merge_errors(
    pool: list[int],
    expert: Callable[[int], Expert],
    statistics: ExpertStatistics | None,
    recipe: PairRecipe,
    group: int | None,
    device: torch.device,
) -> Tensor:
    """Symmetric float64 [n, n] on the CPU: for any two of the n experts of `pool`, how much merging them loses.

    That is the squared error of the merged weights times the squared norm of their input columns, summed over both
    experts and all calibration tokens, relative to the pool's energy in the same measure; the sum over gate, up and
    down projection.  Without statistics every input column counts the same.
    The merged weights are those of the recipe's code and rule, without compensation, on evenly spaced rows: `ROWS`, or
    so many that the search fits no more weights than merging the pool does.  Many pairs are fitted at once, side by
    side as columns of one matrix.
    """
    code, count = get_code(recipe.code), len(pool)
    first, second = torch.triu_indices(count, count, offset=1)
    errors = torch.zeros(count, count, dtype=torch.float64, device=device)
    for index, projection in enumerate(PROJECTIONS):
        matrices = [getattr(expert(number), projection) for number in pool]
        rows, columns = matrices[0].shape
        sampled = min(ROWS, -(-rows // (count - 1)))
        chosen = torch.linspace(0, rows - 1, sampled).round().long()
        sample = torch.stack([matrix[chosen.to(matrix.device)].to(device) for matrix in matrices])
        # Moments are not looked at here, and those of an expert with few tokens would be made for each anew.
        inputs = [
            replace(projection_inputs(statistics, number, index, columns, device), moments=None) for number in pool
        ]
        squares = torch.stack([seen.norms.square() for seen in inputs])
        energy = float((sample.float().square().sum(dim=1) * squares).sum())
        own = torch.stack([own_importance(seen, recipe) for seen in inputs])
        few = torch.tensor([[seen.tokens < FEW_TOKENS] for seen in inputs], device=device)
        at_once = max(1, ENTRIES[device.type] // (sampled * columns))
        for pairs in zip(first.to(device).split(at_once), second.to(device).split(at_once), strict=True):
            a, b = pairs
            importance = pair_importance((own[a], own[b]), few[a] | few[b], recipe)
            weights = sample[a].transpose(0, 1).flatten(1), sample[b].transpose(0, 1).flatten(1)
            try:
                packed = fit(weights, (importance[0].flatten(), importance[1].flatten()), recipe, group)
            except UnencodableWeight as error:
                raise UnencodableWeight(f"one of experts {pool}, {projection} projection: {error}") from None
            lost = torch.zeros(len(a), device=device)
            for position, (exact, members) in enumerate(zip(weights, pairs, strict=True)):
                difference = exact.float() - code.decode(packed.words, position, packed.steps).float()
                by_column = difference.square().sum(dim=0).view(-1, columns)
                lost += (by_column * squares[members]).sum(dim=1)
            errors[a, b] += lost.double() / energy if energy else 0.0
    return (errors + errors.T).cpu()
