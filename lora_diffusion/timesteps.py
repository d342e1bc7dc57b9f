"""How long noise schedules are, and in how many steps pictures can be drawn with them. No torch."""

from __future__ import annotations

NUM_TIMESTEPS = 1000  # of every Stable Diffusion noise schedule


def max_denoising_steps(num_timesteps: int = NUM_TIMESTEPS) -> int:
    """With more, DPM++ and UniPC come to a timestep twice, or to one past the last."""
    return num_timesteps - 2
