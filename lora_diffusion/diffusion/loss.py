"""What a prediction costs, and how much each timestep counts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_diffusion.diffusion.schedule import Prediction

HUBER_C = 0.1
"""Errors far above it count linearly; from Khrapov et al. 2024 (arXiv:2403.16728)."""


LossWeight = Callable[[Tensor, Prediction, float], Tensor]
"""(snr (B,), prediction, gamma) → (B,) float32, finite and not negative."""


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error of each element."""
    return (prediction - target).square()


def huber(prediction: Tensor, target: Tensor) -> Tensor:
    """Pseudo-Huber loss of each element, 2c(√(d² + c²) - c): as d² where d is far below c, as 2c·|d| far above."""
    difference = prediction - target
    return 2 * HUBER_C * ((difference.square() + HUBER_C**2).sqrt() - HUBER_C)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "huber": huber}


def per_sample_loss(prediction: Tensor, target: Tensor, kind: str = "mse") -> Tensor:
    """Mean loss of each sample. (B, …) twice → (B,), computed in float32. kind: a name in `LOSSES`.

    Raises ValueError if the shapes differ, rather than broadcast.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)}, target {tuple(target.shape)}")
    return LOSSES[kind](prediction.float(), target.float()).flatten(1).mean(1)


def unweighted(snr: Tensor, prediction: Prediction, gamma: float) -> Tensor:
    """Every timestep counts the same."""
    return torch.ones_like(snr, dtype=torch.float32)


def min_snr(snr: Tensor, prediction: Prediction, gamma: float) -> Tensor:
    """min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v: less weight where there is little noise.

    Hang et al. 2023 (arXiv:2303.09556), section 3.4, brought over from their loss on the clean image.
    """
    snr = snr.float()
    if prediction == "v":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1.0)  # the same as min(SNR, gamma) / SNR, and 1 at SNR 0


LOSS_WEIGHTS: dict[str, LossWeight] = {"none": unweighted, "min-snr": min_snr}
