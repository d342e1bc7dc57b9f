"""The folder that the web UI, the queue and the engine work in: where everything is, and where they look for files.

Nothing imports torch. What is private to the programs lies in `.lora-diffusion/` and may be deleted while none runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PRIVATE = ".lora-diffusion"


@dataclass(frozen=True)
class Workspace:
    """root: an existing folder, usually the one the program was started in."""

    root: Path

    @property
    def runs(self) -> Path:
        """One run folder each."""
        return self.root / "runs"

    @property
    def adapters(self) -> Path:
        """The user's library: adapter files from anywhere, in any subfolders."""
        return self.root / "adapters"

    @property
    def datasets(self) -> Path:
        return self.root / "data"

    @property
    def models(self) -> Path:
        """Base models: diffusers folders and single files."""
        return self.root / "models"

    @property
    def pictures(self) -> Path:
        """What was generated."""
        return self.root / "pictures"

    @property
    def samples(self) -> Path:
        """The base, data sets and adapters that ship, where the root is a checkout of the project."""
        return self.root / "samples"

    @property
    def private(self) -> Path:
        return self.root / PRIVATE

    @property
    def queue(self) -> Path:
        """SQLite database of the runs that wait, run and ended."""
        return self.private / "queue.sqlite"

    @property
    def thumbnails(self) -> Path:
        return self.private / "thumbnails"

    def lock(self, name: str) -> Path:
        """The lock file of "runner", "engine" or a device such as "cpu" or "cuda-0"."""
        return self.private / f"{name}.lock"

    def run_folders(self) -> Iterator[Path]:
        """Folders of runs, those started from a terminal included."""
        if self.runs.is_dir():
            yield from sorted(path for path in self.runs.iterdir() if (path / "state.json").is_file())
