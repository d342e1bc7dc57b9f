"""Parts of a model that leave memory and come back, and a UNet that comes late."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from lora_diffusion.models.base import DiffusionModel, ModelError
from lora_diffusion.models.load import load_model
from tests.single_file import make_single_file
from tests.tiny import make_tiny_sd1, make_tiny_sdxl
from tests.training_runs import draw_pictures, prepare, write_config

T = TypeVar("T")
PARTS = ("unet", "vae", "text_encoder")


def loaded(folder: Path, family: str) -> DiffusionModel:
    return load_model((make_tiny_sdxl if family == "sdxl" else make_tiny_sd1)(folder / "base"))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_released_parts_leave_memory_and_come_back_as_they_were(family: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, family)
    parts = {"vae", "text_encoder"} | ({"text_encoder_2"} if family == "sdxl" else set())
    assert model.reloads.keys() == parts
    pixels = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        text, image = model.encode_text(["a cat"]), model.encode_image(pixels)
    ids = {name: id(parameter) for name, parameter in model.named_parameters()}
    vae_id, text_encoder_id = model.vae_id, model.text_encoder_id

    model.release(parts)
    gc.collect()
    for part in parts:
        assert sum(parameter.nbytes for parameter in model.get_submodule(part).parameters()) == 0
    assert sum(parameter.nbytes for parameter in model.unet.parameters()) > 0
    assert (model.latent_factor, model.default_size) == (4, (64, 64)), "settings can be read without the weights"

    with torch.no_grad():
        again = model.encode_text(["a cat"])
        assert torch.equal(again.hidden, text.hidden)
        assert sum(parameter.nbytes for parameter in model.vae.parameters()) == 0, "only what is needed comes back"
        assert all(map(torch.equal, model.encode_image(pixels), image))
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == ids
    for name in ("vae_id", "text_encoder_id"):
        del model.__dict__[name]
    assert (model.vae_id, model.text_encoder_id) == (vae_id, text_encoder_id)


def test_pictures_can_be_decoded_and_ids_computed_while_a_part_is_released(tmp_path: Path) -> None:
    model = loaded(tmp_path, "sd1")
    latents = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    expected, expected_id = model.decode_latents(latents), model.vae_id
    del model.__dict__["vae_id"]
    model.release(["vae"])
    model.release(["vae"])  # twice is once
    assert model.vae_id == expected_id
    model.release(["vae"])
    assert torch.equal(model.decode_latents(latents), expected)


def test_threads_that_need_a_part_at_once_have_it_once(tmp_path: Path) -> None:
    """As the one that makes batches, whose cached latents are damaged, and the one that draws."""
    model = loaded(tmp_path, "sd1")
    model.release(["vae"])
    reload, calls = model.reloads["vae"], 0

    def slowly() -> torch.nn.Module:
        nonlocal calls
        calls += 1
        time.sleep(0.2)
        return reload()

    model.reloads = {**model.reloads, "vae": slowly}
    with ThreadPoolExecutor(2) as pool:
        for need in [pool.submit(model.need, "vae") for _ in range(2)]:
            need.result()
    assert calls == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_single", [False, True])
def test_a_unet_that_waits_takes_no_memory_until_it_is_placed(
    is_single: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = make_tiny_sd1(tmp_path / "base")
    path = make_single_file(folder, tmp_path / "all.safetensors") if is_single else folder
    model = load_model(path, configs=folder if is_single else None, dtype=dtype, unet_waits=True)
    assert all(parameter.is_meta for parameter in model.unet.parameters())
    model.place_unet()
    whole = load_model(folder, dtype=dtype)
    expected = whole.unet.state_dict()
    assert {name: tensor.dtype for name, tensor in model.unet.state_dict().items()} == dict.fromkeys(expected, dtype)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.unet.state_dict().items())
    assert [type(module) for module in model.unet.modules()] == [type(module) for module in whole.unet.modules()]
    assert not any(parameter.requires_grad for parameter in model.unet.parameters())


def test_a_file_that_changes_while_the_unet_waits_is_not_read(tmp_path: Path) -> None:
    """Its tensors may lie elsewhere now."""
    folder = make_tiny_sd1(tmp_path / "base")
    model = load_model(folder, unet_waits=True)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(data)
    with pytest.raises(ModelError, match=f"{weights.name}: was changed or moved while it was in use"):
        model.place_unet()
    weights.unlink()
    with pytest.raises(ModelError, match="was changed or moved"):
        model.place_unet()


def test_pictures_and_captions_are_encoded_before_the_unet_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_sd1(tmp_path / "base")
    config = write_config(tmp_path / "config.toml", folder, draw_pictures(tmp_path / "pictures"))
    waited: dict[str, set[bool]] = {"encode_image": set(), "encode_text": set()}
    model_class = type(load_model(folder))
    for name, seen in waited.items():
        encode = getattr(model_class, name)

        def encode_and_look(model: DiffusionModel, *args: object, encode=encode, seen=seen, **kwargs: object) -> object:
            seen.update(parameter.is_meta for parameter in model.unet.parameters())
            return encode(model, *args, **kwargs)

        monkeypatch.setattr(model_class, name, encode_and_look)
    trainer = prepare(config)
    assert waited == {"encode_image": {True}, "encode_text": {True}}
    assert not any(parameter.is_meta for parameter in trainer.loss.model.unet.parameters())


@pytest.mark.parametrize("is_single", [False, True])
def test_reading_large_parts_is_shown(is_single: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_sd1(tmp_path / "base")
    path = make_single_file(folder, tmp_path / "all.safetensors") if is_single else folder
    whole = load_model(folder)
    sizes = [sum(weight.nbytes for weight in whole.get_submodule(part).parameters()) for part in PARTS]
    assert sizes[0] == max(sizes)
    monkeypatch.setattr("lora_diffusion.models.weights._LARGE_BYTES", sizes[0] - 1)
    shown: list[tuple[str, int]] = []

    def track(items: Sequence[T], description: str) -> Iterable[T]:
        shown.append((description, len(items)))
        return items

    model = load_model(path, configs=folder if is_single else None, unet_waits=True, track=track)
    assert shown == []
    model.place_unet()
    name = path.name if is_single else "diffusion_pytorch_model.safetensors"
    assert shown == [(f"Reading {name}", len(model.unet.state_dict()))]
