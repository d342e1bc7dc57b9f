"""What is wrong with a data set, said to the person who can mend it."""

from __future__ import annotations

from lora_diffusion.errors import UserError


class DataError(UserError):
    """A data set, or one file of it, cannot be used. The message names it, says why and what to do."""
