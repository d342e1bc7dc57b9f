"""The adapters that are in a model at present, and which of them each image of a batch uses."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from lora_diffusion.adapters.base import Adapter
from lora_diffusion.adapters.inject import eject, inject
from lora_diffusion.adapters.kinds import adapter_from_tensors
from lora_diffusion.adapters.stack import AdapterStack, StackWeights
from lora_diffusion.errors import UserError
from lora_diffusion.formats.adapter_file import AdapterFile
from lora_diffusion.generation.request import Request, check_adapter_name
from lora_diffusion.models.base import DiffusionModel

Place = tuple[str, str]
"""A part's name and the dotted path of a layer in it."""


@dataclass(frozen=True)
class _Loaded:
    """One adapter: what it does to each layer, the memory it takes, and what of its file has no effect."""

    adapters: dict[Place, Adapter]
    num_bytes: int
    notes: tuple[str, ...]


class LoadedAdapters:
    """Puts a stack around each layer that an adapter has been loaded for, and takes all out with the last adapter.

    In between stacks stay: one that no image uses is exactly its layer, and loading need not walk over the model.
    """

    def __init__(self, model: DiffusionModel) -> None:
        self._model = model
        self._loaded: dict[str, _Loaded] = {}
        self._stacks: dict[Place, AdapterStack] = {}
        self._weights = StackWeights()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._loaded)

    @property
    def num_bytes(self) -> dict[str, int]:
        """Memory that each adapter's weights take on the device."""
        return {name: loaded.num_bytes for name, loaded in self._loaded.items()}

    def load(self, name: str, file: AdapterFile) -> tuple[str, ...]:
        """As `Engine.load_adapter` says."""
        check_adapter_name(name)
        if name in self._loaded:
            raise UserError(f"An adapter named {name!r} is loaded already. Unload it first, or choose another name.")
        loaded = _load(self._model, file, self._stacks)
        self._add_stacks(loaded)
        for place, adapter in loaded.adapters.items():
            self._stacks[place].add(name, adapter)
        self._loaded[name] = loaded
        return loaded.notes

    def unload(self, name: str) -> None:
        """Raises UserError if there is no such adapter."""
        self.check([name])
        for place in self._loaded.pop(name).adapters:
            self._stacks[place].remove(name)
        if not self._loaded:
            self._eject()

    def to(self, device: torch.device) -> None:
        """Move the adapters' weights, which are in no stack, with the layers they are for."""
        for loaded in self._loaded.values():
            for adapter in loaded.adapters.values():
                adapter.to(device)

    def use(self, requests: Sequence[Request]) -> None:
        """From now on image i of a batch sees the adapters of request i."""
        names = tuple(dict.fromkeys(name for request in requests for name in request.adapters))
        if names:
            values = [[request.adapters.get(name, 0.0) for name in names] for request in requests]
            # float64: a strength must reach the factors as it was written
            self._weights.set(names, torch.tensor(values, dtype=torch.float64))
        else:
            self._weights.clear()

    def use_none(self) -> None:
        """From now on the model is exactly the base."""
        self._weights.clear()

    def check(self, names: Iterable[str]) -> None:
        """Raises UserError for a name that is not loaded."""
        for name in names:
            if name not in self._loaded:
                near = difflib.get_close_matches(name, self._loaded, n=1)
                hint = f"Did you mean {near[0]!r}? " if near else ""
                known = ", ".join(self._loaded) or "none"
                raise UserError(f"No adapter named {name!r} is loaded. {hint}Loaded: {known}.")

    def _add_stacks(self, loaded: _Loaded) -> None:
        for part, component in self._model.parts.items():
            layers = {
                path: adapter.base
                for (owner, path), adapter in loaded.adapters.items()
                if owner == part and (owner, path) not in self._stacks
            }
            made = inject(component.module, layers, lambda _, layer: AdapterStack(layer, self._weights))
            self._stacks |= {(part, path): stack for path, stack in made.items()}

    def _eject(self) -> None:
        for part, component in self._model.parts.items():
            stacks = {path: stack for (owner, path), stack in self._stacks.items() if owner == part}
            eject(component.module, stacks)
        self._stacks = {}


def _load(model: DiffusionModel, file: AdapterFile, stacks: dict[Place, AdapterStack]) -> _Loaded:
    """Adapters with the file's weights on the layers they belong to; the model is not changed."""
    attachment = file.attach(model.parts)
    for match in attachment.matches:
        stack = stacks.get((match.part, match.path))
        expected = match.layer if stack is None else stack
        if model.parts[match.part].module.get_submodule(match.path) is not expected:
            raise UserError(
                f"{file.path}: {match.part}.{match.path} has an adapter in training. Load adapters into another copy "
                "of the model."
            )
    adapters = {
        (match.part, match.path): adapter_from_tensors(match.layer, match.tensors) for match in attachment.matches
    }
    num_bytes = sum(weight.nbytes for adapter in adapters.values() for weight in adapter.state().values())
    notes = file.notes
    if unread := attachment.unread:
        count = f"{len(unread)} of {len(file.modules)} modules"
        notes += (f"{count} do not exist in this model and are left out (the first: {unread[0]})",)
    return _Loaded(adapters, num_bytes, notes)
