"""The text that goes with an adapter: `ss_*` as sd-scripts writes it, and `modelspec.*` (ModelSpec 1.0.1).

A1111, Forge and SD.Next sort and label adapters by these. Values are strings; no paths and no user names go in.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar

from lora_diffusion.adapters.geometry import Geometry

V = TypeVar("V")

IMPLEMENTATIONS = {"stable-diffusion-xl-v1-base": "https://github.com/Stability-AI/generative-models"}
"""ModelSpec's implementation of an adapter by architecture, where it is not "diffusers"."""

MINIMUM_KEYS = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
"""What a reader needs to sort a file, and what is left if the user wants nothing about the data in it."""


@dataclass(frozen=True)
class TrainingFacts:
    """What a run tells about the adapter it made. None is unknown and is written as sd-scripts does: "None".

    base_model: its name; of a path only the last step is written. architecture: without "/lora". resolution: width and
    height in px. tag_frequency, image_counts and bucket_counts describe the data: {folder: {tag: count}},
    {folder: (repeats, images)} and {(width, height): images}. Times are seconds since 1970.
    """

    output_name: str
    base_model: str
    base_model_version: str
    architecture: str
    rank: int
    alpha: float
    resolution: tuple[int, int]
    seed: int
    steps: int
    max_steps: int
    started_at: float
    finished_at: float
    prediction: str = "epsilon"
    epoch: int | None = None
    num_epochs: int | None = None
    num_train_images: int | None = None
    batch_size: int | None = None
    gradient_accumulation: int | None = None
    gradient_checkpointing: bool | None = None
    unet_lr: float | None = None
    text_encoder_lr: float | None = None
    lr_schedule: str | None = None
    warmup_steps: int | None = None
    optimizer: str | None = None
    precision: str | None = None
    clip_skip: int | None = None
    max_tokens: int | None = None
    noise_offset: float | None = None
    min_snr_gamma: float | None = None
    zero_terminal_snr: bool | None = None
    loss: str | None = None
    max_grad_norm: float | None = None
    caption_dropout: float | None = None
    network_args: Mapping[str, str] = field(default_factory=dict)
    tag_frequency: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    image_counts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    bucket_counts: Mapping[tuple[int, int], int] = field(default_factory=dict)
    trigger: str | None = None
    comment: str | None = None
    program_version: str = ""


def build_metadata(facts: TrainingFacts, *, only_minimum: bool = False) -> dict[str, str]:
    """The metadata of a plain LoRA file, all strings. only_minimum: nothing about the data or the settings."""
    metadata = _ss(facts)
    if only_minimum:
        return {key: metadata[key] for key in MINIMUM_KEYS}
    return metadata | _modelspec(facts)


def tensor_hash(data: bytes) -> str:
    """`sshs_model_hash`: sha256 hex of a serialised file after its header, so the same whatever the metadata says."""
    header = int.from_bytes(data[:8], "little")
    return hash_of_pieces([memoryview(data)[8 + header :]])


def hash_of_pieces(pieces: Iterable[memoryview]) -> str:
    """`sshs_model_hash` from the tensors' bytes, in the order of the file."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def legacy_hash(header: bytes, pieces: Iterable[memoryview]) -> str:
    """`sshs_legacy_hash`: of 64 KiB at 1 MiB of the file as it would be with the `ss_*` metadata alone.

    header: what that file would begin with. pieces: the tensors' bytes, in the order of the file. Depends on the layout
    of the header, so only programs that lay it out alike agree; shorter files all have the hash of nothing.
    """
    digest, position = hashlib.sha256(), 0
    for piece in (memoryview(header), *pieces):
        digest.update(piece[max(0, 0x100000 - position) : max(0, 0x110000 - position)])
        position += len(piece)
    return digest.hexdigest()[:8]


DIM = "ss_network_dim"
BASE_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
"""`ss_base_model_version` where nothing more is known than the family."""


def frequent_tags(metadata: Mapping[str, str], limit: int) -> list[str]:
    """The tags that a file's training captions had most often; none where other programs wrote what cannot be read."""
    counts: Counter[str] = Counter()
    try:
        for tags in json.loads(metadata.get("ss_tag_frequency", "{}")).values():
            counts.update({str(tag).strip()[:200]: int(count) for tag, count in tags.items()})
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return []
    del counts[""]
    return [tag for tag, _ in counts.most_common(limit)]


def network_metadata(
    geometries: Mapping[str, Geometry], alphas: Mapping[str, float], family: str, given: Mapping[str, str]
) -> dict[str, str]:
    """What a kohya file says about its own tensors, which are given by canonical module name.

    Rank and alpha are those of most modules. `networks.lora` is claimed only for what that module of sd-scripts reads.
    """
    kinds = Counter(geometry.name for geometry in geometries.values())
    plain = {name: geometry for name, geometry in geometries.items() if not _is_convolution(name)} or dict(geometries)
    args: dict[str, str] = {}
    if set(kinds) != {"lora"}:
        kind, _, inside = kinds.most_common(1)[0][0].partition(" of ")
        args["algo"] = inside or {"lora": "locon", "dora": "locon"}.get(kind, kind)
        if any(geometry.dora_axis is not None for geometry in geometries.values()):
            args |= {"dora_wd": "True", "wd_on_output": str(any(g.dora_axis == 0 for g in geometries.values()))}
    if convolutions := {name: geometry for name, geometry in geometries.items() if _is_convolution(name)}:
        args |= {"conv_dim": _common_rank(convolutions), "conv_alpha": _common_alpha(convolutions, alphas)}
    version = given.get("ss_base_model_version") or BASE_VERSIONS.get(family)
    about_base = {"ss_base_model_version": version, "ss_v2": str(version.startswith("sd_v2"))} if version else {}
    return about_base | {
        "ss_network_module": "networks.lora" if set(kinds) == {"lora"} else "lycoris.kohya",
        # A LoKr without factors has no rank; what the config said is the best to tell then.
        DIM: _common_rank(plain) if any(g.rank for g in plain.values()) else given.get(DIM, "0"),
        "ss_network_alpha": _common_alpha(plain, alphas),
        "ss_network_args": json.dumps(args),
    }


