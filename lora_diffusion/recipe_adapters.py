"""From a config to adapters in a model: which layers get one, how each starts, and how fast it learns."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from lora_diffusion.adapters.base import Adapter, Dropout, Layer
from lora_diffusion.adapters.geometry import UP
from lora_diffusion.adapters.inject import inject, merge, select_layers
from lora_diffusion.adapters.kinds import ADAPTERS, adapter_from_tensors
from lora_diffusion.config import TrainConfig
from lora_diffusion.errors import UserError
from lora_diffusion.files import sha256_of
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.formats.argument import parse_adapter
from lora_diffusion.models.base import DiffusionModel
from lora_diffusion.streams import stream
from lora_diffusion.training.optimizers import parameter_group

logger = logging.getLogger(__name__)

V = TypeVar("V")
Adapters = dict[str, dict[str, Adapter]]
"""part → dotted path → adapter"""


def merge_into_base(config: TrainConfig, model: DiffusionModel) -> None:
    """Write the adapters of `model.merge` into the base's weights, one after the other, each at its strength."""
    for text in config.model.merge:
        path, strength = parse_adapter(text, "[model] merge:")
        file = AdapterFile.read(path)
        attachment = file.attach(model.parts)
        if attachment.unread:
            raise UserError(
                f"{path}: {len(attachment.unread)} of its {len(file.modules)} modules do not exist in this base (the "
                f"first: {attachment.unread[0]}), so it cannot be merged as trained. Use the base it was made for."
            )
        for part, component in model.parts.items():
            tensors = {match.path: match.tensors for match in attachment.matches if match.part == part}
            layers = {match.path: match.layer for match in attachment.matches if match.part == part}

            def make(place: str, layer: Layer, tensors: Mapping[str, Any] = tensors) -> Adapter:
                return adapter_from_tensors(layer, tensors[place])

            adapters = inject(component.module, layers, make)
            for adapter in adapters.values():
                adapter.strength = strength
            merge(component.module, adapters)
        logger.info("%s: merged into the base at strength %g", path, strength)


def hashes_of_merged(config: TrainConfig) -> list[str]:
    """sha256 of every file that was merged into the base: part of what a resumed run must have again."""
    return [sha256_of(parse_adapter(text)[0]) for text in config.model.merge]


def inject_adapters(config: TrainConfig, model: DiffusionModel, *, is_resumed: bool = False) -> Adapters:
    """Wrap the chosen layers of every trained part.

    is_resumed: the weights come from a checkpoint, so `start_from` is not read. Raises UserError for a pattern that
    finds no layer, a start that a layer is too small for, and a file to start from that does not fit.
    """
    chosen = {part: _chosen_layers(config, model, part) for part in trained_parts(config, model)}
    settings = config.adapter
    paths = [path for layers in chosen.values() for path in layers]
    for name in ("rank_pattern", "alpha_pattern", "lr_pattern"):
        for expression in getattr(settings, name):
            if not any(re.search(expression, path) for path in paths):
                raise UserError(
                    f"[adapter] {name}: {expression!r} is found in none of the {len(paths)} layers with an adapter. "
                    f"A path looks like {max(paths, key=len, default='')!r}."
                )
    start = None
    if settings.start_from is not None and not is_resumed:
        has_patterns = bool(settings.rank_pattern or settings.alpha_pattern)
        start = _Start(settings.start_from, model, has_patterns=has_patterns)
    adapters: Adapters = {}
    for part, layers in chosen.items():
        kept = {path: layer for path, layer in layers.items() if _first(settings.lr_pattern, path, 1.0) > 0}

        def make(path: str, layer: Layer, part: str = part) -> Adapter:
            adapter = _new_adapter(config, part, path, layer)
            if start is not None:
                start.fill(part, path, adapter)
            return adapter

        adapters[part] = inject(model.parts[part].module, kept, make)
    if start is not None:
        start.finish()
    _check_not_empty(config, adapters)
    return adapters


def _check_not_empty(config: TrainConfig, adapters: Adapters) -> None:
    if adapters["unet"]:
        return
    if len(adapters) == 1:
        raise UserError("[adapter] lr_pattern: every layer has learning rate 0, so nothing is left to train.")
    if config.optimizer.text_encoder_steps is not None:
        raise UserError(
            "[optimizer] text_encoder_steps: adapter.lr_pattern gives every layer of the UNet learning rate 0, so "
            "nothing would be trained after that step. Leave it out and set run.steps."
        )


def trained_parts(config: TrainConfig, model: DiffusionModel) -> list[str]:
    """The UNet, and the text encoders that are to be trained."""
    rates = learning_rates(config)
    if config.optimizer.text_encoder_2_lr is not None and "text_encoder_2" not in model.parts:
        raise UserError(f"[optimizer] text_encoder_2_lr: {config.model.path} has one text encoder only. Leave it out.")
    encoders = [part for part in model.parts if part != "unet" and rates[part] > 0]
    return ["unet", *(encoders if config.adapter.text_encoder else [])]


