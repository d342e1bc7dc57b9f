"""Diffusion as pure functions of tensors: schedules, noise, losses."""
