"""Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174) of a UNet: blocks are computed twice and keep nothing."""

from __future__ import annotations

from functools import partial

import torch.utils.checkpoint

from lora_diffusion.models.libraries import UNet2DConditionModel


def checkpoint_blocks(unet: UNet2DConditionModel, *, only_outer: bool = False) -> None:
    """Let the UNet's blocks keep only their inputs for the backward pass.

    only_outer: just the first and the last block, which work on the largest pictures and keep the most.
    """
    # Nothing in a block draws at random (dropout is a function of its seed), and saving the state of a generator
    # would keep a step from being captured as a CUDA graph.
    function = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=False)
    unet.enable_gradient_checkpointing(function)
    if only_outer:
        for block in (*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]):
            for module in block.modules() if block is not None else ():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = False  # pyright: ignore[reportArgumentType]  # a plain attribute
