from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from lora_diffusion.tools.charts import COLORS, bar_panels, block_of, heat_map, in_order

BLOCKS = (
    *("down 0.0", "down 0.1", "down 0 sampler", "down 1.0", "down 1.1", "down 1 sampler", "mid"),
    *("up 0.0", "up 0.1", "up 0 sampler", "up 1.0", "up 10.0", "out", "text 1", "text 2"),
)


def num_pixels(path: Path, color: str) -> int:
    with Image.open(path) as image:
        return int((np.asarray(image.convert("RGB")) == ImageColor.getrgb(color)).all(-1).sum())


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "down 1.0"),
        ("lora_unet_down_blocks_1_resnets_0_conv_shortcut", "down 1.0"),
        ("lora_unet_down_blocks_2_downsamplers_0_conv", "down 2 sampler"),
        ("lora_unet_up_blocks_0_upsamplers_0_conv", "up 0 sampler"),
        ("lora_unet_up_blocks_2_attentions_1_proj_in", "up 2.1"),
        ("lora_unet_mid_block_attentions_0_proj_in", "mid"),
        ("lora_unet_conv_in", "in"),
        ("lora_unet_conv_out", "out"),
        ("lora_unet_time_embedding_linear_1", "time"),
        ("lora_unet_add_embedding_linear_2", "time"),
        ("lora_te_text_model_encoder_layers_3_mlp_fc1", "text 1"),
        ("lora_te1_text_model_encoder_layers_3_mlp_fc1", "text 1"),
        ("lora_te2_text_model_encoder_layers_31_self_attn_q_proj", "text 2"),
    ],
)
def test_every_module_lies_in_a_block(name: str, block: str) -> None:
    assert block_of(name) == block


@pytest.mark.parametrize("name", ["", "lora_unet_input_blocks_4_1_proj_in", "lora_unet_conv_inn", "down_blocks"])
def test_a_name_of_another_model_has_no_block(name: str) -> None:
    with pytest.raises(ValueError, match="no module"):
        block_of(name)


def test_blocks_come_in_the_order_of_the_unet() -> None:
    assert in_order([*reversed(BLOCKS), "mid"]) == list(BLOCKS)
    assert in_order(["mid", "in", "time"]) == ["time", "in", "mid"]


def test_a_heat_map_shows_the_signs_of_all_blocks(tmp_path: Path) -> None:
    whole = [[1.0, -1.0], [-1.0, 1.0]]
    heat_map(tmp_path / "a.png", "cosine", ["$a$", "_b"], whole)
    heat_map(tmp_path / "b.png", "cosine", ["$a$", "_b"], whole, {"mid": whole, "text 1": [[1, 0], [0, math.nan]]})
    with Image.open(tmp_path / "a.png") as alone, Image.open(tmp_path / "b.png") as with_blocks:
        assert alone.width == with_blocks.width == 900
        assert with_blocks.height > alone.height
    red, blue, grey = "#67001f", "#053061", "#c8c8c4"
    assert num_pixels(tmp_path / "b.png", red) > num_pixels(tmp_path / "a.png", red) > 1000
    assert num_pixels(tmp_path / "b.png", blue) > num_pixels(tmp_path / "a.png", blue) > 1000
    assert num_pixels(tmp_path / "b.png", grey) > 500


def test_wrong_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 rows"):
        heat_map(tmp_path / "a.png", "cosine", ["a", "b"], [[1.0]])
    assert list(tmp_path.iterdir()) == []


def test_each_panel_has_bars_of_its_colour(tmp_path: Path) -> None:
    panels = {"norm": {block: 2.0 for block in BLOCKS}, "effective rank": {"mid": 3.0}}
    bar_panels(tmp_path / "a.png", "ink", panels)

    first, second = (num_pixels(tmp_path / "a.png", color) for color in COLORS[:2])
    assert first > 5 * second > 0


def test_a_value_that_is_not_finite_has_no_bar_and_many_blocks_make_the_chart_wider(tmp_path: Path) -> None:
    bar_panels(tmp_path / "a.png", "ink", {"norm": {"mid": math.nan, "out": 1.0}})
    bar_panels(tmp_path / "b.png", "ink", {"norm": {"mid": 1.0, "out": 1.0}})
    bar_panels(tmp_path / "c.png", "ink", {"norm": {f"up {n}.0": 1.0 for n in range(40)}})
    one, two = (num_pixels(tmp_path / name, COLORS[0]) for name in ("a.png", "b.png"))

    assert two > 1.9 * one > 0
    assert [Image.open(tmp_path / name).width for name in ("a.png", "c.png")] == [900, 110 + 26 * 40]


def test_panels_without_a_block_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no block"):
        bar_panels(tmp_path / "a.png", "ink", {"norm": {}})
