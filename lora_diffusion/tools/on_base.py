"""What an adapter's module changes in one layer of a base model on disk, all kinds included."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.base import Layer
from lora_diffusion.adapters.geometry import Geometry
from lora_diffusion.adapters.kinds import adapter_from_tensors
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.formats.checkpoint_file import BaseWeights
from lora_diffusion.formats.families import FAMILY_NAMES
from lora_diffusion.formats.layout import AdapterFileError
from lora_diffusion.formats.names import usual_name
from lora_diffusion.tools.deltas import delta_of


@torch.no_grad()
def change_of(weight: Tensor, parts: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
    """ΔW at strength 1 for a layer with this weight, float32, in the weight's shape."""
    if geometry.dora_axis is None:
        return delta_of(parts, geometry).reshape(weight.shape)
    return adapter_from_tensors(_layer(weight), parts).delta()


def layers_in_base(file: AdapterFile, base: BaseWeights) -> dict[str, str]:
    """Module of the file → the base's layer.

    Raises AdapterFileError if a module has none or one of another size, or if the families differ.
    """
    if file.family and file.family != base.family:
        raise AdapterFileError(
            f"{file.path}: made for {FAMILY_NAMES[file.family]}; {base.path} is {FAMILY_NAMES[base.family]}. Give a "
            f"base of {FAMILY_NAMES[file.family]}."
        )
    places = {name: usual_name(name, base.family) for name in file.modules}
    if missing := [name for name, layer in places.items() if layer not in base.layers]:
        raise AdapterFileError(
            f"{file.path}: {base.path} has no layer for {len(missing)} of its {len(places)} modules, such as "
            f"{missing[0]}; their effect would be lost. Give the base that the adapter was made for."
        )
    for name, layer in places.items():
        geometry, shape = file.geometries[name], base.layers[layer].shape
        if (geometry.outputs, geometry.inputs) != (shape[0], math.prod(shape[1:])):
            raise AdapterFileError(
                f"{file.path}: {name} is made for a layer of {geometry.outputs} x {geometry.inputs}, in {base.path} it "
                f"is {shape[0]} x {math.prod(shape[1:])}. Give the base that the adapter was made for."
            )
    if len(set(places.values())) != len(places):
        raise AdapterFileError(f"{file.path}: a text encoder is in the file under two names. Keep one of them.")
    return places


def _layer(weight: Tensor) -> Layer:
    """A layer that has this weight; stride and padding play no part in ΔW."""
    with torch.device("meta"):
        layer = (
            nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            if weight.ndim == 2
            else nn.Conv2d(weight.shape[1], weight.shape[0], (weight.shape[2], weight.shape[3]), bias=False)
        )
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
