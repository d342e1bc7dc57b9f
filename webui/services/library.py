"""The adapter files of the workspace: found, named as the engine names them, and told apart by their headers alone."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from lora_diffusion.container import MAX_HEADER_BYTES, read_header
from lora_diffusion.data.listing import IMAGE_SUFFIXES
from lora_diffusion.errors import UserError
from lora_diffusion.files import write_text_atomically
from lora_diffusion.formats.families import FAMILY_WIDTHS, family_of_metadata
from lora_diffusion.formats.layout import layout_of
from lora_diffusion.formats.metadata import frequent_tags
from lora_diffusion.generation.request import adapter_name
from lora_diffusion.jobs.release import step_of
from webui.services.places import Places

SUFFIX = ".safetensors"
KINDS = ("lora", "dora", "loha", "lokr")
MAX_FILES = 20_000
_VERSION = 1
_PARTS = (("dora_scale", "dora"), ("hada_w1_a", "loha"), ("lokr_w1", "lokr"), ("lora_down", "lora"), ("lora_A", "lora"))


@dataclass(frozen=True)
class Facts:
    """What a header says. error: why the file cannot be used, "" if it can."""

    family: str = ""
    kind: str = ""
    rank: str = ""
    title: str = ""
    trigger: str = ""
    tags: tuple[str, ...] = ()
    description: str = ""
    base: str = ""
    hash: str = ""
    has_thumbnail: bool = False
    error: str = ""


@dataclass(frozen=True)
class Adapter:
    """One file. id: of Places. name: what prompts call it. source: "library", "run" or "sample"."""

    id: str
    name: str
    path: Path
    size: int
    changed: float
    source: str
    facts: Facts
    run: str = ""
    step: int | None = None


@dataclass
class Library:
    """Reads each version of a file once, and keeps what it read in `cache` for the next start."""

    places: Places
    cache: Path
    _known: dict[str, tuple[int, int, Facts]] = field(default_factory=dict[str, tuple[int, int, Facts]])
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _listed: dict[str, Adapter] = field(default_factory=dict[str, Adapter])
    _is_loaded: bool = False

    def adapters(self) -> list[Adapter]:
        """All files, each with the name that the engine knows it by."""
        with self._lock:
            self._load()
            found, is_new = [], False
            taken: set[str] = set()
            for path, source in self._files():
                try:
                    status = path.stat()
                except OSError:
                    continue
                id = self._id_of(path)
                known = self._known.get(id)
                if known is None or known[:2] != (status.st_size, status.st_mtime_ns):
                    known = (status.st_size, status.st_mtime_ns, read_facts(path))
                    self._known[id] = known
                    is_new = True
                name = _free_name(adapter_name(path.name.removesuffix(SUFFIX)), taken)
                found.append(
                    Adapter(
                        id=id,
                        name=name,
                        path=path,
                        size=status.st_size,
                        changed=status.st_mtime,
                        source=source,
                        facts=known[2],
                        run=id.rpartition("/")[0] if source == "run" else "",
                        step=step_of(path) if source == "run" else None,
                    )
                )
            if is_new:
                self._save({adapter.id for adapter in found})
            self._listed = {adapter.id: adapter for adapter in found}
            return found

    def find(self, id: str) -> Adapter | None:
        """The adapter with that id; None if it is not in the library, whatever is there.

        A file that is as it was listed is not looked for among all others again: a page asks for a hundred pictures.
        """
        listed = self._listed.get(id)
        if listed is not None:
            try:
                status = listed.path.stat()
                if (status.st_size, status.st_mtime) == (listed.size, listed.changed):
                    return listed
            except OSError:
                pass  # it is gone
        return next((adapter for adapter in self.adapters() if adapter.id == id), None)

    def named(self, name: str) -> Adapter | None:
        """The adapter that prompts call `name`."""
        return next((adapter for adapter in self.adapters() if adapter.name == name), None)

    def folders(self) -> list[tuple[Path, str]]:
        """Where files are looked for, in the order in which names are given."""
        workspace = self.places.workspace
        return [
            (workspace.adapters, "library"),
            (workspace.runs, "run"),
            (workspace.samples / "adapters", "sample"),
        ]

    def _id_of(self, path: Path) -> str:
        """As Places does, which looks at each folder on the way again; `files_in` has done so, but for links."""
        text, root = path.as_posix(), f"{self.places.root.as_posix()}/"
        return text.removeprefix(root) if text.startswith(root) and not path.is_symlink() else self.places.id_of(path)

    def _files(self) -> Iterator[tuple[Path, str]]:
        number = 0
        for folder, source in self.folders():
            for path in files_in(folder, depth=2 if source == "run" else 12):
                number += 1
                if number > MAX_FILES:
                    return
                yield path, source

    def _load(self) -> None:
        if self._is_loaded:
            return
        self._is_loaded = True
        try:
            kept = json.loads(self.cache.read_text(encoding="utf-8"))
            if kept["version"] == _VERSION:
                for id, (size, changed, facts) in kept["files"].items():
                    self._known[id] = (size, changed, Facts(**{**facts, "tags": tuple(facts["tags"])}))
        except (OSError, ValueError, TypeError, KeyError):
            self._known.clear()

    def _save(self, ids: set[str]) -> None:
        for id in set(self._known) - ids:
            del self._known[id]
        files = {id: (size, changed, asdict(facts)) for id, (size, changed, facts) in self._known.items()}
        try:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(self.cache, json.dumps({"version": _VERSION, "files": files}))
        except OSError:
            pass  # the next start reads the files again


def files_in(folder: Path, depth: int) -> Iterator[Path]:
    """Adapter files in `folder` and at most `depth` levels of folders, in a fixed order; no link leads out of it."""
    root = folder.resolve()
    found: list[Path] = []
    for parent, folders, names in os.walk(root):
        here = Path(parent)
        level = len(here.relative_to(root).parts)
        folders[:] = [] if level >= depth - 1 else sorted(name for name in folders if name[0] not in "._")
        for name in names:
            path = here / name
            if name.endswith(SUFFIX) and not name.startswith("."):
                if path.is_symlink() and not path.resolve().is_relative_to(root):
                    continue
                found.append(path)
    return iter(sorted(found))


def read_facts(path: Path) -> Facts:
    """What the header says. A quick look: whether every tensor makes sense is checked when the file is used."""
    try:
        entries, metadata = _read_quickly(path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return Facts(error=_reason(path))
    names = "\n".join(entries)
    kind = next((kind for part, kind in _PARTS if part in names), "")
    if not kind:
        return Facts(error=_reason(path))
    return Facts(
        family=family_of_metadata(metadata) or _family_of_shapes(entries),
        kind=kind,
        rank=_rank(metadata, entries),
        title=metadata.get("modelspec.title", ""),
        trigger=metadata.get("modelspec.trigger_phrase", ""),
        tags=tags_of(metadata),
        description=metadata.get("modelspec.description", ""),
        base=metadata.get("ss_sd_model_name", ""),
        hash=metadata.get("sshs_model_hash", ""),
        has_thumbnail=metadata.get("modelspec.thumbnail", "").startswith("data:image/"),
    )


def tags_of(metadata: Mapping[str, str], limit: int = 12) -> tuple[str, ...]:
    """The tags that were given, or else the most frequent ones of the captions."""
    given = [tag.strip() for tag in metadata.get("modelspec.tags", "").split(",") if tag.strip()]
    if given:
        return tuple(given[:limit])
    return tuple(tag for tag in frequent_tags(metadata, limit) if len(tag) < 40)  # a longer one is a sentence


def matching(
    adapters: Sequence[Adapter], words: str, family: str = "", kind: str = "", source: str = "", tag: str = ""
) -> list[Adapter]:
    """Those that have all words in name, title, tags, triggers or description, and fit the filters ("" fits all)."""
    wanted = words.lower().split()
    return [
        adapter
        for adapter in adapters
        if (not family or adapter.facts.family == family)
        and (not kind or adapter.facts.kind == kind)
        and (not source or adapter.source == source)
        and (not tag or tag in adapter.facts.tags)
        and all(word in _searched(adapter) for word in wanted)
    ]


def tags_in(adapters: Sequence[Adapter], limit: int = 100) -> list[str]:
    """The tags of all files, those of most files first."""
    counts = Counter(tag for adapter in adapters for tag in adapter.facts.tags)
    return sorted(counts, key=lambda tag: (-counts[tag], tag.lower()))[:limit]


def picture_beside(adapter: Adapter) -> Path | None:
    """A picture that shows what the adapter does: a file of the same name, or its run's newest preview."""
    for stem in (adapter.path.stem, f"{adapter.path.stem}.preview"):
        for suffix in sorted(IMAGE_SUFFIXES):
            path = adapter.path.with_name(stem + suffix)
            if path.is_file():
                return path
    if adapter.source != "run":
        return None
    previews = sorted((adapter.path.parent / "previews").glob("[0-9]" * 6 + "-*.png"))
    if adapter.step is not None:
        previews = [path for path in previews if int(path.name[:6]) <= adapter.step] or previews
    last = [path for path in previews if path.name[:6] == previews[-1].name[:6]] if previews else []
    return last[0] if last else None


