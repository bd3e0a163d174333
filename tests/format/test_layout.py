"""quantization_config: what is accepted, and how each thing that is not is named."""

import pytest

from puzzlemoe_vllm.format.layout import (
    LayoutError,
    PuzzleConfig,
    layout_digest,
    parse_config,
    steps_name,
    weight_name,
    words_name,
)

GOOD = {
    "quant_method": "puzzlemoe",
    "format_version": 2,
    "code": "mask16",
    "merged_experts": {"0": 8, "3": 4},
    "clusters": {"1": [0, 2, 2]},
}


def test_a_config_survives_json():
    config = parse_config(GOOD)
    assert config.merged_experts == {0: 8, 3: 4} and config.clusters == {1: [0, 2, 2]}
    assert parse_config(PuzzleConfig.model_validate_json(config.model_dump_json()).model_dump()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "format_version.*upgrade puzzlemoe-vllm"),
        ({"format_version": 1}, "format_version.*compress the source model again"),
        ({"code": "mask17"}, "code.*mask17.*mask16"),
        ({"merged_experts": {"0": 3}}, "layer 0 is 3"),
        ({"merged_experts": {"0": 0}}, "layer 0 is 0"),
        ({"merged_experts": {"first": 4}}, "merged_experts"),
        ({"group_size": 128}, "mask16 has no group steps"),
        ({"code": "angle8"}, "angle8 has one step per group.*group_size is None"),
        ({"code": "mask6", "group_size": 48}, "mask6 has one step per group.*group_size is 48"),
        ({"quant_method": "fp8"}, "quant_method"),
        ({"clusters": {"1": [0, 0, 1]}}, "expert 2 of layer 1 is served by expert 1, which does not serve itself"),
        ({"clusters": {"1": [0, 2]}}, "expert 1 of layer 1 is served by expert 2"),
        ({"merged_experts": {}, "clusters": {}}, "both merged_experts and clusters are empty"),
        ({"merged_experts": {}}, "code is 'mask16', but no layer is in merged_experts"),
        ({"code": None}, "code is missing"),
        ({"code": None, "merged_experts": {}, "group_size": 64}, "group_size is 64, but there is no code"),
        ({"clusters": {"3": [0, 0]}}, "layer 3 is in both merged_experts and clusters"),
    ],
)
def test_each_fault_is_named(change, message):
    with pytest.raises(LayoutError, match=message):
        parse_config(GOOD | change)


def test_clusters_alone_have_no_code():
    config = parse_config({"clusters": {"1": [0, 2, 2]}})
    assert config.code is None and config.group_size is None


def test_the_digest_is_of_what_decides_how_tensors_are_read():
    digests = {
        layout_digest(parse_config(GOOD | change))
        for change in ({}, {"code": "angle16"}, {"clusters": {"1": [0, 0, 2]}}, {"merged_experts": {"0": 8, "3": 2}})
    }
    assert len(digests) == 4
    provenance = {"source": "here", "tool_version": "1", "recipe": {}}
    assert layout_digest(parse_config(GOOD | {"provenance": provenance})) in digests


def test_names_keep_clear_of_vllm_filters():
    name = words_name("model.layers.0.mlp.experts", 4, "up_proj")
    assert name == "model.layers.0.mlp.experts.4.up_proj.puzzle"
    assert steps_name("model.layers.0.mlp.experts", 4, "up_proj") == name + "_grid"
    assert weight_name("model.layers.0.mlp.experts", 5, "up_proj") == "model.layers.0.mlp.experts.5.up_proj.weight"


@pytest.mark.parametrize("key", ["x" * 3000, "\n.[key]", "1" * 5000])
def test_a_hostile_field_is_one_short_line(key):
    with pytest.raises(LayoutError) as caught:
        parse_config({"code": "mask16", "merged_experts": {key: 2}}, "config.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 400
