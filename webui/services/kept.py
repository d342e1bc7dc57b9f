"""What a browser kept of a page's fields, as values that the fields can hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from lora_diffusion.generation.sheet import MAX_PROMPT_LENGTH


def kept_values(text: str, names: Sequence[str], fits: Callable[[str, object], bool]) -> dict[str, object]:
    """The values by name. What a field cannot hold is left out.

    text: a JSON list in the order of `names`; a shorter one was kept before the last fields came to the page.
    fits: whether the field of that name can hold a value.
    """
    try:
        values = json.loads(text) if len(text) < 10 * MAX_PROMPT_LENGTH else []
    except (ValueError, RecursionError):
        return {}
    if not isinstance(values, list) or len(values) > len(names):
        return {}
    return {name: value for name, value in zip(names, values, strict=False) if fits(name, value)}
