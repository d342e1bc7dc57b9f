"""The one error of this package."""

from __future__ import annotations

from lora_diffusion.errors import UserError


class ModelError(UserError):
    """A base model cannot be found, read or used."""
