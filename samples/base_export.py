"""Write the trained parts as a Stable Diffusion folder that diffusers and older tools read without our code."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from samples.base_unet import Denoiser, new_scheduler

IMAGE_DTYPE = torch.float16  # three bits more than bfloat16, and none of the weights comes near its limits
TEXT_DTYPE = torch.float32  # transformers 5 loads the stored precision, diffusers float32: half would not fit the UNet
TEXT_PREFIX = "text_model."


def export_base(vae: AutoencoderKL, models: Denoiser, folder: Path) -> None:
    """Write the pipeline; the modules are left in the precisions in which they were written."""
    pipeline = StableDiffusionPipeline(
        vae=vae.to(IMAGE_DTYPE),
        text_encoder=models.text_encoder.to(TEXT_DTYPE),
        tokenizer=models.tokenizer,
        unet=models.unet.to(IMAGE_DTYPE),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    _restore_text_prefix(folder / "text_encoder" / "model.safetensors")
    _write_classic_vocabulary(folder / "tokenizer")


def _restore_text_prefix(path: Path) -> None:
    """Name the tensors as SD 1.5 does. transformers 5 drops the level `text_model`; transformers 4 and tools that pin
    it would then silently run a randomly initialised encoder.
    """
    tensors = load_file(path)
    named = {name if name.startswith(TEXT_PREFIX) else TEXT_PREFIX + name: tensor for name, tensor in tensors.items()}
    save_file(named, path, {"format": "pt"})


def _write_classic_vocabulary(folder: Path) -> None:
    """vocab.json and merges.txt, which transformers 4 and single-file tools read, from tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
