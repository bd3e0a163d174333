"""MergeMoE (arXiv 2510.14436): a layer's experts merged in clusters, each into one dense expert.

A token that the router sends to experts of a cluster C with weights r_i gets (sum of r_i) * E_C(x) for the sum of
r_i * E_i(x).  Without knowing r, the best single function is the outputs' mean by usage, sum_i f_i E_i(x) with f_i the
share of expert i in the cluster's calibration tokens.  With the down projections D_i side by side and the hidden
activations h_i(x) = SiLU(gate_i x) * up_i x one above the other this is

    sum_i f_i D_i h_i(x) = D q(x),  D = [f_1 D_1, f_2 D_2, ...],  q(x) = [h_1(x); h_2(x); ...].

The merged expert's gate and up are the means by usage; its hidden activation is p(x), and its down projection D T1,
where T1 maps p to q.  Over the calibration tokens, columns of P and Q, least squares gives T1 = Q P^+, hence

    down = D Q P^+ = Y P^+ = Y P' (P P')^-1,  Y = D Q: the target outputs.

So only P P' [I, I] and Y P' [H, I] are summed up, batch by batch, and T1 never exists.  The normal equations are damped
towards the down projections' mean by usage, which is the answer in directions that no token has.

The calibration tokens of a cluster are those that the router sends to one of its experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from puzzlemoe_offline.calibration.passes import LayerPasses
from puzzlemoe_offline.calibration.sampled_tokens import SampledTokens
from puzzlemoe_offline.calibration.statistics import few_tokens
from puzzlemoe_offline.methods.base import LayerMethod, LayerRecord, MethodError, NewLayer
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.expert import Expert
from puzzlemoe_offline.model.layer_experts import SourceLayer
from puzzlemoe_offline.model.tensors import dense_tensors
from puzzlemoe_offline.recipe import ClusterRecipe
from puzzlemoe_vllm.format.layout import PuzzleConfig
from puzzlemoe_vllm.format.shards import shard_metadata

DAMPING = 0.01
"""Added to the diagonal of P P', as a share of its mean."""


def cluster(experts: list[Expert], tokens: Tensor, count: int) -> list[int]:
    """For each expert the centre of its cluster.

    Centres are the `count` experts with the most tokens (of equals the first); the others join the centre whose gate
    and up weights are nearest, by the sum of squared differences.  tokens: int [E].
    """
    centres = tokens.argsort(descending=True, stable=True)[:count].tolist()
    return [
        number if number in centres else min(centres, key=lambda centre: _distance(expert, experts[centre]))
        for number, expert in enumerate(experts)
    ]


def _distance(one: Expert, other: Expert) -> float:
    differences = one.gate.float() - other.gate.float(), one.up.float() - other.up.float()
    return sum(float(difference.square().sum()) for difference in differences)


def usage_shares(tokens: Tensor) -> list[float]:
    """Shares of some experts in their tokens, int [members]; equal ones when none has any."""
    counts = tokens.double()
    return (counts / counts.sum() if counts.sum() else torch.full_like(counts, 1 / len(counts))).tolist()


def mean_by_usage(weights: list[Tensor], shares: list[float]) -> Tensor:
    """Mean of matrices by shares that sum to one, float32."""
    mean = torch.zeros_like(weights[0], dtype=torch.float32)
    for weight, share in zip(weights, shares, strict=True):
        mean.add_(weight, alpha=share)
    return mean


class Cluster:
    """Experts on their way to being one; on the device and, while summing, float32.

    members: by expert id; tokens: int [E], which sets their shares (equal ones when no member has any).
    """

    def __init__(self, members: dict[int, Expert], tokens: Tensor):
        self.shares = usage_shares(tokens[list(members)])
        self.members = list(members.values())
        first = self.members[0].down
        self.ids = torch.tensor(list(members), device=first.device)
        # In bf16, as it will be served.
        self.gate = mean_by_usage([member.gate for member in self.members], self.shares).bfloat16()
        self.up = mean_by_usage([member.up for member in self.members], self.shares).bfloat16()
        hidden, intermediate = first.shape
        self.gram = torch.zeros(intermediate, intermediate, device=first.device)
        self.cross = torch.zeros(hidden, intermediate, device=first.device)

    def observe(self, inputs: Tensor, ids: Tensor) -> None:
        """Adds one batch of the layer's: inputs [M, H], ids int [M, k]; only tokens with an expert in here count."""
        inputs = inputs[torch.isin(ids, self.ids).any(dim=-1)]
        hidden = _hidden(inputs, self.gate, self.up).float()
        target = torch.zeros_like(inputs, dtype=torch.float32)
        for member, share in zip(self.members, self.shares, strict=True):
            output = F.linear(_hidden(inputs, member.gate, member.up), member.down.to(inputs.dtype))
            target.add_(output, alpha=share)
        self.gram.addmm_(hidden.T, hidden)
        self.cross.addmm_(target.T, hidden)

    def merge(self) -> Expert:
        """The merged expert, bf16.  Raises MethodError for activations whose squares do not fit into float32."""
        mean = mean_by_usage([member.down for member in self.members], self.shares).double()
        gram = self.gram.double()
        rest = self.cross.double() - mean @ gram
        # Without tokens everything but the damping is zero, and the mean stays.
        damping = (DAMPING * gram.diagonal().mean()).clamp(min=torch.finfo(torch.float32).tiny)
        gram.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(gram)
        down = mean + torch.cholesky_solve(rest.T, factor).T
        if bool(failed) or not bool(down.isfinite().all()):
            raise MethodError(
                f"experts {', '.join(map(str, self.ids.tolist()))}: on the calibration text the squares of their "
                "activations leave float32: copy or download the source again if it should have no such activations, "
                "or use --method puzzlemoe --saliency magnitude --no-compensate"
            )
        return Expert(self.gate, self.up, down.bfloat16().contiguous())


