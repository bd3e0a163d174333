"""Two ranks generate what one rank does: tensor, pipeline and expert parallel.

Two processes start anew for every model, which takes long: what can be in one model is.  contract.py has the rest.
"""

from __future__ import annotations

import os

import pytest
from support.comparison import assert_same_generation

pytestmark = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="vLLM's CPU build wants a core for each rank")

EXPERT_PARALLEL = {"tensor_parallel_size": 2, "enable_expert_parallel": True}


@pytest.fixture(scope="module")
def check(engine, parallel_engine, models):
    """check(options, family, **model): a model on two ranks generates what its unpacked form generates on one."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("the two ranks need vLLM's CPU build")

    def run(options, family="mixtral", **model):
        both = models(family, **model)
        expected = engine.generate(both.unpacked, enforce_eager=True)
        assert_same_generation(expected, parallel_engine.generate(both.packed, **({"enforce_eager": True} | options)))

    return run


def test_tensor_parallel_with_pairs_group_steps_and_dense_experts(check):
    # Groups of 128 on disk, of 64 on a rank.
    check({"tensor_parallel_size": 2}, sparsity="0.25", code="angle8", intermediate_size=384)


def test_tensor_parallel_whose_share_is_no_whole_number_of_the_smallest_groups(check):
    # Groups of 32 on disk; a rank has 80 columns.
    check({"tensor_parallel_size": 2}, sparsity="0.25", code="angle6", intermediate_size=160)


def test_tensor_parallel_that_cuts_tiles(check):
    # A rank has 80 columns, two and a half tiles of a trellis.
    check({"tensor_parallel_size": 2}, sparsity="0.25", code="trellis4", intermediate_size=160)


def test_uneven_shares_of_the_experts_that_cut_a_pair(check):
    # Of five experts a rank has three, with half of the second pair.
    check(EXPERT_PARALLEL, num_local_experts=5)


# A sigmoid router with a bias and shared experts; linear attention, and shared experts with a gate.
@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_next"])
@pytest.mark.parametrize("options", [{"tensor_parallel_size": 2}, EXPERT_PARALLEL], ids=["tensor", "expert"])
def test_other_routers_and_attention(check, family, options):
    check(options, family)


def test_clusters_with_members_on_another_rank(check):
    check(EXPERT_PARALLEL, clusters=3)


def test_pipeline_parallel(check):
    # vLLM's CPU build makes the buffers between pipeline ranks only when it compiles.
    check({"pipeline_parallel_size": 2, "enforce_eager": False}, sparsity="0.25")
