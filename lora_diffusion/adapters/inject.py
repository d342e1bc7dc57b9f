"""Adapters into a model and out again."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.base import Adapter, changed_weight
from lora_diffusion.adapters.frozen import Layer, Quantised
from lora_diffusion.adapters.joint import JointAdapters, JointLayout
from lora_diffusion.adapters.stack import AdapterStack
from lora_diffusion.errors import UserError

Wrapper = TypeVar("Wrapper", Adapter, AdapterStack, JointAdapters)

_ATTENTION = (
    r"\.attn[12]\.to_(q|k|v|out\.0)$",  # UNet
    r"\.self_attn\.(q|k|v|out)_proj$",  # CLIP text encoder
)
_MLP = (
    r"\.attentions\.\d+\.(.*\.ff\.net\.(0\.proj|2)|proj_in|proj_out)$",
    r"\.mlp\.fc[12]$",
)
_CONVOLUTIONS = (
    r"\.resnets\.\d+\.(conv1|conv2|time_emb_proj|conv_shortcut)$",
    r"\.(down|up)samplers\.\d+\.conv$",
)
TARGETS: dict[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "attention-mlp": _ATTENTION + _MLP,
    "full": _ATTENTION + _MLP + _CONVOLUTIONS,
}
"""Regular expressions over dotted module paths of a UNet or a text encoder."""


def select_layers(root: nn.Module, targets: str | Sequence[str]) -> dict[str, Layer]:
    """Dotted path → layer, for the Linear and Conv2d layers below `root` that `targets` names, in the model's order.

    targets: a name in `TARGETS`, or regular expressions of which one must be found anywhere in the path.
    Layers that are wrapped already, and the layers of adapters, are not offered.
    Raises UserError for an unknown name, an invalid expression, an expression that finds no layer, or if nothing is
    found at all.
    """
    layers = _free_layers(root)
    patterns = _patterns(targets)
    selected = {path: layer for path, layer in layers.items() if any(p.search(path) for p in patterns)}
    # The expressions of a name cover UNets and text encoders, so one model never has them all.
    for pattern in patterns if not isinstance(targets, str) else ():
        if not any(pattern.search(path) for path in selected):
            raise UserError(
                f"targets: {pattern.pattern!r} is found in no path of the {len(layers)} linear and convolution layers "
                f"of {type(root).__name__}. A path looks like {_example(layers)!r}."
            )
    if not selected:
        raise UserError(f"targets: {targets!r} selects no layer of {type(root).__name__}.")
    return selected


def inject(root: nn.Module, layers: Mapping[str, Layer], make: Callable[[str, Layer], Wrapper]) -> dict[str, Wrapper]:
    """Put `make(path, layer)` in the place of every layer; returns what was made, by path.

    Everything is made before anything is replaced: if `make` raises, `root` is as it was.
    """
    wrappers = {path: make(path, layer) for path, layer in layers.items()}
    for path, layer in layers.items():
        if root.get_submodule(path) is not layer:
            raise ValueError(f"{path} is another layer now; select the layers again")
    for path, wrapper in wrappers.items():
        wrapper.train(root.get_submodule(path).training)
        root.set_submodule(path, wrapper)
    return wrappers


def eject(root: nn.Module, adapters: Mapping[str, Adapter] | Mapping[str, AdapterStack]) -> None:
    """Put every base layer back in its place. `root` is bit for bit as it was; the layers stay frozen."""
    for path, adapter in adapters.items():
        if root.get_submodule(path) is not adapter:
            raise ValueError(f"{path} does not hold this adapter; it was ejected already or wrapped again")
    for path, adapter in adapters.items():
        root.set_submodule(path, adapter.base)


def join(root: nn.Module, trainings: Sequence[Mapping[str, Adapter]], layout: JointLayout) -> dict[str, JointAdapters]:
    """Put the adapters of several trainings, by path and ejected, around their layers together."""
    layers = {path: adapter.base for adapters in trainings for path, adapter in adapters.items()}

    def make(path: str, layer: Layer) -> JointAdapters:
        own = {number: adapters[path] for number, adapters in enumerate(trainings) if path in adapters}
        return JointAdapters(layer, layout, own)

    return inject(root, layers, make)


@torch.no_grad()
def merge(root: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Write W + strength · delta into the layers, then eject.

    Added in float32 and rounded once to the dtype of the base. A quantised layer gives way to a plain one: packed, the
    sum would be rounded again. There is no way back: keep a copy of the base if needed.
    """
    eject(root, adapters)
    for path, adapter in adapters.items():
        if isinstance(adapter.base, Quantised):
            adapter.base = _plain_layer(adapter.base, adapter.base.dequantised_weight())
            root.set_submodule(path, adapter.base)
        adapter.base.weight.copy_(changed_weight(adapter))


def _plain_layer(layer: Layer, weight: Tensor) -> Layer:
    """A frozen Linear or Conv2d with `weight`, and the rest as in `layer`."""
    if isinstance(layer, nn.Linear):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    else:
        plain = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # pyright: ignore[reportArgumentType]  # declared wider than it is
            layer.stride,  # pyright: ignore[reportArgumentType]
            layer.padding,  # pyright: ignore[reportArgumentType]
            layer.dilation,  # pyright: ignore[reportArgumentType]
            layer.groups,
            bias=False,
            padding_mode=layer.padding_mode,
            device="meta",
        )
    plain.weight = nn.Parameter(weight, requires_grad=False)
    bias = layer.bias
    plain.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    return plain.train(layer.training)


def _patterns(targets: str | Sequence[str]) -> list[re.Pattern[str]]:
    if isinstance(targets, str):
        if targets not in TARGETS:
            raise UserError(f"targets: {targets!r} is not one of {', '.join(TARGETS)}, nor a list of expressions.")
        return [re.compile(expression) for expression in TARGETS[targets]]
    patterns: list[re.Pattern[str]] = []
    for expression in targets:
        try:
            patterns.append(re.compile(expression))
        except re.error as error:
            raise UserError(f"targets: {expression!r} is not a regular expression: {error}.") from error
    return patterns


def _free_layers(root: nn.Module, prefix: str = "") -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    for name, module in root.named_children():
        path = f"{prefix}{name}"
        if isinstance(module, nn.Linear | nn.Conv2d):
            layers[path] = module
        elif not isinstance(module, Adapter | AdapterStack | JointAdapters):
            layers |= _free_layers(module, f"{path}.")
    return layers


def _example(layers: Mapping[str, Layer]) -> str:
    return max(layers, key=len, default="")
