"""What `lora-diffusion generate` and `grid` say in words: adapters with strengths, sizes, pictures in a folder."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from lora_diffusion.errors import UserError
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.generation.engine import Engine
from lora_diffusion.generation.infotext import save_png, write_parameters
from lora_diffusion.generation.library import HASH_KEY
from lora_diffusion.generation.request import Request, adapter_name, check_file_name
from lora_diffusion.generation.sheet import Sheet, draw_cells
from lora_diffusion.models.load import load_model
from lora_diffusion.models.on_cpu import suit_to_cpu
from lora_diffusion.models.precision import DTYPES, resolve_precision
from lora_diffusion.progress import Track, silent

logger = logging.getLogger(__name__)


def parse_size(text: str) -> tuple[int, int]:
    """`512x768`: width and height in pixels. Raises UserError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,5})\s*[x×X*]\s*(\d{1,5})\s*", text)
    if not match:
        raise UserError(f"--size {text}: write width and height in pixels, as in 512x768.")
    return int(match[1]), int(match[2])


def write_pictures(
    base: str,
    adapters: Sequence[Path],
    requests: Sequence[Request],
    out: Path,
    *,
    precision: str = "auto",
    configs: Path | None = None,
    track: Track = silent,
) -> list[Path]:
    """Draw `requests` into the folder `out`, each with its settings in the PNG; returns the files in order.

    adapters: files, which requests know by their name without the ending. configs: see `load_model`. Pictures are
    numbered on from those that the folder has, also where another process draws into it. Raises UserError before
    anything is drawn if a request or a file is wrong.
    """
    engine, hashes = ready_engine(base, adapters, precision=precision, configs=configs, track=track)
    requests = [engine.complete(request) for request in requests]
    out.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(path.name[:5]) for path in out.glob("[0-9][0-9][0-9][0-9][0-9]-*.png")), default=-1)
    paths: list[Path] = []
    starts = range(0, len(requests), engine.batch_size)
    for start in track(starts, "drawing"):
        batch = requests[start : start + engine.batch_size]
        for request, image in zip(batch, engine.generate(batch), strict=True):
            text = write_parameters(request, base_name(base), hashes)
            number, path = _save_numbered(image, out, number, request.seed, text)
            paths.append(path)
            number += 1
    return paths


def _save_numbered(image: Image.Image, out: Path, number: int, seed: int, text: str) -> tuple[int, Path]:
    """Save under the first free name from `number` on; the number that it got, and the file."""
    while True:
        path = out / f"{number:05d}-{seed}.png"
        try:
            save_png(image, path, text, is_new=True)
        except FileExistsError:
            number += 1
        else:
            return number, path


def write_sheet(
    base: str,
    adapters: Sequence[Path],
    sheet: Sheet,
    out: Path,
    *,
    precision: str = "auto",
    configs: Path | None = None,
    track: Track = silent,
) -> None:
    """Draw `sheet` into the PNG `out`, with its settings inside.

    adapters: all files that its cells name. Raises UserError before anything is drawn if something is wrong.
    """
    cells = sheet.cells()
    engine, hashes = ready_engine(base, adapters, precision=precision, configs=configs, track=track)
    complete = replace(sheet, request=engine.complete(sheet.request))
    images: list[Image.Image | None] = [None] * len(cells)
    drawn = draw_cells(engine, cells)
    for _ in track(range(len(cells)), "drawing"):
        index, images[index] = next(drawn)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_png(complete.picture(images), out, complete.parameters(base_name(base), hashes))


def ready_engine(
    base: str, adapters: Sequence[Path], *, precision: str, configs: Path | None, track: Track
) -> tuple[Engine, dict[str, str]]:
    """The base with these files loaded under their names, and the hashes of those that have one."""
    for path in adapters:
        check_file_name(path)
    files = {adapter_name(path.stem): AdapterFile.read(path) for path in adapters}
    if len(files) < len(adapters):
        raise UserError("Two adapter files have the same name, so requests cannot tell them apart. Rename one of them.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_dtype(precision, device)
    engine = load_engine(base, dtype, device, configs=configs, track=track)
    for name, file in files.items():
        for note in engine.load_adapter(name, file):
            logger.warning("%s: %s", file.path, note)
    return engine, {name: file.metadata[HASH_KEY] for name, file in files.items() if HASH_KEY in file.metadata}


def load_engine(
    base: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    configs: Path | None = None,
    batch_size: int = 8,
    track: Track = silent,
) -> Engine:
    """The base without adapters, in the form that draws fastest. configs: see `load_model`."""
    model = load_model(base, configs=configs, dtype=dtype, device=device, track=track)
    if device.type == "cpu":
        suit_to_cpu(model.unet, model.num_latent_pixels(model.default_size), track, needs_gradients=False)
    return Engine(model, batch_size=batch_size)


def base_name(base: str) -> str:
    """What pictures say they were drawn with: the last step of a path or hub id."""
    return Path(base).name.removesuffix(".safetensors")


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What "auto", "fp32", "fp16" or "bf16" is on this device. Raises UserError."""
    names = ("auto", *DTYPES)
    if precision not in names:
        raise UserError(f"--precision {precision}: use {', '.join(names)}.")
    return resolve_precision(precision, device, f"--precision {precision}")
