"""A UNet's transformer blocks compiled by torch's inductor for the passes that learn: many operations as few kernels.

Blocks of one kind and shape share what is compiled. The rest stays as it is: convolutions gain nothing (0.93 of the
speed of ResNet blocks on a CPU, torch 2.13), and pictures drawn meanwhile would need shapes of their own.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.models.errors import ModelError
from lora_diffusion.models.libraries import BasicTransformerBlock

logger = logging.getLogger(__name__)

MAX_KINDS = 64
"""Blocks that are compiled at most: SD 1.x has 5 to 8 for each size of picture and batch. Torch's own limit is 8."""


def check_compiler(device: torch.device) -> None:
    """Compile an addition. Raises ModelError where that fails: no C++ compiler (CPU), no Triton (GPU)."""
    _raise_limit()
    started = time.monotonic()
    compiled: Any = torch.compile(_add_one, dynamic=False, fullgraph=True)
    try:
        compiled(torch.ones(2, device=device))
    except Exception as error:  # of a dozen kinds, one for each thing that may be missing
        needed = "a C++ compiler (g++ or clang)" if device.type == "cpu" else "Triton and a C compiler (gcc or clang)"
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(
            f"model.compile = true: torch cannot compile for {device.type!r} here ({reason}). "
            f"Install {needed}, or set model.compile = false."
        ) from error
    logger.info("torch compiles for %s (tried in %.0f s)", device.type, time.monotonic() - started)


def compile_blocks(unet: nn.Module) -> int:
    """Compile the transformer blocks of `unet`, with the adapters that are in them by now; returns how many there are.

    Nothing happens yet: each kind of block is compiled when it is first computed with gradients, which takes from some
    seconds to minutes. Without gradients, as for previews and validation, blocks are computed as before.
    """
    _raise_limit()
    blocks = [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
    for block in blocks:
        block.forward = _CompiledForward(block)
    logger.info(
        "%d transformer blocks are compiled when they are first computed: the first steps of each size of picture "
        "take minutes", len(blocks),
    )  # fmt: skip
    return len(blocks)


class _CompiledForward:
    """A block's `forward`, compiled where gradients are wanted and it is possible."""

    def __init__(self, block: BasicTransformerBlock) -> None:
        self._plain = block.forward
        self._compiled: Any = torch.compile(self._plain, dynamic=False, fullgraph=True)
        self._is_possible = True

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if not (self._is_possible and torch.is_grad_enabled()):
            return self._plain(*args, **kwargs)
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        try:
            return self._compiled(*args, **kwargs)
        except (FailOnRecompileLimitHit, TorchDynamoException) as error:
            self._is_possible = False
            reason = str(error).strip().partition("\n")[0]
            logger.warning("a transformer block is computed without being compiled from now on: %s", reason)
            return self._plain(*args, **kwargs)


def _raise_limit() -> None:
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, MAX_KINDS)


def _add_one(x: Tensor) -> Tensor:
    return x + 1