def _is_convolution(name: str) -> bool:
    return "_resnets_" in name or "samplers_" in name


def _common_rank(geometries: Mapping[str, Geometry]) -> str:
    ranks = Counter(geometry.rank for geometry in geometries.values() if geometry.rank)
    return str(ranks.most_common(1)[0][0] if ranks else 0)


def _common_alpha(geometries: Mapping[str, Geometry], alphas: Mapping[str, float]) -> str:
    return str(Counter(alphas[name] for name in geometries).most_common(1)[0][0])


def _ss(facts: TrainingFacts) -> dict[str, str]:
    width, height = facts.resolution
    values: dict[str, object] = {
        "ss_v2": facts.base_model_version.startswith("sd_v2"),
        "ss_base_model_version": facts.base_model_version,
        "ss_network_module": "networks.lora",
        "ss_network_dim": facts.rank,
        "ss_network_alpha": facts.alpha,
        "ss_network_args": dict(facts.network_args),
        "ss_output_name": facts.output_name,
        "ss_sd_model_name": _last_step(facts.base_model),
        "ss_session_id": _session_id(facts),
        "ss_training_started_at": facts.started_at,
        "ss_training_finished_at": facts.finished_at,
        "ss_resolution": f"({width}, {height})",
        "ss_seed": facts.seed,
        "ss_steps": facts.steps,
        "ss_max_train_steps": facts.max_steps,
        "ss_epoch": facts.epoch,
        "ss_num_epochs": facts.num_epochs,
        "ss_num_train_images": facts.num_train_images,
        "ss_batch_size_per_device": facts.batch_size,
        "ss_gradient_accumulation_steps": facts.gradient_accumulation,
        "ss_gradient_checkpointing": facts.gradient_checkpointing,
        "ss_learning_rate": facts.unet_lr,
        "ss_unet_lr": facts.unet_lr,
        "ss_text_encoder_lr": facts.text_encoder_lr,
        "ss_lr_scheduler": facts.lr_schedule,
        "ss_lr_warmup_steps": facts.warmup_steps,
        "ss_optimizer": facts.optimizer,
        "ss_mixed_precision": facts.precision,
        "ss_clip_skip": facts.clip_skip,
        "ss_max_token_length": facts.max_tokens,
        "ss_noise_offset": facts.noise_offset,
        "ss_min_snr_gamma": facts.min_snr_gamma,
        "ss_zero_terminal_snr": facts.zero_terminal_snr,
        "ss_loss_type": facts.loss,
        "ss_max_grad_norm": facts.max_grad_norm,
        "ss_caption_dropout_rate": facts.caption_dropout,
        "ss_tag_frequency": _by_folder(facts.tag_frequency),
        "ss_dataset_dirs": {
            folder: {"n_repeats": repeats, "img_count": images}
            for folder, (repeats, images) in _by_folder(facts.image_counts).items()
        },
        "ss_bucket_info": {
            "buckets": {
                str(i): {"resolution": list(size), "count": count}
                for i, (size, count) in enumerate(sorted(facts.bucket_counts.items()))
            }
        },
        "ss_training_comment": facts.comment,
    }
    return {key: json.dumps(value) if isinstance(value, dict) else str(value) for key, value in values.items()}


def _modelspec(facts: TrainingFacts) -> dict[str, str]:
    width, height = facts.resolution
    finished = datetime.fromtimestamp(int(facts.finished_at), UTC)
    values = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{facts.architecture}/lora",
        "implementation": IMPLEMENTATIONS.get(facts.architecture, "diffusers"),
        "implementation_version": f"lora-diffusion {facts.program_version}".strip(),
        "title": facts.output_name,
        "resolution": f"{width}x{height}",
        "date": finished.replace(tzinfo=None).isoformat(),
        "prediction_type": facts.prediction,
        "encoder_layer": facts.clip_skip,
        "trigger_phrase": facts.trigger,
    }
    return {f"modelspec.{key}": str(value) for key, value in values.items() if value is not None}


def _session_id(facts: TrainingFacts) -> str:
    """A number that tells this run's files from another's; a function of the run, so that a resumed one keeps it."""
    text = f"{facts.output_name} {facts.seed} {facts.started_at}"
    return str(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little"))


def _last_step(path: str) -> str:
    """The name at the end of a path or hub id, Windows paths included: folders above it are private."""
    return path.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]


def _by_folder(counts: Mapping[str, V]) -> dict[str, V]:
    """The same counts under the folders' last steps; folders of one name are numbered apart."""
    named: dict[str, V] = {}
    for folder, value in counts.items():
        name, number = _last_step(folder), 2
        while name in named:
            name, number = f"{_last_step(folder)} {number}", number + 1
        named[name] = value
    return named
