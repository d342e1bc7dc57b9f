"""Stable Diffusion 2.x: OpenCLIP ViT-H without its last layer, linear projections, noise (512) or velocity (768)."""

from __future__ import annotations

from lora_diffusion.models.one_encoder import OneEncoderModel


class SD2(OneEncoderModel):
    """Stable Diffusion 2.0, 2.1 and everything tuned from them."""

    family = "sd2"

    @property
    def architecture(self) -> str:
        return "stable-diffusion-v2-768-v" if self.schedule.prediction == "v" else "stable-diffusion-v2-512"

    @property
    def base_model_version(self) -> str:
        return "sd_v2_v" if self.schedule.prediction == "v" else "sd_v2"
