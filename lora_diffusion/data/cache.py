"""Latents and text embeddings, computed once and kept under a hash of everything that they depend on.

Changing a picture, its bucket, the VAE or the resize filter changes the key, so an entry is never out of date. Each
file holds a checksum; a damaged one is computed again. The folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.data.captions import printable
from lora_diffusion.data.errors import DataError
from lora_diffusion.data.folder import Sample
from lora_diffusion.data.images import FILTER_VERSION, WHITE, Colour, ImageError, open_image, quiet_pillow, to_pixels
from lora_diffusion.data.tensor_store import LAYOUT_VERSION, TensorStore
from lora_diffusion.errors import RunError
from lora_diffusion.progress import Track, silent

TEXT_LAYOUT_VERSION = 2
READ_BYTES = 128 * 2**20
"""Entries that can be read from disk again stay in memory up to this size in all, however large the data set is."""

ENCODED_BYTES = 2 * 2**30
"""The same for embeddings that would have to be computed again."""

_MAX_THREADS = 4

EncodeImages = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(B, 3, H, W) in [-1, 1] -> mean and standard deviation of the latents, each (B, C, h, w)."""

TextEntry = dict[str, Tensor]
"""What the model is told of one caption: {"hidden": (T, D)}, and {"pooled": (P,)} for families that have it."""

EncodeTexts = Callable[[list[str]], Mapping[str, Tensor]]
"""Captions -> the tensors of `TextEntry`, with a batch dimension in front."""


@dataclass(frozen=True)
class CacheReport:
    """hits: entries found on disk. built: new ones. rebuilt: found damaged and computed again."""

    hits: int
    built: int
    rebuilt: int

    def __str__(self) -> str:
        return f"{self.hits} found, {self.built} computed, {self.rebuilt} were damaged and computed again"


