"""Writes sd15_kohya_keys.txt: the module names of a kohya LoRA for SD 1.5, from the rule that sd-scripts follows.

The rule goes by class, not by name (kohya-ss/sd-scripts, networks/lora.py): every Linear and Conv2d inside a
Transformer2DModel, ResnetBlock2D, Downsample2D or Upsample2D of the UNet (the last three only with `conv_dim`), and
every Linear inside an attention or MLP of the text encoder. So it shares nothing with the expressions under test.

Run from the repository's root: python -m tests.reference.make_sd15_kohya_keys
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from tests.sd15 import make_text_encoder, make_unet

LIST = Path(__file__).with_name("sd15_kohya_keys.txt")
UNET_CLASSES = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
CLIP_CLASSES = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")


def names(root: nn.Module, classes: tuple[str, ...], prefix: str) -> set[str]:
    found = set()
    for path, parent in root.named_modules():
        if type(parent).__name__ in classes:
            for child, layer in parent.named_modules():
                if type(layer).__name__ in ("Linear", "LoRACompatibleLinear", "Conv2d", "LoRACompatibleConv"):
                    found.add(f"{prefix}.{path}.{child}".replace(".", "_"))
    return found


def main() -> None:
    text_encoder = make_text_encoder()
    # sd-scripts ran with a transformers whose CLIPTextModel had a `text_model` level.
    level = "" if hasattr(text_encoder, "text_model") else ".text_model"
    keys = names(make_unet(), UNET_CLASSES, "lora_unet") | names(text_encoder, CLIP_CLASSES, f"lora_te{level}")
    LIST.write_text("\n".join(sorted(keys)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
