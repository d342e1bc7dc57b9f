"""What every model family offers: images to latents, captions to conditioning, and the prediction in between."""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_diffusion.diffusion.schedule import NoiseSchedule
from lora_diffusion.ldm_names import unet_to_ldm
from lora_diffusion.models.errors import ModelError
from lora_diffusion.models.heap import trim_heap
from lora_diffusion.models.libraries import AutoencoderKL, DiagonalGaussianDistribution, UNet2DConditionModel
from lora_diffusion.models.schedules import schedule_of
from lora_diffusion.models.vae import CheckedVAE

__all__ = ["Conditioning", "DiffusionModel", "ModelError", "Part", "size_numbers", "weights_id"]


_RELOADS = threading.Lock()


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told about each image.

    hidden: (B, T, D). pooled: (B, P) for families that have it. size: (B, 6), float32, see `size_numbers`; needed by
    families that are told sizes, ignored by the others.
    """

    hidden: Tensor
    pooled: Tensor | None = None
    size: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Size stays float32: bfloat16 would round 1023 px to 1024."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        size = None if self.size is None else self.size.to(device)
        return Conditioning(self.hidden.to(device, dtype), pooled, size)

    def with_size(self, size: Tensor) -> Conditioning:
        """The same texts for images of these sizes. size: (B, 6), or (6,) for all images alike."""
        return replace(self, size=size.to(self.hidden.device, torch.float32).expand(len(self), 6))

    @classmethod
    def cat(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """One batch of several; all must have the same number of tokens and the same fields."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        size = [part.size for part in parts if part.size is not None]
        return cls(
            torch.cat([part.hidden for part in parts]),
            torch.cat(pooled) if pooled else None,
            torch.cat(size) if size else None,
        )

    def texts(self) -> dict[str, Tensor]:
        """What depends on the captions alone, by name: the fields to cache."""
        return {"hidden": self.hidden} | ({} if self.pooled is None else {"pooled": self.pooled})


def size_numbers(original: tuple[int, int], crop: tuple[int, int], target: tuple[int, int]) -> tuple[int, ...]:
    """The six numbers of SDXL's size conditioning (Podell et al. 2023, arXiv:2307.01952, section 2.2).

    original, target: (width, height) of the picture file and of what is drawn. crop: (left, top) in the resized
    picture. The result is (original height, original width, top, left, target height, target width).
    """
    return (original[1], original[0], crop[1], crop[0], target[1], target[0])


Rename = Callable[[str], str]


@dataclass(frozen=True)
class Part:
    """A component that adapters can go into, and what its modules are called in adapter files.

    file_prefix: "lora_unet", "lora_te". rename: from a module path to the path in files, where they differ.
    """

    module: nn.Module
    file_prefix: str
    rename: Rename | None = None

    def file_name(self, path: str) -> str:
        """The name in kohya files of the layer at dotted `path`: "lora_unet_down_blocks_0_…_attn1_to_q".

        Raises ValueError for what is no layer, if files have other names than modules.
        """
        return f"{self.file_prefix}_{self.rename(path) if self.rename else path}".replace(".", "_")


