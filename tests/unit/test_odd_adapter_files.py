"""Files of other programs that are odd and mean something all the same: they are read, and what is not read is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.utils.state_dict_utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file

from lora_diffusion.formats.adapter_file import AdapterFile, AdapterFileError
from lora_diffusion.tools.deltas import delta_of
from tests.adapter_parts import K, Parts, Q, lokr, lora, read, saved

MOTION = "unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q"
MOTION_NAME = "lora_unet_down_blocks_0_motion_modules_0_transformer_blocks_0_attn1_to_q"


def save_one(parts: Parts, path: Path) -> None:
    """As one module, each tensor in its own dtype."""
    save_file({f"{Q}.{part}": tensor for part, tensor in parts.items()}, path)


def with_raw_tensor(path: Path, key: str, dtype: str, shape: list[int], data: bytes) -> Path:
    """Adds a tensor that torch may have no dtype for."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header, tensors = json.loads(content[8:start]), content[start:]
    offsets = [len(tensors), len(tensors) + len(data)]
    text = json.dumps(header | {key: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + tensors + data)
    return path


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint32])
def test_an_alpha_may_be_an_integer(tmp_path: Path, dtype: torch.dtype) -> None:
    save_one(lora(rank=4) | {"alpha": torch.tensor(2, dtype=dtype)}, tmp_path / "x.safetensors")
    file = AdapterFile.read(tmp_path / "x.safetensors")
    assert file.modules[Q]["alpha"].dtype == torch.float32
    assert file.modules[Q]["alpha"].item() == 2.0


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_an_alpha_that_is_no_number_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    save_one(lora() | {"alpha": torch.ones((), dtype=dtype)}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterFileError, match=r"alpha is (BOOL|C64)"):
        AdapterFile.read(tmp_path / "x.safetensors")


def test_the_kohya_file_that_diffusers_makes_of_a_peft_file_is_the_same_adapter(tmp_path: Path) -> None:
    file = AdapterFile({Q: lora(rank=4, alpha=4.0), K: lora(inputs=768, rank=2, alpha=2.0, seed=3)})
    file.write(tmp_path / "peft.safetensors", format="peft", dtype=torch.float32)
    converted = convert_state_dict_to_kohya(convert_all_state_dict_to_peft(load_file(tmp_path / "peft.safetensors")))
    assert {tensor.dtype for key, tensor in converted.items() if key.endswith(".alpha")} == {torch.int64}
    save_file({key: tensor.contiguous() for key, tensor in converted.items()}, tmp_path / "kohya.safetensors")
    found = AdapterFile.read(tmp_path / "kohya.safetensors")
    assert found.modules.keys() == file.modules.keys() == {Q, K}
    for name, geometry in file.geometries.items():
        assert torch.equal(delta_of(found.modules[name], geometry), delta_of(file.modules[name], geometry))


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("F4", [8], 4), ("F8_E8M0", [2], 2), ("F8_E4M3", [2], 2), ("C64", [1], 8), ("U64", [1], 8), ("BOOL", [1], 1)],
)
def test_a_tensor_of_any_dtype_that_is_not_read_does_not_hinder(
    tmp_path: Path, dtype: str, shape: list[int], size: int
) -> None:
    path = with_raw_tensor(saved(tmp_path / "x.safetensors", {Q: lora()}), "step", dtype, shape, bytes(size))
    file = AdapterFile.read(path)
    assert file.unread == ("step",)
    assert torch.equal(file.modules[Q]["lora_down.weight"], lora()["lora_down.weight"])


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("cat", "cat"),
        ("my__cat", "my__cat"),
        ("\N{CJK UNIFIED IDEOGRAPH-732B}", r"\u732b"),
        ("cat's", "cat's"),
        ("cat(v2)", "cat(v2)"),
        ("cat..2", "cat..2"),
        ("\x1b[31m\n\N{RIGHT-TO-LEFT OVERRIDE}", r"\x1b[31m\n\u202e"),
        ("x" * 5000, "x" * 289),
    ],
)
def test_a_bundled_embedding_of_any_name_is_listed_as_not_read(tmp_path: Path, name: str, shown: str) -> None:
    key = f"bundle_emb.{name}.string_to_param.*"
    file = AdapterFile.read(saved(tmp_path / "x.safetensors", {Q: lora()}, extra={key: torch.ones(1, 768)}))
    assert file.unread == (f"bundle_emb.{shown}.string_to_param.*"[:300],)
    assert file.modules.keys() == {Q}
    assert file.notes[0].startswith("1 tensors were not read: bundle_emb.")


def test_names_in_a_file_that_is_no_adapter_are_shown_escaped(tmp_path: Path) -> None:
    save_file({"\x1b[31m\n": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterFileError, match=r"the first: \\x1b\[31m\\n\)"):
        AdapterFile.read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("alpha", [torch.inf, torch.nan])
def test_the_alpha_of_a_lokr_of_whole_factors_need_not_be_finite(tmp_path: Path, alpha: float) -> None:
    parts = lokr("whole") | {"alpha": torch.tensor(alpha)}  # LyCORIS' "full" is rank 100000, beyond half precision
    file = read(tmp_path / "x.safetensors", {Q: parts})
    file.write(tmp_path / "again.safetensors", dtype=torch.float32)
    again = AdapterFile.read(tmp_path / "again.safetensors")
    assert bool(again.modules[Q]["alpha"].isfinite())
    expected = torch.kron(parts["lokr_w1"], parts["lokr_w2"])
    torch.testing.assert_close(delta_of(again.modules[Q], again.geometries[Q]), expected)


def test_the_alpha_of_a_lokr_with_factors_must_be_finite(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="alpha holds NaN or infinity"):
        read(tmp_path / "x.safetensors", {Q: lokr("factored") | {"alpha": torch.tensor(torch.inf)}})


def test_modules_of_no_stable_diffusion_model_get_their_alpha_from_the_metadata_too(tmp_path: Path) -> None:
    """The motion modules of AnimateDiff: they are read, and left out where a base has none."""
    tensors = {f"{MOTION}.lora_A.weight": torch.zeros(4, 320), f"{MOTION}.lora_B.weight": torch.ones(320, 4)}
    settings = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"transformer_blocks.0.attn1.to_q": 2}}
    for patterns, alpha in ((True, 2.0), (False, 8.0)):
        told = {f"unet.{key}": value for key, value in settings.items() if patterns or key != "alpha_pattern"}
        save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(told)})
        file = AdapterFile.read(tmp_path / "x.safetensors")
        assert file.modules.keys() == {MOTION_NAME}
        assert file.modules[MOTION_NAME]["alpha"].item() == alpha
