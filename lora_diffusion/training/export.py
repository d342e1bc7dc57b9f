"""The trained adapter as a file that other tools read, and the card beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_diffusion.adapters.base import Adapter
from lora_diffusion.errors import RunError
from lora_diffusion.files import write_text_atomically
from lora_diffusion.formats.adapter_file import AdapterFile, FilePart


@dataclass(frozen=True)
class Exporter:
    """The live adapters under their exchange names.

    parts: the model's components. adapters: part → dotted path → adapter. metadata: a function of the step.
    """

    parts: Mapping[str, FilePart]
    adapters: Mapping[str, Mapping[str, Adapter]]
    metadata: Callable[[int], dict[str, str]]
    dtype: torch.dtype

    def tensors(self) -> dict[str, Tensor]:
        """All adapter tensors by their names in the file, copied to the CPU, float32."""
        modules = AdapterFile.collect(self.parts, self.adapters).modules
        return {f"{module}.{name}": tensor for module, group in modules.items() for name, tensor in group.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put a checkpoint's tensors back into the live adapters. Raises RunError when names or shapes differ."""
        own = {
            f"{self.parts[part].file_name(path)}.{name}": tensor
            for part, group in self.adapters.items()
            for path, adapter in group.items()
            for name, tensor in adapter.tensors().items()
        }
        if own.keys() != tensors.keys() or any(own[name].shape != tensors[name].shape for name in own):
            raise RunError(
                "The checkpoint's adapter has other layers or another rank than this config asks for "
                f"({len(tensors)} tensors, {len(own)} expected). Resume with the config it was started with."
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])

    def write(self, path: Path, step: int) -> None:
        """Write the adapter and read it back. Raises RunError rather than write a NaN or an infinity."""
        AdapterFile.collect(self.parts, self.adapters, self.metadata(step)).write(path, dtype=self.dtype)


def write_model_card(path: Path, *, adapter: Path, base: str, prompt: str, rank: int, steps: int) -> None:
    """A README beside the adapter: what it is, how to use it here and in other tools."""
    contents = {
        adapter.name: "the adapter (safetensors, kohya names, alpha written)",
        "config.toml": "the settings; training it again repeats the run",
        "contact-sheet.png": "the same prompts at every stage of the training",
        "loss.png": "the loss by step",
    }
    table = "\n".join(f"| `{name}` | {what} |" for name, what in contents.items() if (path.parent / name).exists())
    write_text_atomically(
        path,
        f"""# {adapter.stem}

A rank-{rank} LoRA for Stable Diffusion, trained for {steps} steps on `{base}` with lora_diffusion.

| File | Content |
|---|---|
{table}

Use it, from the folder in which it was trained:

```
lora-diffusion generate --base {base} --adapter {adapter.as_posix()}:1.0 --prompt "{prompt}" --out pictures
```

In ComfyUI, Forge, A1111 or SD.Next copy `{adapter.name}` into the folder for LoRA files and use strength 1.0.
In diffusers: `pipeline.load_lora_weights("{adapter.parent.as_posix()}", weight_name="{adapter.name}")`.
""",
    )
