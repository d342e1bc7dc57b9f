"""Where the web UI may look: the workspace's root and folders that were allowed at the start. Nothing else is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.config import TrainConfig
from lora_diffusion.config_errors import KeyPath, Problem
from lora_diffusion.data.listing import find_files, is_image_name
from lora_diffusion.errors import UserError
from lora_diffusion.workspace import PRIVATE, Workspace

MAX_SUGGESTIONS = 200
MAX_FILES = 20_000
"""How many files of a folder are looked at to see what is in it."""


class OutsideError(UserError):
    """A path that leads out of the folders that the web UI may use."""


@dataclass(frozen=True)
class Places:
    """also: further folders that may be used, such as a disk of data sets. All are absolute."""

    workspace: Workspace
    also: tuple[Path, ...] = ()

    @property
    def root(self) -> Path:
        return self.workspace.root

    def resolve(self, text: str) -> Path:
        """The real path that `text` means from the root. Raises OutsideError where it, or a link on it, leads out."""
        try:
            path = (self.root / Path(text).expanduser()).resolve()
        except (ValueError, OSError, RuntimeError):
            raise OutsideError("This is not a path.") from None
        private = self.root.resolve() / PRIVATE
        if not any(path.is_relative_to(folder.resolve()) for folder in (self.root, *self.also)) or (
            path.is_relative_to(private)
        ):
            raise OutsideError(
                f"{text} is outside of {self.root}. Move it there, or start the web UI with --root or --allow."
            )
        return path

    def id_of(self, path: Path) -> str:
        """What names a file or folder in addresses: its path from the root, or the whole one in an allowed folder."""
        real = path.resolve()
        root = self.root.resolve()
        return (real.relative_to(root) if real.is_relative_to(root) else real).as_posix()

    def problems_of(self, config: TrainConfig) -> list[Problem]:
        """Paths of a config that lead out."""
        problems: dict[KeyPath, Problem] = {}
        for key, text in _paths_of(config):
            try:
                self.resolve(text)
            except OutsideError as error:
                problems[key] = Problem(key, f"`{'.'.join(map(str, key))}`: {error}")
        return list(problems.values())

    def datasets(self) -> list[str]:
        """Folders with pictures, to choose from."""
        folders = (self.workspace.datasets, self.workspace.samples, *self.also)
        found = (folder for parent in folders for folder in _folders(parent) if has_pictures(folder))
        return [self.id_of(folder) for folder, _ in zip(found, range(MAX_SUGGESTIONS), strict=False)]

    def models(self) -> list[str]:
        """Bases on this machine, to choose from."""
        candidates = [*_children(self.workspace.models), *_children(self.workspace.samples)]
        found = [path for path in candidates if (path / "model_index.json").is_file() or path.suffix == ".safetensors"]
        return [self.id_of(path) for path in found if path.parent != self.workspace.samples or path.is_dir()]


def has_pictures(folder: Path) -> bool:
    """Whether the trainer finds pictures in `folder` or its subfolders."""
    try:
        return any(map(is_image_name, find_files(folder, MAX_FILES)))
    except (OSError, UserError):
        return False


def _paths_of(config: TrainConfig) -> Iterator[tuple[KeyPath, str]]:
    yield ("run", "output"), str(config.run.output)
    yield ("model", "path"), config.model.path
    if config.model.configs:
        yield ("model", "configs"), str(config.model.configs)
    if config.cache.enabled:
        yield ("cache", "folder"), str(config.cache.folder)
    if config.adapter.start_from:
        yield ("adapter", "start_from"), str(config.adapter.start_from)
    for index, merged in enumerate(config.model.merge):
        yield ("model", "merge", index), merged
        yield ("model", "merge", index), merged.rpartition(":")[0]  # the file, unless the colon is part of its name
    for index, dataset in enumerate(config.dataset):
        yield ("dataset", index, "path"), str(dataset.path)


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError:
        return []


def _folders(parent: Path) -> Iterator[Path]:
    """Folders in `parent`, two levels deep."""
    for child in _children(parent):
        if child.is_dir():
            yield child
            yield from (path for path in _children(child) if path.is_dir())
