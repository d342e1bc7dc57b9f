"""The one error of this package."""

from __future__ import annotations

from lora_diffusion.errors import UserError


class CaptionerError(UserError):
    """A captioner cannot be found, read or used, or there is nothing to caption."""
