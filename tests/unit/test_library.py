"""Which adapter files are in memory, and when."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_diffusion.errors import UserError
from lora_diffusion.generation.engine import Engine, Request
from lora_diffusion.generation.library import AdapterLibrary
from lora_diffusion.models.base import DiffusionModel
from lora_diffusion.models.load import load_model
from tests.random_adapters import ODD_NOTES, random_adapter, write_odd

REQUEST = Request("a cat", seed=1, steps=1, cfg=1.0, size=(32, 32))
LARGE = 2**30


@pytest.fixture
def model(tiny_sd1: Path) -> DiffusionModel:
    return load_model(tiny_sd1)


@pytest.fixture
def folder(model: DiffusionModel, tmp_path: Path) -> Path:
    for seed, name in enumerate(("a", "b", "c")):
        random_adapter(model, seed=seed).write(tmp_path / f"{name}.safetensors", dtype=torch.float32)
    return tmp_path


def weights_of(model: DiffusionModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def picture(engine: Engine, name: str) -> np.ndarray:
    return np.asarray(engine.generate([replace(REQUEST, adapters={name: 1.0})])[0])


def test_files_are_loaded_when_needed_and_those_used_longest_ago_make_room(model: DiffusionModel, folder: Path) -> None:
    engine = Engine(model)
    AdapterLibrary(engine, [folder], budget_bytes=LARGE).need(["a"])
    size = engine.adapter_bytes["a"]
    engine.unload_adapter("a")
    library = AdapterLibrary(engine, [folder], budget_bytes=2 * size)
    assert engine.adapters == ()
    for name in ("a", "b", "a", "c"):
        library.need([name])
    assert set(engine.adapters) == {"a", "c"}, "b was used longest ago"


def test_what_one_batch_needs_is_held_even_if_it_is_too_much(model: DiffusionModel, folder: Path) -> None:
    engine = Engine(model)
    library = AdapterLibrary(engine, [folder], budget_bytes=1)
    library.need(["a", "b", "c"])
    assert set(engine.adapters) == {"a", "b", "c"}
    library.need(["b"])
    assert engine.adapters == ("b",)


def test_a_file_that_changed_is_read_again(model: DiffusionModel, folder: Path) -> None:
    engine = Engine(model)
    library = AdapterLibrary(engine, [folder], budget_bytes=LARGE)
    library.need(["a"])
    before = picture(engine, "a")
    library.need(["a"])
    assert np.array_equal(picture(engine, "a"), before)
    os.replace(folder / "b.safetensors", folder / "a.safetensors")
    library.need(["a"])
    assert not np.array_equal(picture(engine, "a"), before)


def test_after_hundreds_of_swaps_the_base_is_bit_for_bit_what_it_was(model: DiffusionModel, folder: Path) -> None:
    weights, modules = weights_of(model), [name for name, _ in model.named_modules()]
    base = np.asarray(Engine(model).generate([REQUEST])[0])
    engine = Engine(model)
    library = AdapterLibrary(engine, [folder], budget_bytes=1)
    for swap in range(200):
        library.need(["abc"[swap % 3]])
    assert np.array_equal(np.asarray(engine.generate([REQUEST])[0]), base)
    for name in engine.adapters:
        engine.unload_adapter(name)
    assert weights_of(model) == weights
    assert [name for name, _ in model.named_modules()] == modules


def test_alike_names_are_numbered_and_hidden_files_and_ways_out_are_left_out(
    model: DiffusionModel, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (folder / "a.safetensors").rename(outside / "secret.safetensors")
    (folder / "link.safetensors").symlink_to(outside / "secret.safetensors")
    for place in (folder / "sub", folder / ".hidden"):
        place.mkdir()
        (place / "b.safetensors").write_bytes((folder / "b.safetensors").read_bytes())
    library = AdapterLibrary(Engine(model), [folder], budget_bytes=LARGE)
    assert sorted(library.paths) == ["b", "b 2", "c"]


def test_a_name_that_no_file_has_is_refused_with_the_nearest(model: DiffusionModel, folder: Path) -> None:
    (folder / "watercolour.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    library = AdapterLibrary(Engine(model), [folder], budget_bytes=LARGE)
    with pytest.raises(UserError, match=r"no adapter 'watercolor'\. Did you mean 'watercolour'"):
        library.need(["watercolor"])
    (folder / "c.safetensors").unlink()
    with pytest.raises(UserError, match=r"c\.safetensors: cannot be read"):
        library.need(["c"])


def test_what_of_a_file_has_no_effect_is_logged_once_however_often_it_is_loaded(
    model: DiffusionModel, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_odd(random_adapter(model, seed=5), folder / "odd.safetensors")
    library = AdapterLibrary(Engine(model), [folder], budget_bytes=1)
    for name in ("a", "odd", "a", "odd"):
        library.need([name])

    assert library.notes(["odd"]) == [f"odd: {note}" for note in ODD_NOTES]
    assert [record.getMessage() for record in caplog.records] == [
        f"{library.paths['odd']}: {note}" for note in ODD_NOTES
    ]
