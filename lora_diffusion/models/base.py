"""What every model family offers: images to latents, captions to conditioning, and the prediction in between."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from lora_diffusion.diffusion.schedule import NoiseSchedule, Prediction, make_betas
from lora_diffusion.errors import UserError


class ModelError(UserError):
    """A base model cannot be found, read or used."""


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told about each image. hidden: (B, T, D). pooled: (B, P) for families that have it."""

    hidden: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return Conditioning(self.hidden.to(device, dtype), pooled)

    @classmethod
    def cat(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """One batch of several; all must have the same number of tokens."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return cls(torch.cat([part.hidden for part in parts]), torch.cat(pooled) if pooled else None)


@dataclass(frozen=True)
class Part:
    """A component that adapters can go into, and what its modules are called in adapter files.

    file_prefix: "lora_unet", "lora_te". file_root: a level that files have and module paths may lack, such as the
    "text_model." that transformers 5 dropped from CLIP.
    """

    module: nn.Module
    file_prefix: str
    file_root: str = ""

    def file_name(self, path: str) -> str:
        """The name in kohya files of the module at dotted `path`: "lora_unet_down_blocks_0_…_attn1_to_q"."""
        rooted = path if path.startswith(self.file_root) else self.file_root + path
        return f"{self.file_prefix}_{rooted}".replace(".", "_")


class DiffusionModel(nn.Module, ABC):
    """A frozen text-to-image base in evaluation mode: UNet, VAE, and the family's text encoders.

    The VAE stays float32 (SD's overflows in float16); UNet and text encoders are in `dtype`.
    """

    family: ClassVar[str]
    architecture: ClassVar[str]
    """Its name in ModelSpec metadata."""
    schedule: NoiseSchedule
    scheduler_config: dict[str, Any]
    """The base's own sampler settings, with `prediction_type` and `rescale_betas_zero_snr` as resolved here."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler_config: Mapping[str, Any],
        *,
        dtype: torch.dtype,
        prediction: Literal["auto"] | Prediction = "auto",
        zero_terminal_snr: Literal["auto"] | bool = "auto",
    ) -> None:
        super().__init__()
        self.unet = unet.requires_grad_(False).eval()
        self.vae = vae.requires_grad_(False).eval()
        self.dtype = dtype
        self.schedule, self.scheduler_config = _schedule(scheduler_config, prediction, zero_terminal_snr)
        # Parameters stay the same objects when adapters wrap their layers, so the ids below do not depend on adapters.
        self._vae_weights = tuple(vae.named_parameters())

    @property
    @abstractmethod
    def parts(self) -> dict[str, Part]:
        """The components adapters can go into, by the names "unet", "text_encoder", …"""

    @property
    @abstractmethod
    def base_model_version(self) -> str:
        """`ss_base_model_version` as sd-scripts writes it."""

    @abstractmethod
    def hash_text_encoder(self) -> str:
        """Computes `text_encoder_id`, from the base's weights alone."""

    @property
    @abstractmethod
    def max_tokens(self) -> int:
        """Caption tokens per chunk, without the begin and end marks: 75 for CLIP."""

    @abstractmethod
    def count_tokens(self, caption: str) -> int:
        """Caption tokens without the begin and end marks."""

    @abstractmethod
    def encode_text(self, captions: Sequence[str], *, clip_skip: int = 1, chunks: int | None = 1) -> Conditioning:
        """The conditioning of a batch of captions.

        clip_skip: 1 is the last layer, 2 the last but one, as in A1111 and sd-scripts. chunks: token chunks per caption
        (longer captions are cut); None is as many as the longest caption needs. Gradients flow if the encoder has
        trainable adapters and the caller allows them.
        """

    @abstractmethod
    def predict(self, noisy: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """What the UNet sees in noisy latents (B, C, h, w) at integer `timestep` (B,): noise, or velocity.

        Runs in the UNet's dtype, returns that of `noisy`.
        """

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents, each float32 (B, C, H/f, W/f).

        pixels: (B, 3, H, W) in [-1, 1]; H and W multiples of the latent factor f.
        """
        posterior = self.vae.encode(pixels.to(self.vae.device, torch.float32), return_dict=False)[0]
        scale, shift = self._latent_scale
        return (posterior.mean - shift) * scale, posterior.std * scale

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels of scaled latents (B, C, h, w): float32 (B, 3, h·f, w·f), clamped to [-1, 1]."""
        scale, shift = self._latent_scale
        unscaled = latents.to(self.vae.device, torch.float32) / scale + shift
        # diffusers annotates `FloatTensor` for what is any float tensor
        return self.vae.decode(unscaled, return_dict=False)[0].clamp(-1, 1)  # pyright: ignore[reportArgumentType]

    @property
    def _latent_scale(self) -> tuple[float, float]:
        return self.vae.config["scaling_factor"], self.vae.config.get("shift_factor") or 0.0

    @cached_property
    def vae_id(self) -> str:
        """A hash of everything that decides the latents: the key of cached latents."""
        return weights_id("vae", self._vae_weights, self._latent_scale, self.vae.config["norm_num_groups"])

    @cached_property
    def text_encoder_id(self) -> str:
        """A hash of everything that decides the text encoding: the key of cached embeddings."""
        return self.hash_text_encoder()

    @property
    def latent_channels(self) -> int:
        return self.vae.config["latent_channels"]

    @property
    def latent_factor(self) -> int:
        """Pixels per latent in each direction: 8 for the published models, 4 for the miniature base."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def resolution_step(self) -> int:
        """Pixels that image sides must be multiples of, for the UNet's levels to halve without a remainder."""
        return self.latent_factor * 2 ** (len(self.unet.config["block_out_channels"]) - 1)

    @property
    def default_size(self) -> tuple[int, int]:
        """Width and height in pixels that the base was made for."""
        sample_size = self.unet.config["sample_size"]
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        return width * self.latent_factor, height * self.latent_factor


def weights_id(kind: str, weights: Sequence[tuple[str, Tensor]], *settings: object) -> str:
    """A sha256 over names, dtypes, shapes and values, and the settings that change what the weights compute."""
    digest = hashlib.sha256(f"{kind} {settings}".encode())
    for name, tensor in sorted(weights, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _schedule(
    config: Mapping[str, Any],
    prediction: Literal["auto"] | Prediction,
    zero_terminal_snr: Literal["auto"] | bool,
) -> tuple[NoiseSchedule, dict[str, Any]]:
    """The training schedule of a diffusers scheduler config, and that config with the two choices resolved."""
    types: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v"}
    if prediction == "auto":
        named = config.get("prediction_type", "epsilon")
        if named not in types:
            raise ModelError(
                f"scheduler_config.json has prediction_type {named!r}; this version trains "
                f"{' and '.join(types)}. If the file is wrong, set model.prediction."
            )
        prediction = types[named]
    if zero_terminal_snr == "auto":
        zero_terminal_snr = bool(config.get("rescale_betas_zero_snr", False))
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
    else:
        betas = make_betas(
            config.get("beta_schedule", "scaled_linear"),
            config.get("beta_start", 0.00085),
            config.get("beta_end", 0.012),
            config.get("num_train_timesteps", 1000),
        )
    resolved = {name: value for name, value in config.items() if not name.startswith("_")}
    resolved["prediction_type"] = {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
    resolved["rescale_betas_zero_snr"] = zero_terminal_snr
    return NoiseSchedule.from_betas(betas, prediction, zero_terminal_snr), resolved
