"""Tensors of a file, one read while the one before is used."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_diffusion.ldm_names import Place
from lora_diffusion.models.errors import ModelError
from lora_diffusion.models.weights import TensorFile

SIZES = (5, 100_000, 3, 70_000, 100_000, 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tensors = {f"t{number}": torch.full((size,), float(number)) for number, size in enumerate(SIZES)}
    save_file(tensors, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_each_stays_as_it_is_until_the_next_is_asked_for(path: Path) -> None:
    with TensorFile(path) as file:
        found = file.read_in_turn(Place(f"t{number}") for number in range(len(SIZES)))
        for number, (size, tensor) in enumerate(zip(SIZES, found, strict=True)):
            time.sleep(0.02)  # in which the next one is read
            assert tensor.tolist() == [number] * size


def test_nothing_asked_for_is_nothing_read(path: Path) -> None:
    with TensorFile(path) as file:
        assert not list(file.read_in_turn([]))


def test_an_error_of_the_reading_thread_reaches_the_caller(path: Path) -> None:
    with TensorFile(path) as file:
        with path.open("r+b") as stream:
            stream.truncate(path.stat().st_size - 1)
        found = file.read_in_turn(Place(f"t{number}") for number in range(len(SIZES)))
        with pytest.raises(ModelError, match=f"ends within t{len(SIZES) - 1}"):
            list(found)
