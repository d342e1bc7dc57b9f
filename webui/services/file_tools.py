"""The command-line tools on adapter files, run as processes: they load torch, the web UI does not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_diffusion.container import header_bytes, read_header, with_metadata
from lora_diffusion.errors import UserError
from lora_diffusion.files import write_bytes_atomically
from lora_diffusion.formats.metadata import legacy_hash
from lora_diffusion.generation.request import check_adapter_name
from lora_diffusion.workspace import Workspace
from webui.services.library import SUFFIX, Adapter

TIMEOUT_S = 1800
PREVIEWS = "_preview"
"""Folder in the library with merged files that are looked at before they are saved. Lists leave it out."""

_PACKAGE_PARENT = Path(__file__).resolve().parents[2]
_PROGRESS = re.compile(r".*[━╸╺].*\n?")


class ToolError(UserError):
    """A tool refused, in its own words."""


@dataclass
class FileTools:
    """Each file is measured once per version."""

    workspace: Workspace
    _measured: dict[tuple[str, int, float], dict[str, Any]] = field(
        default_factory=dict[tuple[str, int, float], dict[str, Any]]
    )

    @property
    def previews(self) -> Path:
        return self.workspace.adapters / PREVIEWS

    def inspect(self, adapter: Adapter) -> dict[str, Any]:
        """What `inspect --json` tells."""
        key = (adapter.id, adapter.size, adapter.changed)
        if key not in self._measured:
            self._measured[key] = json.loads(self._run("inspect", str(adapter.path), "--json"))
        return self._measured[key]

    def overlap(self, adapters: Sequence[Adapter]) -> dict[str, Any]:
        """What `overlap --json` tells."""
        return json.loads(self._run("overlap", *(str(adapter.path) for adapter in adapters), "--json"))

    def convert(self, adapter: Adapter, name: str, format: str, precision: str) -> tuple[Path, str]:
        """The new file, and what the tool said."""
        target = self.target(name)
        options = ("--format", format, "--precision", precision)
        return target, self._run("convert", str(adapter.path), str(target), *options)

    def resize(self, adapter: Adapter, name: str, rank: int | None, energy: float | None) -> tuple[Path, str]:
        target = self.target(name)
        limit = ("--energy", str(energy)) if energy is not None else ("--rank", str(rank))
        return target, self._run("resize", str(adapter.path), str(target), *limit)

    def merge(
        self, weights: Mapping[Path, float], target: Path, method: str, rank: int | None, base: Path | None
    ) -> str:
        files = [f"{path}:{weight:g}" for path, weight in weights.items()]
        options = [
            "--method",
            method,
            *(("--rank", str(rank)) if rank else ()),
            *(("--base", str(base)) if base else ()),
        ]
        return self._run("merge", *files, "--out", str(target), *options)

    def bake(self, weights: Mapping[Path, float], base: Path, name: str) -> tuple[Path, str]:
        """A new base in models/, of the form that the base has."""
        ending = base.suffix if base.is_file() else ""
        target = self.workspace.models / f"{checked_name(name)}{ending}"
        if target.exists():
            raise ToolError(f"models/{target.name} is there already. Choose another name.")
        target.parent.mkdir(parents=True, exist_ok=True)
        files = [argument for path, weight in weights.items() for argument in ("--adapter", f"{path}:{weight:g}")]
        return target, self._run("bake", "--base", str(base), *files, "--out", str(target))

    def target(self, name: str) -> Path:
        """Where a new adapter of that name goes. Raises ToolError if there is one."""
        self.workspace.adapters.mkdir(parents=True, exist_ok=True)
        target = self.workspace.adapters / f"{checked_name(name)}{SUFFIX}"
        if target.exists():
            raise ToolError(f"adapters/{target.name} is there already. Choose another name.")
        return target

    def preview_file(self, token: str, needed: Container[str] = ()) -> Path:
        """Where a merged file is written that is to be looked at; earlier ones go, but not those of a `needed` name."""
        self.previews.mkdir(parents=True, exist_ok=True)
        for old in self.previews.glob(f"*{SUFFIX}"):
            if old.stem not in needed:
                old.unlink(missing_ok=True)
        return self.previews / f"merge preview {token}{SUFFIX}"

    def keep_preview(self, previewed: Path, target: Path) -> None:
        """Make a previewed file the adapter `target`, as if it had been merged under that name."""
        data, header = previewed.read_bytes(), read_header(previewed)
        metadata = {**header.metadata, "ss_output_name": target.stem, "modelspec.title": target.stem}
        kept = {key: text for key, text in metadata.items() if key.startswith("ss_")}
        pieces = [memoryview(data)[header.data_start :]]
        metadata["sshs_legacy_hash"] = legacy_hash(header_bytes(header.tensors, kept), pieces)
        write_bytes_atomically(target, with_metadata(data, metadata))
        previewed.unlink()

    def _run(self, *arguments: str) -> str:
        """Standard output. Raises ToolError with the message of the tool."""
        paths = [str(_PACKAGE_PARENT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path), "COLUMNS": "100"}
        environment |= {"PYTHONSAFEPATH": "1", "NO_COLOR": "1"}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "lora_diffusion", *arguments],
                cwd=self.workspace.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise ToolError(f"`{arguments[0]}` was ended after {TIMEOUT_S // 60} minutes.") from None
        if done.returncode != 0:
            message = _PROGRESS.sub("", done.stderr).strip() or f"`{arguments[0]}` ended with {done.returncode}."
            raise ToolError(message.replace(f"{self.workspace.root}{os.sep}", "")[-2000:])
        return _PROGRESS.sub("", done.stdout).replace(f"{self.workspace.root}{os.sep}", "").strip()


def checked_name(name: str) -> str:
    """A name for a new file: no path, nothing hidden, usable in prompts. Raises UserError."""
    name = name.strip().removesuffix(SUFFIX)
    if not name or len(name) > 100 or "/" in name or "\\" in name or name.startswith(".") or name == PREVIEWS:
        raise ToolError("Give the new file a name: letters, digits and spaces, without / and no dot in front.")
    return check_adapter_name(name)
