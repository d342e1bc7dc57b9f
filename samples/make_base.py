"""Train the sample base from nothing and write it to `samples/base`.

    torchrun --nproc-per-node 2 -m samples.make_base

The budgets are wall-clock minutes, so that a busy machine ends on time. Interrupted runs resume from the checkpoints in
`samples/.cache`; `--export-only` writes what the checkpoints hold so far, even while another process trains.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.utils import logging as diffusers_logging

from samples.base_export import export_base
from samples.base_text import QUESTIONS, Readers, new_text_encoder, new_tokenizer, pretrain_text_encoder
from samples.base_unet import Denoiser, new_unet, train_unet
from samples.base_vae import (
    draw_pictures,
    new_vae,
    random_scenes,
    reconstruction_psnr,
    standardize_latents,
    train_decoder,
    train_vae,
)
from samples.styles import STYLES
from samples.training import num_processes, process_rank

logger = logging.getLogger(__name__)

SAMPLES = Path(__file__).parent
CHECKPOINTS = SAMPLES / ".cache" / "base"
NUM_STATISTICS_PICTURES = 1000
NUM_PSNR_PICTURES = 100


def main() -> None:
    arguments = _arguments()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    level = logging.INFO if process_rank() == 0 else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    diffusers_logging.set_verbosity_error()
    torch.set_num_threads(1 if num_processes() > 1 else arguments.threads)
    torch.set_flush_denormal(True)  # else the moments of rarely used embeddings slow a CPU down
    torch.manual_seed(arguments.seed)
    budgets = {name: 60 * getattr(arguments, f"{name}_minutes") for name in ("vae", "text", "unet", "decoder")}
    if arguments.export_only:
        budgets = dict.fromkeys(budgets, 0.0)

    models = _text_models(budgets["text"], arguments.seed)
    vae = _autoencoder(budgets["vae"], arguments.seed)
    train_unet(models, vae, budgets["unet"], CHECKPOINTS / "unet.safetensors", arguments.seed)
    train_decoder(vae, budgets["decoder"], CHECKPOINTS / "decoder.safetensors", arguments.seed + 1)
    if process_rank() == 0:
        _log_psnr(vae, arguments.seed)
        export_base(vae, models, SAMPLES / "base")
        logger.info("wrote %s/base", SAMPLES.name)
    if dist.is_initialized():
        dist.destroy_process_group()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae-minutes", type=float, default=18)
    parser.add_argument("--text-minutes", type=float, default=2)
    parser.add_argument("--unet-minutes", type=float, default=45)
    parser.add_argument("--decoder-minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export-only", action="store_true", help="train nothing, write what the checkpoints hold")
    return parser.parse_args()


def _text_models(budget_s: float, seed: int) -> Denoiser:
    tokenizer = new_tokenizer(seed)
    encoder, readers = new_text_encoder(tokenizer), Readers()
    accuracy = pretrain_text_encoder(encoder, readers, tokenizer, budget_s, CHECKPOINTS / "text.safetensors", seed)
    for (question, _), share in zip(QUESTIONS, accuracy.tolist(), strict=True):
        logger.info("text  %s is read right in %.1f %%", question, 100 * share)
    return Denoiser(new_unet(), encoder, readers, tokenizer)


def _autoencoder(budget_s: float, seed: int) -> AutoencoderKL:
    vae = new_vae()
    train_vae(vae, budget_s, CHECKPOINTS / "vae.safetensors", seed)
    scenes = random_scenes(NUM_STATISTICS_PICTURES, seed + 2)
    standardize_latents(vae, draw_pictures(scenes, ["flat"] * len(scenes)))
    return vae


def _log_psnr(vae: AutoencoderKL, seed: int) -> None:
    for style in STYLES:
        psnr = reconstruction_psnr(vae, style, NUM_PSNR_PICTURES, seed + 3)
        logger.info("vae  %s is reconstructed with %.1f dB", style, psnr)


if __name__ == "__main__":
    main()