def _hidden(inputs: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(F.linear(inputs, gate.to(inputs.dtype))) * F.linear(inputs, up.to(inputs.dtype))


@dataclass(frozen=True)
class ClusteredLayer:
    """A layer after merging.  centres: expert id -> its cluster's centre; merged: the experts, by centre."""

    centres: list[int]
    merged: dict[int, Expert]

    def expert(self, number: int) -> Expert:
        """What serves in place of expert `number`."""
        return self.merged[self.centres[number]]


class LayerMerger:
    """Merges one layer: `observe` every batch, then `finish`."""

    def __init__(self, expert: Callable[[int], Expert], tokens: Tensor, count: int):
        experts = [expert(number) for number in range(len(tokens))]
        self.centres = cluster(experts, tokens, count)
        members = {
            centre: {number: experts[number] for number, its in enumerate(self.centres) if its == centre}
            for centre in sorted(set(self.centres))
        }
        self.alone = {centre: experts[centre] for centre, group in members.items() if len(group) == 1}
        self.clusters = {centre: Cluster(group, tokens) for centre, group in members.items() if len(group) > 1}

    def observe(self, inputs: Tensor, ids: Tensor) -> None:
        """Adds one batch: the layer's inputs [M, H] and the router's choice, int [M, k]."""
        for each in self.clusters.values():
            each.observe(inputs, ids)

    def finish(self) -> ClusteredLayer:
        """An expert that is alone in its cluster stays as it is."""
        return ClusteredLayer(self.centres, self.alone | {centre: c.merge() for centre, c in self.clusters.items()})


@dataclass(frozen=True)
class _Seen:
    """Of a layer: tokens int64 [E] of every expert, the layer after merging, and sampled tokens to measure it."""

    tokens: Tensor
    merged: ClusteredLayer
    sample: SampledTokens


@dataclass(frozen=True)
class MergeMoe(LayerMethod):
    """Every layer's experts in so many clusters."""

    recipe: ClusterRecipe
    packs: ClassVar[bool] = True

    @property
    def passes(self) -> int:
        """Two, since what is summed up depends on which experts are used most."""
        return 2

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises MethodError when the model is packed already, or has too few experts."""
        super().check(checkpoint)
        if not 1 <= self.recipe.clusters < checkpoint.experts:
            raise MethodError(
                f"--clusters {self.recipe.clusters}: {checkpoint.folder} has {checkpoint.experts} experts per layer; "
                f"choose 1 to {checkpoint.experts - 1}"
            )

    def bits_per_weight(self, checkpoint: Checkpoint) -> float:
        """bf16 for one expert per cluster."""
        return 16 * self.recipe.clusters / checkpoint.experts

    def choices(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The recipe's fields."""
        return self.recipe.model_dump()

    def quantization(self, checkpoint: Checkpoint, records: list[LayerRecord]) -> PuzzleConfig:
        """Which experts serve for which."""
        clusters = {record.layer: record.centres for record in records if record.centres}
        return PuzzleConfig(clusters=clusters)

    def shard_metadata(self) -> dict[str, str]:
        """Of a packed model without words."""
        return shard_metadata(None)

    def observe(self, layer: SourceLayer, passes: LayerPasses) -> _Seen:
        """Counts tokens in one pass, sums up the clusters' outputs in the other, and solves for the merged experts."""
        tokens = torch.zeros(layer.checkpoint.experts, dtype=torch.int64)

        def count(hidden: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
            tokens.add_(ids.flatten().bincount(minlength=len(tokens)).cpu())

        passes.run(record=count)
        merger, sample = LayerMerger(layer.expert, tokens, self.recipe.clusters), SampledTokens()

        def sum_up(hidden: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
            merger.observe(hidden, ids)
            sample.record(hidden, ids, weights, out)

        passes.run(record=sum_up)
        try:
            return _Seen(tokens, merger.finish(), sample)
        except MethodError as error:
            raise MethodError(f"layer {layer.index}, {error}") from None

    def merge(self, layer: SourceLayer, seen: _Seen) -> NewLayer:
        """The merged experts, with what each of the source's lost by them."""
        merged = seen.merged
        errors = seen.sample.output_errors(layer.checkpoint.experts, layer.expert, merged.expert)
        record = LayerRecord(
            layer=layer.index,
            centres=merged.centres,
            tokens=seen.tokens.tolist(),
            few_tokens=few_tokens(seen.tokens),
            output_error=errors.layer,
            expert_output_error=errors.experts,
        )
        tensors: dict[str, Tensor] = {}
        for centre, expert in merged.merged.items():
            tensors |= dense_tensors(layer.checkpoint, layer.index, centre, expert)
        new = NewLayer(tensors, record)
        record.expert_bytes = new.nbytes
        return new
