"""From the router's choice of experts to a choice of clusters."""

import torch

from puzzlemoe_vllm.clusters import choose_clusters

CENTRES = torch.tensor([0, 3, 0, 3, 3], dtype=torch.int32)


def test_weights_of_one_cluster_are_added():
    ids = torch.tensor([[0, 1, 2], [1, 3, 4], [0, 1, -1], [-1, -1, -1], [2, -1, 0]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 0.25, 0.125]]).repeat(5, 1)
    summed, chosen = choose_clusters(weights, ids, CENTRES)
    assert chosen.tolist() == [[0, 3, -1], [3, -1, -1], [0, 3, -1], [-1, -1, -1], [0, -1, -1]]
    assert [row[ids >= 0].tolist() for row, ids in zip(summed, chosen, strict=True)] == [
        [0.625, 0.25],
        [0.875],
        [0.5, 0.25],
        [],
        [0.625],
    ]
    assert summed.dtype == weights.dtype and chosen.dtype == ids.dtype


def test_every_weight_of_a_row_is_kept():
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(5, generator=generator)[:4] for _ in range(50)])
    weights = torch.rand(50, 4, generator=generator)
    summed, chosen = choose_clusters(weights, ids, CENTRES)
    for centre in (0, 3):
        expected = (weights * (CENTRES[ids] == centre)).sum(dim=1)
        torch.testing.assert_close((summed * (chosen == centre)).sum(dim=1), expected)
        assert (chosen == centre).sum(dim=1).max() == 1
