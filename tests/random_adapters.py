"""Adapters with random weights, for tests of everything that uses adapter files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lora_diffusion.adapters.base import Adapter
from lora_diffusion.adapters.inject import select_layers
from lora_diffusion.adapters.lora import LoRA
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.models.base import DiffusionModel


def random_adapter(
    model: DiffusionModel,
    *,
    seed: int,
    parts: Sequence[str] = ("unet",),
    targets: str = "attention",
    size: float = 0.5,
    rank: int = 4,
) -> AdapterFile:
    """An adapter for `model`, which is left as it is; both factors are random, so that it changes pictures.

    size: of a layer's change, relative to weights of unit gain.
    """
    generator = torch.Generator().manual_seed(seed)
    adapters: dict[str, dict[str, Adapter]] = {}
    for part in parts:
        adapters[part] = {}
        for path, layer in select_layers(model.parts[part].module, targets).items():
            adapter = LoRA(layer, rank, alpha=rank)
            fan_in = layer.weight[0].numel()
            with torch.no_grad():
                for weight, std in ((adapter.lora_down.weight, fan_in**-0.5), (adapter.lora_up.weight, rank**-0.5)):
                    weight.copy_(torch.randn(weight.shape, generator=generator) * std * size**0.5)
            adapters[part][path] = adapter
    return AdapterFile.collect(model.parts, adapters)


def written(file: AdapterFile, path: Path) -> AdapterFile:
    """The same adapter as it comes back from disk, in float32."""
    file.write(path, dtype=torch.float32)
    return AdapterFile.read(path)


ODD_NOTES = (
    "1 tensors were not read: bundle_emb.cat",
    "1 of 81 modules do not exist in this model and are left out (the first: lora_unet_mid_block_attentions_9_proj_in)",
)


def write_odd(file: AdapterFile, path: Path) -> None:
    """With a tensor that nobody reads and a module that no base has, of which `ODD_NOTES` tell."""
    file.write(path, dtype=torch.float32)
    tensors = load_file(path)
    module = next(iter(tensors)).partition(".")[0]
    other = "lora_unet_mid_block_attentions_9_proj_in"
    more = {
        key.replace(module, other): tensor.clone() for key, tensor in tensors.items() if key.startswith(f"{module}.")
    }
    save_file(tensors | more | {"bundle_emb.cat": torch.ones(2)}, path)