def _searched(adapter: Adapter) -> str:
    facts = adapter.facts
    return " ".join(
        (adapter.name, adapter.id, facts.title, facts.trigger, facts.description, facts.base, *facts.tags)
    ).lower()


def _free_name(stem: str, taken: set[str]) -> str:
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem} {number}", number + 1
    taken.add(name)
    return name


def _read_quickly(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The header's tensors and metadata. Raises something where it is not as it should be."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ValueError
        entries = orjson.loads(file.read(length))  # a header has hundreds of entries, a library thousands of files
    metadata = entries.pop("__metadata__", {})
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError
    if max((entry["data_offsets"][1] for entry in entries.values()), default=0) != size - 8 - length:
        raise ValueError
    return entries, metadata


def _reason(path: Path) -> str:
    """Why a file is no adapter, in the words of the strict reader, without the folder it lies in."""
    try:
        layout_of(path, read_header(path))
    except UserError as error:
        return str(error).replace(str(path), path.name)
    except (OSError, RecursionError, MemoryError) as error:
        return f"{path.name}: cannot be read ({error})."
    return f"{path.name}: of a kind that is not known here."


def _family_of_shapes(entries: Mapping[str, Any]) -> str:
    for key, entry in entries.items():
        if "attn2_to_k.lora_down" in key or "attn2.to_k.lora_A" in key:
            return FAMILY_WIDTHS.get(entry["shape"][-1], "")
    return ""


def _rank(metadata: Mapping[str, str], entries: Mapping[str, Any]) -> str:
    rank = metadata.get("ss_network_dim", "")
    if rank.isdecimal():
        return rank
    ranks = {entry["shape"][0] for key, entry in entries.items() if ".lora_down." in key or ".lora_A." in key}
    return str(max(ranks)) if ranks else ""
