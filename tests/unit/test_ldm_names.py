"""Names of single-file checkpoints: both ways, and against the layout that the published files have."""

from __future__ import annotations

import pytest

from lora_diffusion.ldm_names import (
    Place,
    openclip_place,
    place_in_single_file,
    unet_from_ldm,
    unet_to_ldm,
    vae_to_ldm,
)

PUBLISHED = {  # of stable-diffusion-xl-base-1.0, and of SD 1.5 where block 0 of the way up is plain
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0": "middle_block.1.transformer_blocks.9.attn2.to_out.0",
    "up_blocks.0.attentions.2.proj_out": "output_blocks.2.1.proj_out",
    "down_blocks.0.resnets.0.conv1.weight": "input_blocks.1.0.in_layers.2.weight",
    "down_blocks.0.resnets.0.time_emb_proj": "input_blocks.1.0.emb_layers.1",
    "down_blocks.0.resnets.0.conv2": "input_blocks.1.0.out_layers.3",
    "down_blocks.1.resnets.0.conv_shortcut.bias": "input_blocks.4.0.skip_connection.bias",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.2.conv.weight",
    "mid_block.resnets.1.norm1.weight": "middle_block.2.in_layers.0.weight",
    "conv_in.weight": "input_blocks.0.0.weight",
    "conv_norm_out.bias": "out.0.bias",
    "time_embedding.linear_2.weight": "time_embed.2.weight",
    "add_embedding.linear_1.weight": "label_emb.0.0.weight",
}


@pytest.mark.parametrize(("ours", "theirs"), PUBLISHED.items())
def test_unet_names_are_those_of_the_published_files(ours: str, theirs: str) -> None:
    assert unet_to_ldm(ours) == theirs
    assert unet_from_ldm(theirs) == ours


def test_an_upsampler_comes_earlier_in_a_block_without_attention() -> None:
    name = "up_blocks.0.upsamplers.0.conv.weight"
    assert unet_to_ldm(name, plain_up_blocks=[0]) == "output_blocks.2.1.conv.weight"
    assert unet_from_ldm("output_blocks.2.1.conv.weight") == name


@pytest.mark.parametrize(
    "name", ["", "foo", "down_blocks.x.resnets.0.conv1", "down_blocks.0.resnets.0.foo", "conv_inn"]
)
def test_names_of_no_unet_are_refused(name: str) -> None:
    with pytest.raises(ValueError):
        unet_to_ldm(name)
    with pytest.raises(ValueError):
        unet_from_ldm(name)


def test_vae_blocks_count_backwards_on_the_way_up() -> None:
    assert vae_to_ldm("decoder.up_blocks.0.resnets.1.conv1.weight") == "decoder.up.3.block.1.conv1.weight"
    assert (
        vae_to_ldm("encoder.down_blocks.1.resnets.0.conv_shortcut.bias") == "encoder.down.1.block.0.nin_shortcut.bias"
    )
    assert vae_to_ldm("decoder.mid_block.attentions.0.to_out.0.weight") == "decoder.mid.attn_1.proj_out.weight"
    assert vae_to_ldm("decoder.up_blocks.2.upsamplers.0.conv.bias") == "decoder.up.1.upsample.conv.bias"
    assert vae_to_ldm("quant_conv.weight") == "quant_conv.weight"


def test_openclip_stacks_q_k_and_v() -> None:
    places = [openclip_place(f"text_model.encoder.layers.3.self_attn.{x}_proj.weight") for x in "qkv"]
    assert places == [Place("transformer.resblocks.3.attn.in_proj_weight", third) for third in range(3)]
    assert openclip_place("encoder.layers.3.mlp.fc2.bias").key == "transformer.resblocks.3.mlp.c_proj.bias"
    assert openclip_place("text_projection.weight") == Place("text_projection", is_transposed=True)
    with pytest.raises(ValueError):
        openclip_place("encoder.layers.3.foo.weight")


def test_text_encoders_of_each_family_have_their_own_prefix() -> None:
    layer = "encoder.layers.0.mlp.fc1.weight"
    keys = {
        (family, part): place_in_single_file(family, part, layer).key
        for family, part in (("sd1", "text_encoder"), ("sd2", "text_encoder"), ("sdxl", "text_encoder"))
    }
    assert keys == {
        ("sd1", "text_encoder"): f"cond_stage_model.transformer.text_model.{layer}",
        ("sd2", "text_encoder"): "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight",
        ("sdxl", "text_encoder"): f"conditioner.embedders.0.transformer.text_model.{layer}",
    }
    second = place_in_single_file("sdxl", "text_encoder_2", f"text_model.{layer}").key
    assert second == "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight"
    with pytest.raises(ValueError, match="no part"):
        place_in_single_file("sd1", "text_encoder_2", layer)
