"""Module names in files: exactly those of the kohya LoRAs that exist for SD 1.5, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from lora_diffusion.adapters.inject import select_layers
from lora_diffusion.formats.names import (
    canonical_name,
    from_peft_key,
    kohya_name,
    name_in_file,
    peft_name,
    split_kohya_name,
)
from lora_diffusion.ldm_names import with_text_model
from lora_diffusion.models.base import Part
from tests.reference import make_other_kohya_keys as other
from tests.sd15 import make_text_encoder, make_unet

PUBLISHED = Path(__file__).parents[1].joinpath("reference", "sd15_kohya_keys.txt").read_text().split()
CONVOLUTIONS = ("_resnets_", "_downsamplers_", "_upsamplers_")


@pytest.fixture(scope="module")
def parts() -> dict[str, Part]:
    unet = Part(make_unet(), "lora_unet")
    return {"unet": unet, "text_encoder": Part(make_text_encoder(), "lora_te", rename=with_text_model)}


def our_names(part: Part, targets: str) -> set[str]:
    return {part.file_name(path) for path in select_layers(part.module, targets)}


def test_the_published_list_has_the_counts_sd_scripts_prints() -> None:
    """192 and 72 are what it logs for SD 1.5; with conv_dim come 22 · 3 + 14 + 6 convolutions and time projections."""
    unet = [name for name in PUBLISHED if name.startswith("lora_unet_")]
    assert len(unet) == 278
    assert sum(not any(kind in name for kind in CONVOLUTIONS) for name in unet) == 192
    assert sum(name.startswith("lora_te_text_model_encoder_layers_") for name in PUBLISHED) == 72
    assert len(PUBLISHED) == len(set(PUBLISHED)) == 350


def test_full_names_are_the_published_ones(parts: dict[str, Part]) -> None:
    assert our_names(parts["unet"], "full") | our_names(parts["text_encoder"], "full") == set(PUBLISHED)


def test_attention_mlp_names_are_the_published_ones_without_convolutions(parts: dict[str, Part]) -> None:
    expected = {n for n in PUBLISHED if n.startswith("lora_unet_") and not any(kind in n for kind in CONVOLUTIONS)}
    assert our_names(parts["unet"], "attention-mlp") == expected


def test_attention_names_are_the_128_projections_of_the_unet(parts: dict[str, Part]) -> None:
    expected = {name for name in PUBLISHED if "_attn1_to_" in name or "_attn2_to_" in name}
    assert our_names(parts["unet"], "attention") == expected
    assert len(expected) == 128


def test_text_model_level_is_in_the_name_whether_or_not_the_module_has_it() -> None:
    part = Part(nn.Module(), "lora_te", rename=with_text_model)
    expected = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    assert part.file_name("encoder.layers.0.mlp.fc1") == expected
    assert part.file_name("text_model.encoder.layers.0.mlp.fc1") == expected


def test_a_text_projection_lies_beside_the_text_model(sdxl_parts: dict[str, Part]) -> None:
    name = "lora_te2_text_projection"
    assert sdxl_parts["text_encoder_2"].file_name("text_projection") == name
    assert peft_name(name) == "text_encoder_2.text_projection"
    assert from_peft_key(f"{peft_name(name)}.lora_B.weight", two_encoders=True) == (name, "lora_up.weight")


def test_every_published_name_splits_into_a_path_that_gives_it_back() -> None:
    for name in PUBLISHED:
        prefix, path = split_kohya_name(name)
        assert kohya_name(prefix, path) == name


def test_split_paths_are_the_module_paths(parts: dict[str, Part]) -> None:
    for path in select_layers(parts["unet"].module, "full"):
        assert split_kohya_name(parts["unet"].file_name(path)) == ("lora_unet", path)


def test_peft_keys_come_back_as_the_same_kohya_names() -> None:
    for name in PUBLISHED:
        assert from_peft_key(f"{peft_name(name)}.lora_A.weight") == (name, "lora_down.weight")
        assert from_peft_key(f"{peft_name(name)}.lora_B.weight") == (name, "lora_up.weight")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("unet.a.attn1.processor.to_q_lora.down.weight", ("lora_unet_a_attn1_to_q", "lora_down.weight")),
        ("unet.a.attn2.processor.to_out_lora.up.weight", ("lora_unet_a_attn2_to_out_0", "lora_up.weight")),
        ("unet.a.ff.net.2.lora.down.weight", ("lora_unet_a_ff_net_2", "lora_down.weight")),
        (
            "text_encoder.text_model.encoder.layers.1.self_attn.to_out_lora.down.weight",
            ("lora_te_text_model_encoder_layers_1_self_attn_out_proj", "lora_down.weight"),
        ),
        (
            "text_encoder.encoder.layers.1.self_attn.k_proj.lora_linear_layer.up.weight",
            ("lora_te_text_model_encoder_layers_1_self_attn_k_proj", "lora_up.weight"),
        ),
        ("unet.conv_in.weight", None),
        ("something.else", None),
    ],
)
def test_keys_of_older_diffusers_are_understood(key: str, expected: tuple[str, str] | None) -> None:
    assert from_peft_key(key) == expected


def test_first_text_encoder_is_numbered_when_there_are_two() -> None:
    key = "text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight"
    name = from_peft_key(key, two_encoders=True)
    assert name is not None
    assert name[0] == "lora_te1_text_model_encoder_layers_0_mlp_fc1"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("lora_unet_input_blocks_4_1_proj_in", "lora_unet_down_blocks_1_attentions_0_proj_in"),
        (
            "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_out_0",
            "lora_unet_mid_block_attentions_0_transformer_blocks_9_attn2_to_out_0",
        ),
        ("lora_unet_output_blocks_2_2_conv", "lora_unet_up_blocks_0_upsamplers_0_conv"),
        ("lora_unet_input_blocks_3_0_op", "lora_unet_down_blocks_0_downsamplers_0_conv"),
        ("lora_unet_input_blocks_1_0_emb_layers_1", "lora_unet_down_blocks_0_resnets_0_time_emb_proj"),
    ],
)
def test_the_ldm_spelling_of_a_module_has_the_same_canonical_name(theirs: str, ours: str) -> None:
    assert canonical_name(theirs) == canonical_name(ours) == ours
    assert name_in_file(ours, "sdxl") == theirs
    assert name_in_file(ours, "sd1") == name_in_file(ours, "sd2") == ours


def test_names_outside_the_unet_are_spelled_alike_everywhere() -> None:
    for name in ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_unet_unheard_of", "foo"):
        assert canonical_name(name) == name_in_file(name, "sdxl") == name


def test_the_lycoris_prefix_means_the_unet() -> None:
    name = "lycoris_down_blocks_0_attentions_0_proj_in"
    assert canonical_name(name) == "lora_unet_down_blocks_0_attentions_0_proj_in"


# SD 2.1 and SDXL


def published(name: str) -> list[str]:
    return (Path(__file__).parents[1] / "reference" / f"{name}_kohya_keys.txt").read_text(encoding="utf-8").split()


def our_names_for(family: str, parts: dict[str, Part], targets: str) -> set[str]:
    """By way of the canonical name, as `AdapterFile` makes them."""
    found = [canonical_name(name) for part in parts.values() for name in our_names(part, targets)]
    assert len(found) == len(set(found))
    return {name_in_file(name, family) for name in found}


def test_names_for_sd_2_1_are_the_published_ones() -> None:
    parts = {
        "unet": Part(other.make_unet(other.SD21_UNET), "lora_unet"),
        "text_encoder": Part(other.make_text_encoder(other.CLIP_H), "lora_te", rename=with_text_model),
    }
    expected = published("sd21")
    assert len(expected) == len(set(expected)) == 278 + 138
    assert our_names_for("sd2", parts, "full") == set(expected)
    # the same UNet as SD 1.5's, only wider
    assert {n for n in expected if n.startswith("lora_unet")} == {n for n in PUBLISHED if n.startswith("lora_unet")}


@pytest.fixture(scope="module")
def sdxl_parts() -> dict[str, Part]:
    second = other.make_text_encoder(other.CLIP_G, projects=True)
    return {
        "unet": Part(other.make_unet(other.SDXL_UNET), "lora_unet"),
        "text_encoder": Part(other.make_text_encoder(other.CLIP_L), "lora_te1", rename=with_text_model),
        "text_encoder_2": Part(second, "lora_te2", rename=with_text_model),
    }


def test_names_for_sdxl_are_the_published_ones(sdxl_parts: dict[str, Part]) -> None:
    expected = published("sdxl")
    assert len(expected) == len(set(expected)) == 722 + 66 + 72 + 192
    assert our_names_for("sdxl", sdxl_parts, "full") == set(expected)


def test_attention_mlp_names_for_sdxl_are_those_without_convolutions(sdxl_parts: dict[str, Part]) -> None:
    expected = {name for name in published("sdxl") if not other.is_convolution(name)}
    assert len(expected) == 722 + 72 + 192
    assert our_names_for("sdxl", sdxl_parts, "attention-mlp") == expected


def test_every_published_sdxl_name_is_read_as_a_module_of_the_model(sdxl_parts: dict[str, Part]) -> None:
    ours = {part.file_name(path): path for part in sdxl_parts.values() for path in select_layers(part.module, "full")}
    for name in published("sdxl"):
        assert name_in_file(canonical_name(name), "sdxl") == name
        assert canonical_name(name) in ours
        assert canonical_name(canonical_name(name)) == canonical_name(name)


def test_peft_names_of_sdxl_come_back_as_the_canonical_names() -> None:
    for name in map(canonical_name, published("sdxl")):
        key = f"{peft_name(name)}.lora_A.weight"
        assert from_peft_key(key, two_encoders=True) == (name, "lora_down.weight")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("base_model.model.mid_block.attentions.0.proj_in", "lora_unet_mid_block_attentions_0_proj_in"),
        ("base_model.model.unet.mid_block.attentions.0.proj_in", "lora_unet_mid_block_attentions_0_proj_in"),
        ("mid_block.attentions.0.proj_in", "lora_unet_mid_block_attentions_0_proj_in"),
        ("base_model.model.text_model.encoder.layers.0.mlp.fc1", "lora_te_text_model_encoder_layers_0_mlp_fc1"),
        ("base_model.model.encoder.layers.0.mlp.fc1", "lora_te_text_model_encoder_layers_0_mlp_fc1"),
        ("base_model.model.transformer_blocks.0.attn.to_q", None),
        ("transformer.single_blocks.0.linear1", None),
    ],
)
def test_a_peft_model_of_one_component_is_known_by_its_paths(key: str, expected: str | None) -> None:
    name = from_peft_key(f"{key}.lora_B.weight")
    assert name == (None if expected is None else (expected, "lora_up.weight"))