def learning_rates(config: TrainConfig) -> dict[str, float]:
    """Peak learning rate by part."""
    settings = config.optimizer
    first = settings.lr / 2 if settings.text_encoder_lr is None else settings.text_encoder_lr
    second = first if settings.text_encoder_2_lr is None else settings.text_encoder_2_lr
    return {"unet": settings.lr, "text_encoder": first, "text_encoder_2": second}


def parameter_groups(config: TrainConfig, adapters: Adapters) -> list[dict[str, Any]]:
    """One group for each learning rate in each part, the UNet's own rate first, and apart what must not decay."""
    rates, groups = learning_rates(config), []
    for part, by_path in adapters.items():
        by_kind: dict[tuple[float, bool], list[torch.nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
        for path, adapter in by_path.items():
            factor = _first(config.adapter.lr_pattern, path, 1.0)
            undecayed = {id(parameter) for parameter in adapter.undecayed()}
            for parameter in adapter.trained():
                by_kind.setdefault((factor, id(parameter) not in undecayed), []).append(parameter)
        until = None if part == "unet" else config.optimizer.text_encoder_steps
        groups += [
            parameter_group(parameters, rates[part] * factor, until=until, decays=decays)
            for (factor, decays), parameters in by_kind.items()
            if parameters
        ]
    return groups


def _chosen_layers(config: TrainConfig, model: DiffusionModel, part: str) -> dict[str, Layer]:
    # A list of regular expressions speaks of the UNet; the text encoders then get their attention layers.
    targets = config.adapter.targets
    if part != "unet" and not isinstance(targets, str):
        targets = "attention"
    return select_layers(model.parts[part].module, targets)


def _new_adapter(config: TrainConfig, part: str, path: str, layer: Layer) -> Adapter:
    settings = config.adapter
    rank = _first(settings.rank_pattern, path, settings.rank)
    alpha = _first(settings.alpha_pattern, path, settings.alpha * rank / settings.rank)
    if settings.rslora:
        alpha *= math.sqrt(rank)  # alpha / √rank = (alpha · √rank) / rank, which every reader of files computes
    options: dict[str, Any] = {"factor": settings.lokr_factor} if settings.lokr_factor else {}
    generator = stream(config.run.seed, "init", part, path)
    try:
        adapter = ADAPTERS[settings.kind](layer, rank, alpha, generator=generator, init=settings.init, **options)
    except ValueError as error:
        raise UserError(f"[adapter] {part}.{path}: {error}. Lower the rank there with adapter.rank_pattern.") from None
    adapter.dropout = Dropout(settings.dropout, settings.rank_dropout, settings.module_dropout)
    return adapter


def _first(patterns: Mapping[str, V], path: str, otherwise: V) -> V:
    return next((value for expression, value in patterns.items() if re.search(expression, path)), otherwise)


class _Start:
    """A file whose weights new adapters take over."""

    def __init__(self, path: Path, model: DiffusionModel, *, has_patterns: bool) -> None:
        """has_patterns: the new adapters' alphas may differ from layer to layer."""
        self._path = path
        self._has_patterns = has_patterns
        attachment = AdapterFile.read(path).attach(model.parts)
        if attachment.unread:
            raise UserError(f"{path}: {attachment.unread[0]} is no layer of this base. Start from a file made for it.")
        self._left = {(match.part, match.path): match for match in attachment.matches}
        self._fresh: list[str] = []

    def fill(self, part: str, path: str, adapter: Adapter) -> None:
        match = self._left.pop((part, path), None)
        if match is None:
            self._fresh.append(f"{part}.{path}")
            return
        there = adapter_from_tensors(match.layer, match.tensors)
        own, theirs = adapter.state(), there.state()
        shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (own, theirs)]
        ratio = _scale(there) / _scale(adapter)
        if self._has_patterns and UP in theirs:
            # Our files have one alpha for a whole component: what a pattern says of a layer is in its lora_up.
            theirs = theirs | {UP: theirs[UP] * ratio}
            ratio = 1.0
        # Files hold alpha as float32.
        if there.kind != adapter.kind or shapes[0] != shapes[1] or not math.isclose(ratio, 1, rel_tol=1e-6):
            raise UserError(
                f"{self._path}: for {part}.{path} it holds a {_described(there)}, but the config asks for a "
                f"{_described(adapter)}. Set kind, rank and alpha in [adapter] as in the file, or resize the file."
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(theirs[name])

    def finish(self) -> None:
        """Raises UserError if the file has adapters that the config would drop."""
        if self._left:
            part, path = next(iter(self._left))
            raise UserError(
                f"{self._path}: it also changes {len(self._left)} layers that this config does not train, such as "
                f"{part}.{path}; they would be lost. Choose adapter.targets and adapter.text_encoder as in the file."
            )
        if self._fresh:
            logger.info(
                "%s: has nothing for %d layers, which start afresh, such as %s",
                self._path, len(self._fresh), self._fresh[0],
            )  # fmt: skip


def _scale(adapter: Adapter) -> float:
    inside: Any = getattr(adapter, "direction", adapter)
    return inside.scale


def _described(adapter: Adapter) -> str:
    inside: Any = getattr(adapter, "direction", adapter)
    sizes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in adapter.state().items())
    return f"{adapter.kind} of rank {inside.rank} and alpha {inside.alpha:g} ({sizes})"
