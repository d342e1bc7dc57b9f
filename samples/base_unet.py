"""The UNet of the sample base: Stable Diffusion 1.5's block topology, so that adapters' key names are the same."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from samples.base_text import TEXT_WIDTH, Readers, lesson_batch, token_ids
from samples.base_vae import LATENT_SCALE, draw_pictures, to_signed
from samples.captions import random_caption, random_scene
from samples.training import (
    MixedPrecisionTrainer,
    learning_rate_factor,
    num_processes,
    process_rank,
    training_steps,
    zero_initialize,
)

BATCH_SIZE = 12  # per process
LEARNING_RATE = 1e-3
FLAT_UNTIL = 0.45
NUM_PICTURES = 16_000
CAPTIONS_PER_PICTURE = 6
CAPTION_DROPOUT = 0.1
OFFSET_NOISE = 0.15
"""SD's noise schedule never quite destroys a picture's mean; without this, the start noise picks the background."""
SNR_LIMIT = 5.0  # min-SNR weighting, Hang et al. 2023 (arXiv:2303.09556)
READING_EVERY = 4  # steps; keeps the style words, which no picture shows, readable while the encoder trains on


def new_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(64, 96, 96, 96),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # the number of heads, in spite of its name
        norm_num_groups=16,
    )
    zero_initialize(
        unet.conv_out,
        *[module.conv2 for module in unet.modules() if isinstance(module, ResnetBlock2D)],
        *[module.proj_out for module in unet.modules() if isinstance(module, Transformer2DModel)],
    )
    return unet


def new_scheduler() -> DDIMScheduler:
    """SD 1.5's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip


@dataclass(frozen=True)
class Latents:
    """Encoded pictures (N, 4, 16, 16) of unit variance; captions as token ids (N, 77), or (N, several, 77)."""

    pictures: Tensor
    captions: Tensor


def latent_batches(vae: AutoencoderKL, tokenizer: CLIPTokenizer, generator: torch.Generator) -> Iterator[Latents]:
    """Endless batches, each picture with one of its captions or none; all are encoded when the first is needed."""
    data = encode_pictures(vae, tokenizer, generator.initial_seed())
    no_caption = token_ids(tokenizer, [""])
    while True:
        chosen = torch.randint(len(data.pictures), (BATCH_SIZE,), generator=generator)
        caption = torch.randint(CAPTIONS_PER_PICTURE, (BATCH_SIZE,), generator=generator)
        dropped = torch.rand((BATCH_SIZE, 1), generator=generator) < CAPTION_DROPOUT
        yield Latents(data.pictures[chosen], torch.where(dropped, no_caption, data.captions[chosen, caption]))


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, tokenizer: CLIPTokenizer, seed: int) -> Latents:
    """Draw and encode this process's share of the flat pictures, each with all of its captions."""
    rng = random.Random(seed)
    encoder = copy.deepcopy(vae).to(torch.bfloat16)
    latents, captions = [], []
    for _ in range(0, NUM_PICTURES // num_processes(), 100):
        scenes = [random_scene(rng) for _ in range(100)]
        pictures = to_signed(draw_pictures(scenes, ["flat"] * len(scenes)))
        latents.append(encoder.encode(pictures).latent_dist.mean.float() * LATENT_SCALE)
        texts = [random_caption(scene, rng) for scene in scenes for _ in range(CAPTIONS_PER_PICTURE)]
        captions.append(token_ids(tokenizer, texts).view(len(scenes), CAPTIONS_PER_PICTURE, -1))
    return Latents(torch.cat(latents), torch.cat(captions))


@dataclass(frozen=True)
class Denoiser:
    """What learns together while the VAE stays fixed."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    readers: Readers
    tokenizer: CLIPTokenizer

    def trainer(self, checkpoint: Path) -> MixedPrecisionTrainer:
        modules = {"unet": self.unet, "text_encoder": self.text_encoder, "readers": self.readers}
        return MixedPrecisionTrainer(modules, LEARNING_RATE, checkpoint)


def train_unet(models: Denoiser, vae: AutoencoderKL, budget_s: float, checkpoint: Path, seed: int) -> None:
    """Train UNet and text encoder to predict noise, and leave their moving averages in them."""
    trainer = models.trainer(checkpoint)
    models.unet.set_attn_processor(AttnProcessor())  # measured faster than torch's fused attention on a CPU
    generator = torch.Generator().manual_seed(seed + process_rank())
    rng = random.Random(seed + process_rank())
    alpha_bar = new_scheduler().alphas_cumprod
    batches = latent_batches(vae, models.tokenizer, generator)
    for share, batch in zip(training_steps(trainer, budget_s, "unet"), batches, strict=False):
        noise = torch.randn(batch.pictures.shape, generator=generator)
        noise += OFFSET_NOISE * torch.randn((BATCH_SIZE, 4, 1, 1), generator=generator)
        timesteps = _spread_timesteps(BATCH_SIZE, generator)
        signal = alpha_bar[timesteps][:, None, None, None]
        noisy = signal.sqrt() * batch.pictures + (1 - signal).sqrt() * noise

        context = models.text_encoder(batch.captions).last_hidden_state
        prediction = models.unet(noisy.to(torch.bfloat16), timesteps, context).sample.float()
        snr = (signal / (1 - signal)).flatten()
        loss = ((prediction - noise).square().mean(dim=(1, 2, 3)) * (snr.clamp(max=SNR_LIMIT) / snr)).mean()
        if trainer.steps % READING_EVERY == 0:
            ids, labels, ends = lesson_batch(models.tokenizer, rng, BATCH_SIZE)
            loss = loss + 0.1 * models.readers(models.text_encoder(ids).last_hidden_state, labels, ends, generator)
        trainer.step(loss, learning_rate_factor(share, FLAT_UNTIL))
    trainer.finish()


def _spread_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Random timesteps in [0, 1000), one from each of `count` equal ranges: less noise in the loss."""
    return ((torch.arange(count) + torch.rand(count, generator=generator)) / count * 1000).long()
