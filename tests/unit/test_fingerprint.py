"""A base is recognised by its weights, not by where they lie."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lora_diffusion.models.fingerprint import fingerprint

PARTS = ("unet", "vae", "text_encoder")


def test_a_copy_has_the_same_and_a_changed_part_another_one(tiny_sd1: Path, tmp_path: Path) -> None:
    before = fingerprint(tiny_sd1, PARTS)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_sd1, copy)
    assert fingerprint(copy, PARTS) == before

    path = copy / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.001 for name, tensor in load_file(path).items()}, path)
    after = fingerprint(copy, PARTS)
    assert {part for part in PARTS if after[part] != before[part]} == {"unet"}


def test_the_last_values_of_a_large_file_count_and_so_do_names(tmp_path: Path) -> None:
    zeros = torch.zeros(2**22)
    path = tmp_path / "base.safetensors"
    found: set[str] = set()
    for name, change in (("a", None), ("b", None), ("a", slice(0, 1)), ("a", slice(2**21, None))):
        weights = zeros.clone()
        if change is not None:
            weights[change] = 1.0
        save_file({name: weights}, path)
        found.add(fingerprint(path, PARTS)["checkpoint"])
    assert len(found) == 4
