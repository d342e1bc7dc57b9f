"""The autoencoder of the sample base: 64 x 64 pixels to 4 x 16 x 16 latents."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from samples.captions import random_scene
from samples.drawing import Scene
from samples.styles import STYLES
from samples.training import (
    MixedPrecisionTrainer,
    learning_rate_factor,
    process_rank,
    training_steps,
    zero_initialize,
)

PICTURE_PX = 64
LATENT_SCALE = 0.18215  # the SD 1 value, which many tools assume; `standardize_latents` makes it true
BATCH_SIZE = 8  # per process
LEARNING_RATE = 1.5e-3
DECODER_LEARNING_RATE = 6e-4
FLAT_UNTIL = 0.35
KL_WEIGHT = 1e-4
STYLE_SHARES = {"flat": 0.56, "neon": 0.17, "ink": 0.17, "mosaic": 0.05, "halftone": 0.05}
POOL_SIZE = 16_000
DECODER_LATENT_NOISE = 0.06  # of a latent's unit variance: what a sampled latent deviates from an encoded one


def new_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=PICTURE_PX,
        scaling_factor=LATENT_SCALE,
    )
    zero_initialize(*[module.conv2 for module in vae.modules() if isinstance(module, ResnetBlock2D)])
    return vae


def random_batches(generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches (8, 3, 64, 64) of pictures in all styles, from a pool that is drawn when the first is needed."""
    seed = generator.initial_seed()
    names = random.Random(seed).choices(list(STYLE_SHARES), weights=list(STYLE_SHARES.values()), k=POOL_SIZE)
    pool = draw_pictures(random_scenes(POOL_SIZE, seed), names)
    while True:
        yield to_signed(pool[torch.randint(POOL_SIZE, (BATCH_SIZE,), generator=generator)])


def random_scenes(count: int, seed: int) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng) for _ in range(count)]


def draw_pictures(scenes: list[Scene], styles: list[str]) -> Tensor:
    """uint8 (N, 3, 64, 64)."""
    pictures = [STYLES[style](scene, PICTURE_PX) for scene, style in zip(scenes, styles, strict=True)]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()


def to_signed(pictures: Tensor) -> Tensor:
    """uint8 to bfloat16 in [-1, 1]."""
    return (pictures.float() / 127.5 - 1).to(torch.bfloat16)


def train_vae(vae: AutoencoderKL, budget_s: float, checkpoint: Path, seed: int) -> None:
    """Train all of the VAE and leave its moving average in it."""
    trainer = MixedPrecisionTrainer({"vae": vae}, LEARNING_RATE, checkpoint)
    generator = torch.Generator().manual_seed(seed + process_rank())
    for share, pictures in zip(training_steps(trainer, budget_s, "vae"), random_batches(generator), strict=False):
        posterior = vae.encode(pictures).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        decoded = vae.decode(latents.to(torch.bfloat16)).sample
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction_loss(decoded.float(), pictures.float()) + KL_WEIGHT * kl
        trainer.step(loss, learning_rate_factor(share, FLAT_UNTIL))
    trainer.finish()


def train_decoder(vae: AutoencoderKL, budget_s: float, checkpoint: Path, seed: int) -> None:
    """Sharpen the decoder only: the encoder, and with it the latents the UNet knows, stay as they are."""
    encoder = copy.deepcopy(vae).to(torch.bfloat16)
    trainer = MixedPrecisionTrainer({"decoder": vae.decoder}, DECODER_LEARNING_RATE, checkpoint)
    generator = torch.Generator().manual_seed(seed + process_rank())
    for share, pictures in zip(training_steps(trainer, budget_s, "decoder"), random_batches(generator), strict=False):
        with torch.no_grad():
            latents = encoder.encode(pictures).latent_dist.mean.float()
            latents += DECODER_LATENT_NOISE / LATENT_SCALE * torch.randn(latents.shape, generator=generator)
            hidden = vae.post_quant_conv(latents)
        decoded = vae.decoder(hidden.to(torch.bfloat16))
        trainer.step(reconstruction_loss(decoded.float(), pictures.float()), learning_rate_factor(share, FLAT_UNTIL))
    trainer.finish()


def reconstruction_loss(decoded: Tensor, pictures: Tensor) -> Tensor:
    """L1 and MSE of the pixels, and L1 of their differences, which stands in for a perceptual loss on edges."""
    error = decoded - pictures
    gradients = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 0.5 * error.square().mean() + 0.5 * gradients


@torch.no_grad()
def standardize_latents(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Fold mean and scale into the 1x1 convolutions around the latents, so that `LATENT_SCALE` gives unit variance."""
    means = torch.cat([vae.encode(to_signed(batch).float()).latent_dist.mean for batch in pictures.split(64)])
    mean, scale = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3)) * LATENT_SCALE
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] /= scale[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) / scale
    quant.bias[4:] -= 2 * scale.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= scale[None, :, None, None]


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, style: str, count: int, seed: int) -> float:
    """Mean over pictures, in dB."""
    pictures = draw_pictures(random_scenes(count, seed), [style] * count)
    inputs = [to_signed(batch).float() for batch in pictures.split(32)]
    decoded = torch.cat([vae.decode(vae.encode(batch).latent_dist.mean).sample for batch in inputs])
    error = (decoded.clamp(-1, 1) + 1) / 2 - pictures.float() / 255
    return float((-10 * error.square().mean(dim=(1, 2, 3)).log10()).mean())
