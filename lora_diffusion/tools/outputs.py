"""What every tool asks before it writes: that the file it is told to write is not one it reads or one to keep."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from lora_diffusion.errors import UserError


def check_output(path: Path, inputs: Iterable[Path], *, overwrite: bool, ending: str = ".safetensors") -> None:
    """Raises UserError if `path` is one of `inputs`, also through a link, or exists and may not be replaced.

    ending: that the name must have, as programs list only such files.
    """
    for source in inputs:
        is_same_path = os.path.realpath(path) == os.path.realpath(source)
        if is_same_path or (path.exists() and source.exists() and path.samefile(source)):
            raise UserError(f"{path}: this is the input {source}, which is never overwritten. Choose another name.")
    if path.suffix != ending:
        raise UserError(f"{path}: the name should end in {ending}, by which programs find such files.")
    if path.exists() and not (overwrite and path.is_file()):
        remedy = "Choose another name, or add --overwrite." if path.is_file() else "It is no file; choose another name."
        raise UserError(f"{path}: there is something of this name already. {remedy}")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}. Make it first, or choose another place.")


def check_output_folder(path: Path, option: str = "--out") -> None:
    """Raises UserError if nothing can be written into the folder `path`, which may have to be made first."""
    nearest = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    if not nearest.is_dir():
        raise UserError(f"{option} {path}: {nearest} is a file, not a folder. Choose another name.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: {nearest} cannot be written to. Choose another place.")
