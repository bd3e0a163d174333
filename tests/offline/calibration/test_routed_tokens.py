"""Every expert gets the calibration tokens that chose it, with the router's weights for it."""

import torch
from support.triton_device import DEVICE

from puzzlemoe_offline.calibration import routed_tokens
from puzzlemoe_offline.calibration.routed_tokens import RoutedTokens


def test_every_expert_gets_its_tokens_and_weights(monkeypatch):
    monkeypatch.setattr(routed_tokens, "AT_ONCE", 4)
    torch.manual_seed(0)
    tokens, batches = RoutedTokens(6), []
    for count in (7, 1, 12):
        hidden, weights = torch.randn(count, 8, device=DEVICE), torch.rand(count, 2, device=DEVICE)
        some = 3 if count == 12 else 5  # two experts get none of the last batch, and one no token at all
        ids = torch.stack([torch.randperm(some)[:2] for _ in range(count)]).to(DEVICE)
        batches.append((hidden.clone(), ids.clone(), weights.clone()))
        tokens.record(hidden, ids, weights, hidden)
        hidden.zero_()  # memory that a layer may use again
    for expert in range(6):
        expected = [
            torch.cat([hidden[token], weights[token, choice, None]])
            for hidden, ids, weights in batches
            for token, choice in (ids == expert).nonzero().tolist()
        ]
        found = list(tokens.of(expert))
        assert all(0 < len(inputs) == len(weights) <= 4 for inputs, weights in found)
        assert all(len(inputs) == 4 for inputs, _ in found[:-1])
        rows = [torch.cat([inputs, weights[:, None]], dim=1) for inputs, weights in found]
        assert sum(map(len, rows)) == len(expected) and (expert < 5) == bool(expected)
        if expected:
            # In any order: an expert's error does not depend on it.
            order = [each.double().sum(dim=1).argsort() for each in (torch.cat(rows), torch.stack(expected))]
            assert torch.equal(torch.cat(rows)[order[0]], torch.stack(expected)[order[1]])
