"""Stable Diffusion XL: two text encoders, a pooled text vector and the sizes of the picture condition the UNet.

Podell et al. 2023, arXiv:2307.01952.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.ldm_names import with_text_model
from lora_diffusion.models import clip
from lora_diffusion.models.base import Conditioning, DiffusionModel, Part
from lora_diffusion.models.errors import ModelError
from lora_diffusion.models.libraries import (
    AutoencoderKL,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    UNet2DConditionModel,
)


class SDXL(DiffusionModel):
    """SDXL base 1.0 and everything tuned from it."""

    family = "sdxl"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        scheduler_config: Mapping[str, Any],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(unet, vae, scheduler_config, dtype=dtype)
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.text_encoder_2 = text_encoder_2.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.tokenizer_2 = tokenizer_2
        self._text_encoder_weights = clip.named_weights(text_encoder), clip.named_weights(text_encoder_2)

    @property
    def parts(self) -> dict[str, Part]:
        """Files name the UNet's layers as the original code does: "lora_unet_input_blocks_4_1_proj_in"."""
        return {
            "unet": Part(self.unet, "lora_unet", self.unet_to_ldm),
            "text_encoder": Part(self.text_encoder, "lora_te1", with_text_model),
            "text_encoder_2": Part(self.text_encoder_2, "lora_te2", with_text_model),
        }

    @property
    def architecture(self) -> str:
        return "stable-diffusion-xl-v1-base"

    @property
    def base_model_version(self) -> str:
        return "sdxl_base_v1-0"

    def hash_text_encoder(self) -> str:
        first, second = self._text_encoder_weights
        ids = (
            clip.encoder_id(first, self.text_encoder, self.tokenizer),
            clip.encoder_id(second, self.text_encoder_2, self.tokenizer_2),
        )
        return hashlib.sha256(" ".join(ids).encode()).hexdigest()

    @property
    def max_tokens(self) -> int:
        return self.text_encoder.config.max_position_embeddings - 2

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        return clip.token_counts(self.tokenizer, captions)

    def check_clip_skip(self, clip_skip: int) -> None:
        if clip_skip not in (1, 2):
            raise ModelError(
                f"clip_skip is {clip_skip}, but SDXL was trained on the last layer but one of its text encoders. "
                "1 and 2 both mean that layer; leave clip_skip out."
            )

    def encode_text(self, captions: Sequence[str], *, clip_skip: int = 1, chunks: int | None = 1) -> Conditioning:
        """Both encoders' last layer but one, side by side; pooled is the second one's, of the first chunk."""
        self.check_clip_skip(clip_skip)
        self.need("text_encoder", "text_encoder_2")
        ids = clip.tokenize(self.tokenizer, captions, length=self.max_tokens, chunks=chunks)
        ids_2 = clip.tokenize(self.tokenizer_2, captions, length=self.max_tokens, chunks=ids.shape[1])
        hidden = clip.encode_penultimate(self.text_encoder, ids)
        hidden_2, pooled = clip.encode_penultimate_and_pooled(self.text_encoder_2, ids_2)
        return Conditioning(torch.cat([hidden, hidden_2], dim=-1), pooled)

    def predict(self, noisy: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        if conditioning.pooled is None or conditioning.size is None:
            raise AssertionError("SDXL needs pooled text and sizes: Conditioning.with_size")
        output = self.unet(
            noisy.to(self.dtype),
            timestep,
            encoder_hidden_states=conditioning.hidden.to(self.dtype),
            added_cond_kwargs={"text_embeds": conditioning.pooled.to(self.dtype), "time_ids": conditioning.size},
        )
        return output.sample.to(noisy.dtype)
