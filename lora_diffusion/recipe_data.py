"""From a config to what is trained on: scanned pictures, batches, filled caches."""

from __future__ import annotations

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lora_diffusion.config import DatasetConfig, TrainConfig
from lora_diffusion.data.batches import BatchList
from lora_diffusion.data.buckets import Bucket, Size, make_buckets
from lora_diffusion.data.cache import LatentCache, TextCache
from lora_diffusion.data.captions import CaptionOptions, vary_caption
from lora_diffusion.data.folder import Sample, Scan, picture_facts, scan_folder
from lora_diffusion.errors import UserError
from lora_diffusion.models.base import DiffusionModel
from lora_diffusion.progress import Track
from lora_diffusion.training.validation import split_validation

logger = logging.getLogger(__name__)

_UNUSED = random.Random(0)  # where nothing is left to chance, nothing is drawn


@dataclass(frozen=True)
class TrainingSet:
    """The scanned pictures of all data set tables and how they fall into batches."""

    scans: tuple[Scan, ...]
    training: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    batches: BatchList

    @property
    def largest(self) -> Bucket:
        """The size with the most pixels that is trained on."""
        return max((sample.bucket for sample in self.training), key=lambda bucket: bucket.width * bucket.height)

    def pixels_at_once(self, model: DiffusionModel, batch_size: int) -> int:
        """Of the latents of the largest batch."""
        return model.num_latent_pixels(self.largest) * batch_size

    @property
    def fingerprint(self) -> dict[str, str]:
        """Sample id → caption: what a resume compares. Pictures are part of their id."""
        return {sample.id: sample.caption for sample in self.training}


def read_training_set(
    config: TrainConfig, model: DiffusionModel, num_processes: int, track: Track, *, writes: bool = True
) -> TrainingSet:
    """Scan every data set table, hold out validation pictures, list the batches.

    writes: whether to remember in the cache folder which pictures have been read.
    """
    memory = Path(config.cache.folder) / "pictures" if config.cache.enabled else None
    scans = tuple(
        scan_folder(
            Path(table.path),
            buckets=buckets_of(table, model),
            repeats=table.repeats,
            default_caption=table.default_caption,
            source=index,
            facts=picture_facts(memory, Path(table.path), is_kept=writes),
            track=track,
        )
        for index, table in enumerate(config.dataset)
    )
    samples = [sample for scan in scans for sample in scan.samples]
    fraction = config.validation.fraction if config.validation.every else 0.0
    training, validation = split_validation(samples, fraction, config.run.seed)
    if fraction and not validation:
        logger.warning(
            "validation.every is %d, but no picture can be kept out to measure on: there is only one. Add pictures, "
            "or set validation.every = 0.", config.validation.every,
        )  # fmt: skip
    training, validation = _told_apart(training), _told_apart(validation)
    options = [caption_options(table) for table in config.dataset]
    validation = [replace(s, caption=_plain_caption(s.caption, options[s.source])) for s in validation]
    batches = BatchList(
        buckets=[sample.bucket for sample in training],
        ids=[sample.id for sample in training],
        repeats=[sample.repeats for sample in training],
        batch_size=config.run.batch_size * num_processes,
        seed=config.run.seed,
    )
    return TrainingSet(scans, tuple(training), tuple(validation), batches)


def _told_apart(samples: Iterable[Sample]) -> list[Sample]:
    """The samples, each with an id of its own: what is drawn for a picture in two tables differs from one to the other.

    Only after validation pictures are held out, which goes by the picture: no copy of one may be trained on.
    """
    seen: Counter[str] = Counter()
    told: list[Sample] = []
    for sample in samples:
        earlier = seen[sample.id]
        seen[sample.id] += 1
        id = hashlib.sha256(f"{sample.id}\0{earlier}".encode()).hexdigest()[:16] if earlier else sample.id
        told.append(replace(sample, id=id))
    return told


