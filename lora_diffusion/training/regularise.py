"""What keeps adapters from learning by heart: dropout that a resumed run repeats, and a limit on their size."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from lora_diffusion.adapters.base import Adapter, Dropout
from lora_diffusion.streams import stream_seed


@dataclass(frozen=True)
class Regulariser:
    """adapters: by part and path, "unet.mid_block.…". seed: the run's. max_norm: of each delta, 0 for no limit."""

    adapters: Mapping[str, Adapter]
    seed: int
    max_norm: float = 0.0

    @contextmanager
    def dropout(self, micro_step: int, process: int) -> Generator[None]:
        """Inside, what each adapter drops is a function of these numbers; outside, nothing is dropped."""
        dropping = {name: adapter for name, adapter in self.adapters.items() if adapter.dropout != Dropout()}
        for name, adapter in dropping.items():
            adapter.dropout_seed = stream_seed(self.seed, "dropout", micro_step, process, name)
        self._keep_one(dropping, micro_step, process)
        try:
            yield
        finally:
            for adapter in dropping.values():
                adapter.dropout_seed = None

    def _keep_one(self, dropping: Mapping[str, Adapter], micro_step: int, process: int) -> None:
        """Where all of the UNet's adapters would be left out, drop nothing of one of them.

        A batch without any would have no gradient. Those of text encoders do not count: their training may be over.
        """
        names = [name for name in dropping if name.startswith("unet.")] or list(dropping)
        if names and all(dropping[name].is_dropped() for name in names):
            dropping[names[stream_seed(self.seed, "kept", micro_step, process) % len(names)]].dropout_seed = None

    def limit_norms(self) -> int | None:
        """Scale down every change that is larger than the limit; how many were, None without a limit."""
        if not self.max_norm:
            return None
        return sum(adapter.limit_norm(self.max_norm) for adapter in self.adapters.values())
