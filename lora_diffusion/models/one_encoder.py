"""What SD 1.x and SD 2.x share: one CLIP text encoder whose hidden states condition the UNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.ldm_names import with_text_model
from lora_diffusion.models import clip
from lora_diffusion.models.base import Conditioning, DiffusionModel, Part
from lora_diffusion.models.libraries import AutoencoderKL, CLIPTextModel, CLIPTokenizer, UNet2DConditionModel


class OneEncoderModel(DiffusionModel):
    """A UNet that is told nothing but the timestep and one text encoder's hidden states."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler_config: Mapping[str, Any],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(unet, vae, scheduler_config, dtype=dtype)
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self._text_encoder_weights = clip.named_weights(text_encoder)

    @property
    def parts(self) -> dict[str, Part]:
        return {
            "unet": Part(self.unet, "lora_unet"),
            "text_encoder": Part(self.text_encoder, "lora_te", with_text_model),
        }

    def hash_text_encoder(self) -> str:
        return clip.encoder_id(self._text_encoder_weights, self.text_encoder, self.tokenizer)

    @property
    def max_tokens(self) -> int:
        return self.text_encoder.config.max_position_embeddings - 2

    def token_counts(self, captions: Sequence[str]) -> list[int]:
        return clip.token_counts(self.tokenizer, captions)

    def check_clip_skip(self, clip_skip: int) -> None:
        clip.check_clip_skip(self.text_encoder, clip_skip)

    def encode_text(self, captions: Sequence[str], *, clip_skip: int = 1, chunks: int | None = 1) -> Conditioning:
        self.need("text_encoder")
        ids = clip.tokenize(self.tokenizer, captions, length=self.max_tokens, chunks=chunks)
        return Conditioning(clip.encode(self.text_encoder, ids, clip_skip))

    def predict(self, noisy: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        hidden = conditioning.hidden.to(self.dtype)
        return self.unet(noisy.to(self.dtype), timestep, encoder_hidden_states=hidden).sample.to(noisy.dtype)