def buckets_of(table: DatasetConfig, model: DiffusionModel) -> tuple[Bucket, ...]:
    """The sizes that this table's pictures are trained at, in pixels."""
    width, height = table.resolution if isinstance(table.resolution, tuple) else (table.resolution,) * 2
    step = model.resolution_step if table.bucket_step == "auto" else table.bucket_step
    if step % model.resolution_step or min(width, height) < step:
        raise UserError(
            f"[[dataset]] path = {str(table.path)!r}: resolution {width}x{height} with bucket_step {step} does not "
            f"fit this model, whose picture sides are multiples of {model.resolution_step} px."
        )
    if not table.buckets:
        size = Size(width // step * step, height // step * step)
        if size != (width, height):
            logger.warning(
                "[[dataset]] path = %r: resolution %dx%d is trained at %dx%d, as sides are multiples of %d px. "
                "Set it to that, or to %dx%d.",
                str(table.path), width, height, *size, step, -(-width // step) * step, -(-height // step) * step,
            )  # fmt: skip
        return (size,)
    return make_buckets(
        Size(width, height),
        min_side=table.bucket_min or max(step, min(width, height) // 2),
        max_side=table.bucket_max or max(width, height) * 2,
        step=step,
    )


class SharedBase:
    """A loaded base and its caches: trainings that share it encode a picture or a caption once and hold it once."""

    def __init__(self, model: DiffusionModel, num_trainings: int = 1) -> None:
        """num_trainings: how many take their steps together on it."""
        self.model = model
        self.num_trainings = num_trainings
        self._latents: dict[Path | None, LatentCache] = {}
        self._texts: dict[tuple[Path | None, int, int], TextCache] = {}

    def latents(self, folder: Path | None) -> LatentCache:
        """folder: None keeps the entries in memory only."""
        if folder not in self._latents:
            self._latents[folder] = LatentCache(folder, self.model.vae_id, self.model.encode_image)
        return self._latents[folder]

    def texts(self, folder: Path | None, clip_skip: int, chunks: int) -> TextCache:
        """Of encodings that are read `clip_skip` layers from the end, with this many chunks of tokens."""

        def encode(captions: Sequence[str]) -> dict[str, torch.Tensor]:
            with torch.no_grad():
                return self.model.encode_text(captions, clip_skip=clip_skip, chunks=chunks).texts()

        key = (folder, clip_skip, chunks)
        if key not in self._texts:
            name = f"{self.model.text_encoder_id}-skip{clip_skip}-chunks{chunks}"
            self._texts[key] = TextCache(folder, name, encode)
        return self._texts[key]


def fill_caches(
    config: TrainConfig, base: SharedBase, data: TrainingSet, track: Track
) -> tuple[LatentCache, TextCache]:
    """Encode what is not cached yet. Captions that chance makes are encoded when they come up."""
    folder = Path(config.cache.folder) if config.cache.enabled else None
    latents = base.latents(folder)
    for flips in (False, True):
        samples = [sample for sample in data.training if config.dataset[sample.source].flip == flips]
        samples += data.validation if not flips else ()  # validation never mirrors
        if samples:
            report = latents.fill(samples, flips=flips, batch_size=latent_batch_size(data), track=track)
            logger.info("latents%s: %s", " and mirror images" if flips else "", report)
    text = base.texts(folder, config.model.clip_skip, config.model.max_tokens // 75)
    if not config.adapter.text_encoder:
        text.fill(_first_captions(config, data), batch_size=16, track=track)
    return latents, text


def latent_batch_size(data: TrainingSet) -> int:
    """Pictures that the VAE encodes at once: four of 512 x 512 px, and fewer of larger ones, which take much memory."""
    largest = max(sample.bucket.width * sample.bucket.height for sample in data.training)
    return min(4, max(1, 4 * 512 * 512 // largest))


def _first_captions(config: TrainConfig, data: TrainingSet) -> list[str]:
    """Each caption with prefix and suffix, and the empty caption where captions may drop out."""
    options = [caption_options(table) for table in config.dataset]
    captions = {_plain_caption(sample.caption, options[sample.source]) for sample in data.training}
    captions |= {sample.caption for sample in data.validation}
    if any(option.dropout > 0 for option in options):
        captions.add("")
    return sorted(captions)


def _plain_caption(caption: str, options: CaptionOptions) -> str:
    """The caption as training reads it when nothing is left to chance."""
    return vary_caption(caption, options.without_chance(), _UNUSED)


def caption_options(table: DatasetConfig) -> CaptionOptions:
    return CaptionOptions(
        prefix=table.caption_prefix,
        suffix=table.caption_suffix,
        shuffle=table.shuffle_tags,
        keep_tokens=table.keep_tokens,
        tag_dropout=table.tag_dropout,
        dropout=table.caption_dropout,
    )


def token_counts(config: TrainConfig, model: DiffusionModel, data: TrainingSet) -> dict[str, int]:
    """Tokens of each caption, prefix and suffix included; the largest where two tables share a caption."""
    counts: dict[str, int] = {}
    for table, scan in zip(config.dataset, data.scans, strict=True):
        options = caption_options(table)
        captions = sorted({sample.caption for sample in scan.samples})
        lengths = model.token_counts([_plain_caption(caption, options) for caption in captions])
        for caption, tokens in zip(captions, lengths, strict=True):
            counts[caption] = max(tokens, counts.get(caption, 0))
    return counts
