"""The base models to draw with: what family they are, and which sizes suit them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from lora_diffusion.captioning.find import is_hub_name
from lora_diffusion.container import read_header
from lora_diffusion.errors import UserError
from lora_diffusion.formats.families import FAMILY_WIDTHS
from webui.services.form_values import fields_from_toml
from webui.services.places import Places

Size = tuple[int, int]

SIZES: dict[str, tuple[Size, ...]] = {
    "sd1": ((512, 512), (512, 768), (768, 512), (640, 640), (512, 640), (640, 512)),
    "sd2": ((768, 768), (768, 1024), (1024, 768), (512, 512)),
    "sdxl": ((1024, 1024), (832, 1216), (1216, 832), (896, 1152), (1152, 896), (768, 1344), (1344, 768)),
}
MAX_RUNS = 200
_UNET = "model.diffusion_model."
_STEP_PX, _SDXL_STEP_PX = 64, 32
"""Of single files, whose UNets are those of the published models: SDXL's halves the picture once less."""


@dataclass(frozen=True)
class Base:
    """id: of Places, or of the hub. family: "" if the files do not tell. sizes: its own first."""

    id: str
    family: str
    sizes: tuple[Size, ...]

    @property
    def name(self) -> str:
        return Path(self.id).name.removesuffix(".safetensors")


def bases(places: Places) -> list[Base]:
    """Every base in the workspace, and those that its runs were trained on."""
    runs = list(places.workspace.run_folders())[-MAX_RUNS:]
    ids = dict.fromkeys([*places.models(), *filter(None, (base_of_run(places, folder) for folder in runs))])
    return [base_of(places, id) for id in ids]


def find_base(places: Places, id: str) -> Base:
    """Raises UserError for an id that names no base in the workspace, and none that the hub could have."""
    if is_hub_name(id, places.root):
        return base_of(places, id)
    path = places.resolve(id)
    if not _is_base(path):
        raise UserError(f"There is no base {id}. Put a diffusers folder or a .safetensors file into models/.")
    return base_of(places, places.id_of(path))


def base_of_run(places: Places, folder: Path) -> str:
    """The id of the base that a run was trained on; "" if its config names none that there is."""
    try:
        fields, _ = fields_from_toml((folder / "config.toml").read_text(encoding="utf-8"))
        id = fields.get("model.path", "")
        if is_hub_name(id, places.root):
            return id
        path = places.resolve(id)
    except (OSError, UserError, UnicodeDecodeError):
        return ""
    return places.id_of(path) if path != places.root.resolve() and _is_base(path) else ""


def bucket_step(places: Places, base: Base) -> int | None:
    """Pixels that the sides of its pictures are multiples of in training; None if the files do not tell."""
    blocks = [_config(places, base.id, part).get("block_out_channels") for part in ("unet", "vae")]
    halvings = [len(widths) - 1 for widths in blocks if isinstance(widths, list)]
    if len(halvings) == 2:
        return 2 ** sum(halvings)
    path = places.root / base.id
    tensors = read_header(path).tensors if path.suffix == ".safetensors" and path.is_file() else {}
    if f"{_UNET}input_blocks.0.0.weight" not in tensors:
        return None
    return _SDXL_STEP_PX if f"{_UNET}label_emb.0.0.weight" in tensors else _STEP_PX


def base_argument(root: Path, id: str) -> str:
    """What a command is given for a base, whatever folder it runs in: the whole path, or the id of the hub."""
    return id if is_hub_name(id, root) else str(root / id)


def base_of(places: Places, id: str) -> Base:
    unet, vae = _config(places, id, "unet"), _config(places, id, "vae")
    width = unet.get("cross_attention_dim")
    family = FAMILY_WIDTHS.get(width, "") if isinstance(width, int) else ""
    own = unet.get("sample_size")
    blocks = vae.get("block_out_channels")
    if isinstance(own, int) and isinstance(blocks, list):
        side = own * 2 ** (len(blocks) - 1)
        others = SIZES.get(family) or _around(side)
        return Base(id, family, tuple(dict.fromkeys([(side, side), *others])))
    return Base(id, family, SIZES.get(family) or (*SIZES["sd1"][:3], *SIZES["sdxl"][:3]))


def _around(side: int) -> tuple[Size, ...]:
    """Sizes for a base of no published family: the side, and half as much again in either direction."""
    return (side, side), (side, side * 3 // 2), (side * 3 // 2, side)


def _is_base(path: Path) -> bool:
    return (path / "model_index.json").is_file() or (path.is_file() and path.suffix == ".safetensors")


def _config(places: Places, id: str, part: str) -> dict[str, object]:
    """Of a base of the hub, what is in its cache: nobody is asked."""
    path = places.root / id / part / "config.json"
    if is_hub_name(id, places.root):
        found = try_to_load_from_cache(id, f"{part}/config.json")
        path = Path(found) if isinstance(found, str) else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
