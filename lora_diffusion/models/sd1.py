"""Stable Diffusion 1.x: CLIP ViT-L/14 and a UNet that projects with convolutions."""

from __future__ import annotations

from lora_diffusion.models.one_encoder import OneEncoderModel


class SD1(OneEncoderModel):
    """Stable Diffusion 1.x and everything tuned from it."""

    family = "sd1"

    @property
    def architecture(self) -> str:
        return "stable-diffusion-v1"

    @property
    def base_model_version(self) -> str:
        return "sd_v1_v" if self.schedule.prediction == "v" else "sd_v1"
