"""PuzzleMoE: a layer's experts in pairs, as words (arXiv 2511.04805), by whatever code and rule the recipe names."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from puzzlemoe_offline.calibration.passes import LayerPasses
from puzzlemoe_offline.calibration.routed_tokens import RoutedTokens
from puzzlemoe_offline.calibration.sampled_tokens import OutputErrors, SampledTokens
from puzzlemoe_offline.calibration.statistics import FEW_TOKENS, ExpertStatistics, few_tokens
from puzzlemoe_offline.methods.base import LayerMethod, LayerRecord, MethodError, NewLayer, expert_statistics
from puzzlemoe_offline.methods.packed_layer import PackedLayer
from puzzlemoe_offline.model.checkpoint import Checkpoint
from puzzlemoe_offline.model.families import expert_groups
from puzzlemoe_offline.model.layer_experts import SourceLayer
from puzzlemoe_offline.pairing.lost import LOST
from puzzlemoe_offline.pairing.pair_cost import LOAD_PRICE, loads_saved, merge_errors
from puzzlemoe_offline.pairing.partners import (
    LayerPairing,
    PairCosts,
    check_groups,
    merged_count,
    pair_experts,
    shared_choices,
)
from puzzlemoe_offline.recipe import PairRecipe
from puzzlemoe_offline.words.factors import MomentsError
from puzzlemoe_offline.words.pack import Losses, PackedPair, pack_pairs, pairs_at_once
from puzzlemoe_vllm.format.codes import CODES, GROUP_SIZES, PairCode, UnencodableWeight, get_code
from puzzlemoe_vllm.format.layout import PuzzleConfig
from puzzlemoe_vllm.format.shards import shard_metadata


@dataclass(frozen=True)
class _Seen:
    """Of a layer: what its experts saw, sampled tokens to measure what merging does to its output, and all tokens where
    the recipe corrects down projections."""

    statistics: ExpertStatistics
    sample: SampledTokens
    tokens: RoutedTokens | None


@dataclass(frozen=True)
class PairMethod(LayerMethod):
    """Experts merged in pairs as a recipe says."""

    recipe: PairRecipe
    packs: ClassVar[bool] = True

    @property
    def passes(self) -> int:
        """One over the calibration tokens, or none where magnitudes alone decide."""
        return 1 if self.recipe.calibrated else 0

    @property
    def code(self) -> PairCode:
        """The recipe's code."""
        return get_code(self.recipe.code)

    def group_size(self, checkpoint: Checkpoint) -> int | None:
        """Input columns that share a step: the recipe's choice, or the largest that fits; None for codes without steps.

        Raises MethodError when it does not divide the model's sizes.
        """
        if not self.code.has_steps:
            return None
        chosen, sizes = self.recipe.group_size, checkpoint.expert_sizes
        fitting = [size for size in GROUP_SIZES if all(columns % size == 0 for columns in sizes)]
        if chosen in fitting or (chosen is None and fitting):
            return chosen or fitting[0]
        without = next(code.name for code in CODES.values() if not code.has_steps and not code.rules)
        raise MethodError(
            f"{checkpoint.folder}: hidden size {sizes[0]} and intermediate size {sizes[1]} are not multiples of "
            f"--group-size {chosen or GROUP_SIZES[-1]}; "
            + (f"use --group-size {fitting[0]}" if fitting else f"use --code {without}, which has no groups")
        )

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises MethodError when the model is packed already, or its experts do not fit the recipe; UnsupportedModel
        for routing groups that cannot be paired."""
        super().check(checkpoint)
        self.group_size(checkpoint)
        check_groups(checkpoint.experts, expert_groups(checkpoint.text))
        if self.recipe.sparsity == 0.25 and checkpoint.experts < 4:
            raise MethodError(
                f"--sparsity 0.25: half of the {checkpoint.experts} experts per layer of {checkpoint.folder} are no "
                "pair; use --sparsity 0.5"
            )

    def bits_per_weight(self, checkpoint: Checkpoint) -> float:
        """Half a word's and its step's of experts that merge, bf16 of the others; if no more stay dense than the recipe
        says."""
        merged = merged_count(checkpoint.experts, self.recipe.sparsity, expert_groups(checkpoint.text))
        share = merged / checkpoint.experts
        return share * self.code.bits_per_pair(self.group_size(checkpoint)) / 2 + (1 - share) * 16

    def choices(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The recipe's fields, with the group size that it comes to."""
        return self.recipe.model_dump(exclude_none=True) | (
            {"group_size": group} if (group := self.group_size(checkpoint)) else {}
        )

    def quantization(self, checkpoint: Checkpoint, records: list[LayerRecord]) -> PuzzleConfig:
        """Which experts are in pairs, and how their words are read.  Raises MethodError when none are."""
        merged = {record.layer: record.merged for record in records if record.merged}
        if not merged:
            raise MethodError(
                f"{checkpoint.folder}: in every pair of every layer one expert would be lost, so that nothing merged; "
                "--recipe paper merges them all the same, --method mergemoe merges whole experts"
            )
        return PuzzleConfig(code=self.recipe.code, group_size=self.group_size(checkpoint), merged_experts=merged)

    def shard_metadata(self) -> dict[str, str]:
        """Of a packed model with words of the recipe's code."""
        return shard_metadata(self.recipe.code)

    def observe(self, layer: SourceLayer, passes: LayerPasses) -> _Seen:
        """Statistics, and sampled tokens.  Raises MethodError for activations that are too large."""
        recipe, sample = self.recipe, SampledTokens()
        tokens = RoutedTokens(layer.checkpoint.experts) if recipe.correct_down else None

        def record(hidden: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
            for kept in (sample, tokens):
                if kept is not None:
                    kept.record(hidden, ids, weights, out)

        statistics = expert_statistics(
            layer,
            passes,
            moments=recipe.compensate,
            hidden_moments=not recipe.correct_down,
            by_router=not recipe.is_paper,
            record=record,
        )
        self._check_inputs(layer, statistics)
        return _Seen(statistics, sample, tokens)

    def merge(self, layer: SourceLayer, seen: _Seen | None) -> NewLayer:
        """Pairs partners, packs them, and measures what each expert lost.

        A pair that lost one (`LOST`) stays dense after all; but not by the paper's rule, which is kept to the letter.
        """
        statistics, sample = (seen.statistics, seen.sample) if seen else (None, SampledTokens())
        tokens = seen.tokens if seen else None
        record, groups = LayerRecord(layer=layer.index), expert_groups(layer.checkpoint.text)
        began = time.perf_counter()
        pairing = self._pair(layer, statistics)
        record.seconds["pair"] = time.perf_counter() - began
        packed = self._pack(layer, statistics, tokens, pairing)
        errors = sample.output_errors(layer.checkpoint.experts, layer.expert, packed.expert)
        lost = _lost(packed.expert_weight_error, errors)
        if lost and not self.recipe.is_paper:
            packed = packed.without(pairing.without(lost, groups), layer.expert)
            errors = sample.output_errors(layer.checkpoint.experts, layer.expert, packed.expert)
            lost = set()
        record.order, record.merged = packed.pairing.order, packed.pairing.merged
        record.lost, record.spared = sorted(lost), packed.pairing.spared
        record.pair_bytes = packed.pair_bytes
        record.weight_error, record.clamped = packed.weight_error, sum(losses.clamped for losses in packed.losses)
        record.expert_weight_error = packed.expert_weight_error
        if statistics:
            record.tokens, record.few_tokens = statistics.tokens.tolist(), few_tokens(statistics.tokens)
            record.output_error, record.expert_output_error = errors.layer, errors.experts
            shared, if_random = shared_choices(packed.pairing, statistics.together, groups)
            record.shared_choices = {"this pairing": shared, "random partners": if_random}
        new = NewLayer(packed.tensors(layer.checkpoint, layer.index), record)
        record.expert_bytes = new.nbytes
        return new

    def _check_inputs(self, layer: SourceLayer, statistics: ExpertStatistics) -> None:
        """Raises MethodError for an expert that saw activations whose squares do not fit into float32."""
        squares = statistics.input_squares.sum(dim=1) + statistics.hidden_squares.sum(dim=1)
        too_large = ~(squares <= torch.finfo(torch.float32).max)
        if bool(too_large.any()):
            magnitude = "--saliency magnitude" + (" with --no-compensate" if self.recipe.compensate else "")
            raise MethodError(
                f"layer {layer.index}, expert {too_large.nonzero()[0].item()}: on the calibration text the squares of "
                f"its activations leave float32; use {magnitude}, which needs no calibration, or copy or download "
                f"{layer.checkpoint.folder} again if it should have no such activations"
            )

    def _pair(self, layer: SourceLayer, statistics: ExpertStatistics | None) -> LayerPairing:
        return pair_experts(
            layer.checkpoint.experts,
            self.recipe.sparsity,
            expert_groups(layer.checkpoint.text),
            statistics.tokens if statistics else None,
            self.recipe.seed * 100_003 + layer.index,
            self._costs(layer, statistics),
        )

    def _costs(self, layer: SourceLayer, statistics: ExpertStatistics | None) -> PairCosts | None:
        """What the recipe's pairing minimises; None for random partners."""

        def errors(pool: list[int]) -> Tensor:
            group, device = self.group_size(layer.checkpoint), torch.device(layer.device)
            try:
                return merge_errors(pool, layer.expert, statistics, self.recipe, group, device)
            except UnencodableWeight as error:
                raise UnencodableWeight(f"layer {layer.index}, {error}") from None

        def saved(pool: list[int]) -> Tensor:
            assert statistics is not None
            return loads_saved(pool, statistics)

        match self.recipe.pairing:
            case "random":
                return None
            case "search":
                return errors
            case "coactivation":
                return lambda pool: -saved(pool)
            case "balanced":
                return lambda pool: errors(pool) - LOAD_PRICE * saved(pool)

    def _pack(
        self,
        layer: SourceLayer,
        statistics: ExpertStatistics | None,
        tokens: RoutedTokens | None,
        pairing: LayerPairing,
    ) -> PackedLayer:
        group, pairs, losses = self.group_size(layer.checkpoint), [], []
        hidden, intermediate = layer.checkpoint.expert_sizes
        columns, rows = max(hidden, intermediate), min(hidden, intermediate)
        at_once = pairs_at_once(self.code, columns, rows, torch.device(layer.device))
        for start in range(0, len(pairing.pairs), at_once):
            some = pairing.pairs[start : start + at_once]
            found, its_losses = self._pack_some(layer, statistics, tokens, some, group)
            pairs += found
            losses += its_losses
        dense = [layer.expert(number) for number in pairing.order[pairing.merged :]]
        return PackedLayer(pairing, pairs, losses, dense, self.code)

    def _pack_some(
        self,
        layer: SourceLayer,
        statistics: ExpertStatistics | None,
        tokens: RoutedTokens | None,
        ids: list[tuple[int, int]],
        group: int | None,
    ) -> tuple[list[PackedPair], list[Losses]]:
        members = [(layer.expert(first), layer.expert(second)) for first, second in ids]
        losses = [Losses() for _ in ids]
        try:
            return pack_pairs(members, ids, statistics, tokens, self.recipe, group, losses), losses
        except (UnencodableWeight, MomentsError) as error:
            for one in ids if len(ids) > 1 else ():  # raises it naming the pair
                self._pack_some(layer, statistics, tokens, [one], group)
            raise type(error)(f"layer {layer.index}, {error}") from None


def _lost(weights: list[list[float | None]], outputs: OutputErrors) -> set[int]:
    """Experts that merging has lost, by their own errors; outputs count where enough tokens chose the expert."""
    by_weights = {
        expert for expert, errors in enumerate(weights) if any(error is None or error > LOST for error in errors)
    }
    judged = zip(outputs.experts, outputs.tokens, strict=True)
    return by_weights | {
        expert
        for expert, (error, tokens) in enumerate(judged)
        if error is not None and error > LOST and tokens >= FEW_TOKENS
    }
