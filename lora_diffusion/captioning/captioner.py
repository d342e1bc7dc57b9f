"""A captioner of transformers: pictures → captions, always the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from lora_diffusion.captioning.errors import CaptionerError

NUM_BEAMS = 3  # as BLIP's authors evaluate captions (arXiv:2201.12086, configs/caption_coco.yaml)
CHAT_PROMPT = "Describe this picture in one sentence."
"""What a model that chats is asked, unless the prompt says something else."""

_ECHOES = ("blip", "git")  # made for pictures and captions only: their captions go on from the prompt


@dataclass(frozen=True)
class Captioner:
    """model, processor: as transformers loads them. The model is in evaluation mode, on the device it computes on."""

    model: Any
    processor: Any

    @torch.inference_mode()
    def describe(self, images: Sequence[Image.Image], *, prompt: str = "", max_tokens: int = 60) -> list[str]:
        """A caption for each RGB picture. prompt: as of CaptionConfig. max_tokens: of the caption, without the prompt.

        Beam search and no chance: the same pictures in the same batches have the same captions.
        """
        inputs = {
            name: tensor.to(self.model.device, self.model.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in self._inputs(images, prompt).items()
        }
        tokens = self.model.generate(
            **inputs, do_sample=False, num_beams=NUM_BEAMS, num_return_sequences=1, max_new_tokens=max_tokens
        )
        if "input_ids" in inputs and self.model.config.model_type not in _ECHOES:
            tokens = _without(inputs["input_ids"], tokens)
        return [text.strip() for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]

    def _inputs(self, images: Sequence[Image.Image], prompt: str) -> dict[str, torch.Tensor]:
        if getattr(self.processor, "chat_template", None):
            question = [{"type": "text", "text": prompt or CHAT_PROMPT}]
            chats = [[{"role": "user", "content": [{"type": "image", "image": image}, *question]}] for image in images]
            return self.processor.apply_chat_template(
                chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
            )
        text = {"text": [prompt] * len(images)} if prompt else {}
        return self.processor(images=list(images), return_tensors="pt", **text)


def load_captioner(folder: Path, *, dtype: torch.dtype, device: torch.device) -> Captioner:
    """The captioner in a folder that `find_captioner` found. Raises CaptionerError if transformers cannot use it."""
    transformers_logging.disable_progress_bar()  # it shows the loading of weights, in lines among ours
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
        )
        model, report = loaded
    except Exception as error:  # what these read is anybody's, and they raise nearly anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CaptionerError(f"{folder}: transformers cannot use this captioner: {reason}") from error
    if missing := sorted(report["missing_keys"]):
        raise CaptionerError(
            f"{folder}: its weights lack {len(missing)} tensors, such as {missing[0]}. They are of another kind of "
            "model, or not whole; get the model again."
        )
    processor.tokenizer.padding_side = "left"  # a decoder goes on from the last token
    return Captioner(model.eval().to(device), processor)


def _without(prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The tokens behind the prompt, which decoders repeat and encoder-decoders do not."""
    length = prompt.shape[1]
    return tokens[:, length:] if torch.equal(tokens[:, :length], prompt) else tokens
