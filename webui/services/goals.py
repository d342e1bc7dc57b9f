"""What is to be learned decides a few settings: the word in the captions, the layers, the text encoder."""

from __future__ import annotations

import re

from webui.services.form_values import Fields, num_tables

_SETTINGS: dict[str, Fields] = {
    "style": {"adapter.targets": "attention-mlp", "adapter.text_encoder": "false"},
    "character": {"adapter.targets": "attention-mlp", "adapter.text_encoder": "true"},
    "object": {"adapter.targets": "attention", "adapter.text_encoder": "true"},
}
_PREFIX = {"style": "in {word} style, ", "character": "a photo of {word}, ", "object": "a photo of {word}, "}
_PROMPTS = {
    "style": (
        "in {word} style, a lighthouse on a cliff",
        "in {word} style, a portrait of a woman",
        "a lighthouse on a cliff",
    ),
    "character": ("a photo of {word}, on a beach", "a photo of {word}, in the snow", "a photo of a person, on a beach"),
    "object": ("a photo of {word}, on a table", "a photo of {word}, in the grass", "a photo of a table"),
}
"""The last one shows whether the adapter leaks into pictures that are not about it."""


def apply(goal: str, word: str, fields: Fields) -> Fields:
    """The settings for a goal. word: the one that shall call what is learned; without it captions stay as they are."""
    word = re.sub(r"[^\w \-]", "", word).strip()
    changes = dict(_SETTINGS.get(goal, {}))
    if changes and word:
        prefix = _PREFIX[goal].format(word=word)
        changes |= {f"dataset.{index}.caption_prefix": prefix for index in range(num_tables(fields))}
        changes["preview.prompts"] = "\n".join(prompt.format(word=word) for prompt in _PROMPTS[goal])
    return fields | changes