class DiffusionModel(nn.Module, ABC):
    """A frozen text-to-image base in evaluation mode: UNet, VAE, and the family's text encoders.

    UNet and text encoders are in `dtype`, the VAE in a dtype of its own (see `CheckedVAE`).
    """

    family: ClassVar[str]
    schedule: NoiseSchedule
    scheduler_config: dict[str, Any]
    """The base's own sampler settings, with `prediction_type` and `rescale_betas_zero_snr` as resolved."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler_config: Mapping[str, Any],
        *,
        dtype: torch.dtype,
    ) -> None:
        """scheduler_config: as `resolve_scheduler` returns it. dtype: that of the UNet and the text encoders."""
        super().__init__()
        self.unet = unet.requires_grad_(False).eval()
        self.vae = vae.requires_grad_(False).eval()
        self.dtype = dtype
        self.scheduler_config = dict(scheduler_config)
        self.schedule = schedule_of(scheduler_config)
        self.reloads: dict[str, Callable[[], nn.Module]] = {}
        """Parts that can be loaded again ("vae", "text_encoder", …), and how: what `release` may free."""
        self.fingerprint: dict[str, str] = {}
        """What its weight files are recognised by; see `lora_diffusion.models.fingerprint`."""
        self._released: set[str] = set()
        self._move_unet: Callable[[], None] | None = None
        self._checked_vae = CheckedVAE(vae)
        # Parameters stay the same objects when adapters wrap their layers, so the ids below do not depend on adapters.
        self._vae_weights = tuple(vae.named_parameters())

    @property
    @abstractmethod
    def parts(self) -> dict[str, Part]:
        """The components adapters can go into, by the names "unet", "text_encoder", …"""

    @property
    @abstractmethod
    def architecture(self) -> str:
        """Its name in ModelSpec metadata."""

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
    def token_counts(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption without the begin and end marks. Many at once take less time than one by one."""

    def count_tokens(self, caption: str) -> int:
        """`token_counts` of one caption."""
        return self.token_counts([caption])[0]

    @abstractmethod
    def check_clip_skip(self, clip_skip: int) -> None:
        """Raises ModelError if the family's text encoders cannot be read at this layer."""

    @abstractmethod
    def encode_text(self, captions: Sequence[str], *, clip_skip: int = 1, chunks: int | None = 1) -> Conditioning:
        """The conditioning of a batch of captions, without sizes.

        clip_skip: 1 is the last layer, 2 the last but one, as in A1111 and sd-scripts. chunks: token chunks per caption
        (longer captions are cut); None is as many as the longest caption needs. Gradients flow if the encoder has
        trainable adapters and the caller allows them.
        """

    @abstractmethod
    def predict(self, noisy: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """What the UNet sees in noisy latents (B, C, h, w) at integer `timestep` (B,): noise, or velocity.

        Runs in the UNet's dtype, returns that of `noisy`.
        """

    def let_unet_wait(self, move: Callable[[], None]) -> None:
        """move: brings the UNet to its device, in the form it is to have there."""
        self._move_unet = move

    def place_unet(self) -> None:
        """Bring the UNet to its device, if it still waits."""
        if self._move_unet is not None:
            self._move_unet()
            self._move_unet = None

    def release(self, parts: Iterable[str]) -> None:
        """Free the weights of these parts, of which `reloads` knows how to get them again.

        They come back by themselves when they are needed, as they were on disk, and then stay.
        """
        for part in set(parts) - self._released:
            for parameter in self.get_submodule(part).parameters():
                parameter.data = parameter.data.new_empty(0)  # the same object: ids and adapters refer to it
            self._released.add(part)
        trim_heap()

    def need(self, *parts: str) -> None:
        """Load again what `release` freed of these parts. Threads that make batches and draw may need them at once."""
        with _RELOADS:
            for part in self._released.intersection(parts):
                fresh = dict(self.reloads[part]().named_parameters())
                for name, parameter in self.get_submodule(part).named_parameters():
                    parameter.data = fresh[name].data.to(parameter.device)
                self._released.remove(part)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents, each float32 (B, C, H/f, W/f).

        pixels: (B, 3, H, W) in [-1, 1]; H and W multiples of the latent factor f. Not finite where even float32
        overflows.
        """
        self.need("vae")
        posterior = DiagonalGaussianDistribution(self._checked_vae.encode(pixels))
        scale, shift = self._latent_scale
        return (posterior.mean - shift) * scale, posterior.std * scale

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels of scaled latents (B, C, h, w): float32 (B, 3, h·f, w·f), clamped to [-1, 1]; NaN for overflow."""
        self.need("vae")
        scale, shift = self._latent_scale
        pixels = self._checked_vae.decode(latents.float() / scale + shift)
        return pixels.clamp(-1, 1).masked_fill(~pixels.isfinite(), torch.nan)

    @property
    def _latent_scale(self) -> tuple[float, float]:
        return self.vae.config["scaling_factor"], self.vae.config.get("shift_factor") or 0.0

    @cached_property
    def vae_id(self) -> str:
        """A hash of everything that decides the latents, the VAE's dtype included: the key of cached latents."""
        self.need("vae")
        return weights_id("vae", self._vae_weights, self._latent_scale, self.vae.config["norm_num_groups"])

    @cached_property
    def text_encoder_id(self) -> str:
        """A hash of everything that decides the text encoding: the key of cached embeddings."""
        self.need("text_encoder", "text_encoder_2")
        return self.hash_text_encoder()

    @property
    def unet_to_ldm(self) -> Rename:
        """From the UNet's module paths to those of the first Stable Diffusion release."""
        config = self.unet.config
        plain = [i for i, kind in enumerate(config["up_block_types"]) if "Attn" not in kind]
        return partial(unet_to_ldm, layers_per_block=config["layers_per_block"], plain_up_blocks=plain)

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

    def num_latent_pixels(self, size: tuple[int, int]) -> int:
        """Of a picture of `size` (width, height) pixels."""
        return (size[0] // self.latent_factor) * (size[1] // self.latent_factor)

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
