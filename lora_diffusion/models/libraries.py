"""What we use of diffusers and transformers: import it from here, which takes two thirds of the time.

Both import whatever is installed and might be of use: scipy, bitsandbytes, torch's compiler, every architecture. Here
that waits until someone uses it; then everything is there, and is the same.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lora_diffusion.models.heap import uncollected
from lora_diffusion.models.stand_ins import call_later, put_off, true_module

_LOG = logging.getLogger(__name__)


def _mark_as_constant(function: Any) -> Any:
    """What `torch._dynamo.assume_constant_result` does."""
    function._dynamo_marked_constant = True
    return function


def _disable_later(function: Callable[..., Any] | None = None, *arguments: Any, **options: Any) -> Any:
    """`torch._dynamo.disable`, which imports the compiler when the function is called."""
    if function is None:
        return lambda function: _disable_later(function, *arguments, **options)
    disabled = functools.cache(lambda: true_module("torch._dynamo").disable(function, *arguments, **options))
    return functools.wraps(function)(lambda *inputs, **named: disabled()(*inputs, **named))


_COMPILER = {
    "allow_in_graph": lambda function: function,  # without the mark the UNet is compiled to the same one graph
    "assume_constant_result": _mark_as_constant,
    "disable": _disable_later,
}
_PUT_OFF = {
    "torch._dynamo": _COMPILER,
    "bitsandbytes": {},
    "scipy.stats": {},
    "scipy.integrate": {},
    "scipy.optimize": {"linear_sum_assignment": call_later("scipy.optimize", "linear_sum_assignment")},
}
"""Module → what those who import it take from it by name."""
_LAZY_PACKAGES = ("diffusers.models.unets", "diffusers.models.transformers", "diffusers.models.autoencoders")


def without_extras() -> AbstractContextManager[None]:
    """While this lasts, what diffusers imports comes without scipy and the like, too."""
    return put_off(_PUT_OFF, ())


def without_compiler() -> AbstractContextManager[None]:
    """While this lasts, torch's optimisers do not import its compiler to ask it not to compile them.

    That takes 0.7 s and 25 MB. Whatever else is asked of it imports it.
    """
    return put_off({"torch._dynamo": {"disable": lambda function, *_, **__: function, "graph_break": lambda: None}}, ())


try:
    with uncollected(), put_off(_PUT_OFF, _LAZY_PACKAGES, submodules_alone=True):
        importlib.import_module("diffusers.models.autoencoders.autoencoder_kl")
        importlib.import_module("diffusers.models.unets.unet_2d_condition")
        importlib.import_module("transformers.models.clip.modeling_clip")
except Exception as error:  # libraries change; below they are imported as they are
    _LOG.info("diffusers is imported with all it has, which takes some seconds longer: %s", error)

from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

__all__ = [
    "GEGLU",
    "Attention",
    "AttnProcessor",
    "AttnProcessor2_0",
    "AutoencoderKL",
    "BasicTransformerBlock",
    "CLIPTextConfig",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPTokenizer",
    "DiagonalGaussianDistribution",
    "ResnetBlock2D",
    "Transformer2DModel",
    "UNet2DConditionModel",
    "without_extras",
]
