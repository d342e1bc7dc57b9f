"""Stable Diffusion 1.x: one CLIP text encoder whose hidden states condition the UNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from lora_diffusion.diffusion.schedule import Prediction
from lora_diffusion.models import clip
from lora_diffusion.models.base import Conditioning, DiffusionModel, Part, weights_id


class SD1(DiffusionModel):
    """Stable Diffusion 1.x and everything tuned from it."""

    family = "sd1"
    architecture = "stable-diffusion-v1"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler_config: Mapping[str, Any],
        *,
        dtype: torch.dtype = torch.float32,
        prediction: Literal["auto"] | Prediction = "auto",
        zero_terminal_snr: Literal["auto"] | bool = "auto",
    ) -> None:
        super().__init__(
            unet, vae, scheduler_config, dtype=dtype, prediction=prediction, zero_terminal_snr=zero_terminal_snr
        )
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self._text_encoder_weights = tuple(
            (name.removeprefix("text_model."), weight) for name, weight in text_encoder.named_parameters()
        )

    @property
    def parts(self) -> dict[str, Part]:
        return {
            "unet": Part(self.unet, "lora_unet"),
            "text_encoder": Part(self.text_encoder, "lora_te", file_root="text_model."),
        }

    @property
    def base_model_version(self) -> str:
        return "sd_v1_v" if self.schedule.prediction == "v" else "sd_v1"

    def hash_text_encoder(self) -> str:
        config = self.text_encoder.config
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        settings = (config.hidden_act, config.num_attention_heads, config.layer_norm_eps, vocabulary)
        return weights_id("clip", self._text_encoder_weights, *settings)

    @property
    def max_tokens(self) -> int:
        return self.text_encoder.config.max_position_embeddings - 2

    def count_tokens(self, caption: str) -> int:
        return clip.count_tokens(self.tokenizer, caption)

    def encode_text(self, captions: Sequence[str], *, clip_skip: int = 1, chunks: int | None = 1) -> Conditioning:
        ids = clip.tokenize(self.tokenizer, captions, length=self.max_tokens, chunks=chunks)
        return Conditioning(clip.encode(self.text_encoder, ids, clip_skip))

    def predict(self, noisy: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        hidden = conditioning.hidden.to(self.dtype)
        return self.unet(noisy.to(self.dtype), timestep, encoder_hidden_states=hidden).sample.to(noisy.dtype)
