"""How much noise is in the latents at each timestep, and what the model has to predict from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lora_diffusion.errors import UserError

Prediction = Literal["epsilon", "v"]
"""What the UNet was trained to output: the noise, or the velocity of Salimans & Ho 2022."""


@dataclass(frozen=True)
class NoiseSchedule:
    """A variance-preserving schedule: noisy = √ᾱ · latents + √(1 - ᾱ) · noise (Ho et al. 2020, arXiv:2006.11239).

    alphas_cumprod: ᾱ for each timestep, (T,), float32, falling from almost 1 to almost (or exactly) 0.
    """

    alphas_cumprod: Tensor
    prediction: Prediction = "epsilon"

    @classmethod
    def from_betas(cls, betas: Tensor, prediction: Prediction, zero_terminal_snr: bool = False) -> NoiseSchedule:
        """betas: (T,), the variance added by each step, in (0, 1). zero_terminal_snr: see `to_zero_terminal_snr`."""
        alphas_cumprod = torch.cumprod(1.0 - betas.float(), dim=0)
        if zero_terminal_snr:
            alphas_cumprod = to_zero_terminal_snr(alphas_cumprod)
        return cls(alphas_cumprod, prediction)

    @property
    def num_steps(self) -> int:
        return self.alphas_cumprod.shape[0]

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule on `device`, so that timesteps there need no copy."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The latents as they are at timestep `t`.

        latents, noise: (B, C, H, W). t: (B,), integers in [0, num_steps). Returns the dtype of `latents`.
        """
        signal, sigma = self._scales(t, latents)
        return (signal * latents + sigma * noise).to(latents.dtype)

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model must predict at timestep `t`: the noise, or the velocity √ᾱ · noise - √(1 - ᾱ) · latents.

        latents, noise: (B, C, H, W). t: (B,), integers in [0, num_steps). Returns the dtype of `latents`.
        Velocity as in Salimans & Ho 2022 (arXiv:2202.00512), section 4.
        """
        if self.prediction == "epsilon":
            return noise
        signal, sigma = self._scales(t, latents)
        return (signal * noise - sigma * latents).to(latents.dtype)

    def estimate(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The clean latents that follow from what the model predicts at timestep `t`: the inverse of `target`.

        noisy, prediction: (B, C, H, W). t: (B,), integers in [0, num_steps). Returns the dtype of `noisy`. Where next
        to no signal is left, predicted noise tells next to nothing: the estimate is finite, and no more.
        """
        signal, sigma = self._scales(t, noisy)
        if self.prediction == "v":
            return (signal * noisy - sigma * prediction).to(noisy.dtype)
        return ((noisy - sigma * prediction) / signal.clamp(min=1e-3)).to(noisy.dtype)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio ᾱ / (1 - ᾱ) at timestep `t`: (B,), float32; 0 where only noise is left."""
        alpha = self._alphas(t)
        return alpha / (1.0 - alpha)

    def _alphas(self, t: Tensor) -> Tensor:
        return self.alphas_cumprod.to(t.device)[t]

    def _scales(self, t: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """(√ᾱ, √(1 - ᾱ)) in float32, to broadcast against `latents`."""
        alpha = self._alphas(t).to(latents.device).reshape(-1, *(1,) * (latents.ndim - 1))
        return alpha.sqrt(), (1.0 - alpha).sqrt()


def to_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and stretch √ᾱ so that the last step is pure noise and the first stays.

    Lin et al. 2023 (arXiv:2305.08891), algorithm 1.
    """
    signal = alphas_cumprod.sqrt()
    first, last = signal[0], signal[-1]
    return ((signal - last) * (first / (first - last))).square()


def make_betas(kind: str, start: float = 0.00085, end: float = 0.012, num_steps: int = 1000) -> Tensor:
    """The variance added by each step: (num_steps,), float32. The defaults are Stable Diffusion's.

    kind: a name in `BETAS`; start and end play no part in "squaredcos_cap_v2". Raises UserError for an unknown one.
    """
    if kind not in BETAS:
        raise UserError(f"beta_schedule {kind!r} is not one of {', '.join(BETAS)}. Correct scheduler_config.json.")
    return BETAS[kind](start, end, num_steps)


def sample_timestep(generator: torch.Generator, low: int, high: int) -> int:
    """A timestep, uniform in [low, high)."""
    return int(torch.randint(low, high, (), generator=generator))


def _linear(start: float, end: float, num_steps: int) -> Tensor:
    return torch.linspace(start, end, num_steps, dtype=torch.float32)


def _scaled_linear(start: float, end: float, num_steps: int) -> Tensor:
    """Linear in √β: Rombach et al. 2022 (arXiv:2112.10752), all Stable Diffusion models."""
    return _linear(start**0.5, end**0.5, num_steps).square()


def _squared_cosine(start: float, end: float, num_steps: int) -> Tensor:
    """Nichol & Dhariwal 2021 (arXiv:2102.09672), equation 17; β is capped at 0.999 as they do."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [1 - alpha_bar((i + 1) / num_steps) / alpha_bar(i / num_steps) for i in range(num_steps)]
    return torch.tensor(betas, dtype=torch.float32).clamp(max=0.999)


BETAS: dict[str, Callable[[float, float, int], Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _squared_cosine,
}
"""diffusers' names in `scheduler_config.json`."""