class LatentCache:
    """The latents of a data set's pictures. Pickled copies, as data loader workers may get them, only read."""

    def __init__(
        self,
        folder: Path | None,
        encoder_id: str,
        encode: EncodeImages,
        *,
        background: Colour = WHITE,
        memory_bytes: int = READ_BYTES,
    ) -> None:
        """folder: None keeps everything in memory. encoder_id: changes whenever `encode` would give other numbers.
        background: what shows through the transparent parts of pictures. memory_bytes: for latents that are on disk
        too; those that are not are all kept.
        """
        self._store = TensorStore(folder / "latents" if folder else None)
        self._encoder_id = encoder_id
        self._encode: EncodeImages | None = encode
        self._background = background
        self._memory: dict[str, tuple[Tensor, Tensor]] = {}
        self._free_bytes = memory_bytes

    def fill(self, samples: Sequence[Sample], *, flips: bool, batch_size: int, track: Track = silent) -> CacheReport:
        """Make sure that every picture, and with `flips` its mirror image, has an entry.

        Raises DataError when a picture changed since it was scanned, RunError when the encoder gives NaN.
        """
        wanted: dict[Sample, list[bool]] = {}
        seen: set[str] = set()
        hits = rebuilt = built = 0
        with self._store.checked() as is_whole:
            for sample in track(samples, "Reading latents"):
                for flipped in (False, True) if flips else (False,):
                    key = self.key(sample, flipped)
                    if key in seen:
                        continue
                    seen.add(key)
                    if key in self._memory or is_whole(key):
                        hits += 1
                        continue
                    was_damaged = self._store.has(key)
                    rebuilt, built = rebuilt + was_damaged, built + (not was_damaged)
                    wanted.setdefault(sample, []).append(flipped)
            self._build(wanted, batch_size, track)
        return CacheReport(hits, built, rebuilt)

    def get(self, sample: Sample, flipped: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents' distribution, float32, each (C, h, w). Do not change them.

        An entry that was damaged on disk after `fill` is computed again; in a data loader worker that is a RunError.
        """
        key = self.key(sample, flipped)
        if key in self._memory:
            return self._memory[key]
        if (tensors := self._store.load(key)) is not None:
            entry = (tensors["mean"], tensors["std"])
            self._remember(key, entry)
            return entry
        if self._encode is None:
            raise RunError(
                f"{printable(str(sample.image))}: its cached latents are missing or damaged, and a data loader worker "
                "cannot compute them. Start the run again; it will mend the cache."
            )
        return self._build({sample: [flipped]}, 1, silent)[key]

    def only_read(self) -> None:
        """From now on nothing is encoded, as in a data loader worker: one that was forked cannot use a GPU."""
        self._encode = None

    def key(self, sample: Sample, flipped: bool) -> str:
        """The entry's name: a hash of all that its numbers depend on."""
        picture = [sample.content, sample.fit, sample.bucket, flipped, self._background]
        return _hash(["latents", LAYOUT_VERSION, FILTER_VERSION, self._encoder_id, *picture])

    def _build(
        self, wanted: Mapping[Sample, Sequence[bool]], batch_size: int, track: Track
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Encode and store; what cannot be stored is remembered. Returns the last batch's entries by key.

        Small entries kept here would lie between the large pieces that encoding takes and gives back, and so keep the
        system from getting those back: 60 kB of memory for each entry of 8 kB.
        """
        last: dict[str, tuple[Tensor, Tensor]] = {}
        for batch, pixels in self._pixel_batches(wanted, batch_size, track):
            last = {}
            for flipped in (False, True):
                rows = [row for row, sample in enumerate(batch) if flipped in wanted[sample]]
                if rows:
                    chosen = pixels[rows].flip(-1) if flipped else pixels[rows]
                    last |= self._encode_batch([batch[row] for row in rows], chosen, flipped)
            for key, (mean, std) in last.items():
                if not self._store.save(key, {"mean": mean, "std": std}):
                    self._memory[key] = (mean, std)
        return last

    def _encode_batch(
        self, samples: Sequence[Sample], pixels: Tensor, flipped: bool
    ) -> dict[str, tuple[Tensor, Tensor]]:
        assert self._encode is not None
        with torch.no_grad():
            mean, std = (tensor.to("cpu", torch.float32).contiguous() for tensor in self._encode(pixels))
        entries: dict[str, tuple[Tensor, Tensor]] = {}
        for row, sample in enumerate(samples):
            if not (mean[row].isfinite().all() and std[row].isfinite().all()):
                raise RunError(
                    f"{printable(str(sample.image))}: the VAE gives NaN or infinity for this picture. Remove the "
                    "picture if it is the only one, or try another VAE."
                )
            entries[self.key(sample, flipped)] = (mean[row].clone(), std[row].clone())
        return entries

    def _pixel_batches(
        self, samples: Mapping[Sample, object], batch_size: int, track: Track
    ) -> Iterator[tuple[list[Sample], Tensor]]:
        """Batches of one bucket with their pixels (B, 3, H, W); the next one is decoded while this one is used."""
        by_bucket: dict[object, list[Sample]] = {}
        for sample in samples:
            by_bucket.setdefault(sample.bucket, []).append(sample)
        batches = [group[i : i + batch_size] for group in by_bucket.values() for i in range(0, len(group), batch_size)]
        with quiet_pillow(), ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:

            def submit(index: int) -> list[Future[Tensor]]:
                return [pool.submit(self._pixels, sample) for sample in batches[index]] if index < len(batches) else []

            ahead = submit(0)
            for index, batch in enumerate(track(batches, "Encoding images")):
                decoded, ahead = ahead, submit(index + 1)
                yield batch, torch.stack([future.result() for future in decoded])

    def _pixels(self, sample: Sample) -> Tensor:
        try:
            image = open_image(sample.image, self._background, content=sample.content)
        except ImageError as error:
            raise DataError(f"{printable(str(sample.image))}: {error}. Mend or remove it and start again.") from None
        return to_pixels(image, sample.fit, sample.bucket)

    def _remember(self, key: str, entry: tuple[Tensor, Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in entry)
        if size <= self._free_bytes:
            self._memory[key] = entry
            self._free_bytes -= size

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_encode": None}


class TextCache:
    """Embeddings of captions. Those given to `fill` are kept on disk; captions varied at random are not."""

    def __init__(
        self,
        folder: Path | None,
        encoder_id: str,
        encode: EncodeTexts,
        *,
        memory_bytes: int = ENCODED_BYTES,
        read_bytes: int = READ_BYTES,
    ) -> None:
        """folder: None keeps embeddings in memory only. encoder_id: changes whenever `encode` gives other numbers.
        memory_bytes: for embeddings that are not on disk. read_bytes: for those that are.
        """
        self._store = TensorStore(folder / "texts" if folder else None)
        self._encoder_id = encoder_id
        self._encode: EncodeTexts | None = encode
        self._encoded = _Recent(memory_bytes)
        self._read = _Recent(read_bytes)

    def fill(self, captions: Sequence[str], batch_size: int, track: Track = silent) -> CacheReport:
        """Make sure that every caption has an entry."""
        missing: list[str] = []
        hits = rebuilt = 0
        with self._store.checked() as is_whole:
            for caption in dict.fromkeys(captions):
                key = self.key(caption)
                if key in self._read or key in self._encoded or is_whole(key):
                    hits += 1
                else:
                    rebuilt += self._store.has(key)
                    missing.append(caption)
            batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
            for batch in track(batches, "Encoding captions"):
                for caption, entry in zip(batch, self._encode_batch(batch), strict=True):
                    key = self.key(caption)
                    if not self._store.save(key, entry):
                        self._encoded.put(key, entry)
        return CacheReport(hits, len(missing) - rebuilt, rebuilt)

    def get(self, caption: str) -> TextEntry:
        """The caption's tensors, float32. Encoded if need be, except in a data loader worker (RunError)."""
        if (found := self._find(caption)) is not None:
            return found
        if self._encode is None:
            raise RunError(f"The caption {caption[:80]!r} is not cached, and a data loader worker cannot encode it.")
        entry = self._encode_batch([caption])[0]
        self._encoded.put(self.key(caption), entry)
        return entry

    def key(self, caption: str) -> str:
        """The entry's name: a hash of all that its numbers depend on."""
        return _hash(["texts", TEXT_LAYOUT_VERSION, self._encoder_id, caption])

    def _find(self, caption: str) -> TextEntry | None:
        key = self.key(caption)
        for memory in (self._encoded, self._read):
            if (entry := memory.get(key)) is not None:
                return entry
        if (tensors := self._store.load(key)) is not None:
            self._read.put(key, tensors)
        return tensors

    def _encode_batch(self, captions: list[str]) -> list[TextEntry]:
        assert self._encode is not None
        with torch.no_grad():
            tensors = {name: t.to("cpu", torch.float32).contiguous() for name, t in self._encode(captions).items()}
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise RunError(f"The text encoder gives NaN or infinity for one of {captions!r:.200}.")
        return [{name: tensor[row].clone() for name, tensor in tensors.items()} for row in range(len(captions))]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_encode": None}


class _Recent:
    """The entries used last, up to `budget` bytes in all; always one."""

    def __init__(self, budget: int) -> None:
        self._entries: OrderedDict[str, TextEntry] = OrderedDict()  # least recently used first
        self._free_bytes = budget

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def get(self, key: str) -> TextEntry | None:
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: str, entry: TextEntry) -> None:
        self._entries[key] = entry
        self._free_bytes -= _num_bytes(entry)
        while self._free_bytes < 0 and len(self._entries) > 1:
            self._free_bytes += _num_bytes(self._entries.popitem(last=False)[1])


def _num_bytes(entry: TextEntry) -> int:
    return sum(tensor.nbytes for tensor in entry.values())


def _hash(parts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
