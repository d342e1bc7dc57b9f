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
from lora_diffusion.formats.layout import Format


@dataclass(frozen=True)
class Exporter:
    """The live adapters under their exchange names.

    parts: the model's components, of a model of `family`. adapters: part → dotted path → adapter. metadata: a
    function of the step.
    """

    parts: Mapping[str, FilePart]
    adapters: Mapping[str, Mapping[str, Adapter]]
    metadata: Callable[[int], dict[str, str]]
    dtype: torch.dtype
    family: str = ""
    format: Format = "kohya"

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the adapters, by module and parameter name, copied to the CPU."""
        return {name: tensor.cpu().clone() for name, tensor in self._live().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put a checkpoint's tensors back into the live adapters. Raises RunError when names or shapes differ."""
        own = self._live()
        # Checkpoints of version 0.1 also hold alpha, which the config decides.
        saved = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
        if own.keys() != saved.keys() or any(own[name].shape != saved[name].shape for name in own):
            raise RunError(
                "The checkpoint's adapter has other layers or another rank than this config asks for "
                f"({len(saved)} tensors, {len(own)} expected). Resume with the config it was started with."
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])

    def write(self, path: Path, step: int) -> None:
        """Write the adapter and read it back. Raises RunError rather than write a NaN or an infinity."""
        file = AdapterFile.collect(self.parts, self.adapters, self.metadata(step), family=self.family)
        file.write(path, format=self.format, dtype=self.dtype)

    def _live(self) -> dict[str, Tensor]:
        return {
            f"{self.parts[part].file_name(path)}.{name}": tensor
            for part, group in self.adapters.items()
            for path, adapter in group.items()
            for name, tensor in adapter.state().items()
        }


def write_model_card(
    path: Path, *, adapter: Path, base: str, prompt: str, kind: str, rank: int, steps: int, readers: str
) -> None:
    """A README beside the adapter: what it is, how to use it here and in other tools."""
    contents = {
        adapter.name: "the adapter (safetensors, alpha written)",
        "config.toml": "the settings; training it again repeats the run",
        "contact-sheet.png": "the same prompts at every stage of the training",
        "loss.png": "the loss by step",
    }
    table = "\n".join(f"| `{name}` | {what} |" for name, what in contents.items() if (path.parent / name).exists())
    write_text_atomically(
        path,
        f"""# {adapter.stem}

A rank-{rank} {kind} for Stable Diffusion, trained for {steps} steps on `{base}` with lora_diffusion.

| File | Content |
|---|---|
{table}

Use it, from the folder in which it was trained:

```
lora-diffusion generate --base {base} --adapter {adapter.as_posix()}:1.0 --prompt "{prompt}" --out pictures
```

{readers}
""",
    )
