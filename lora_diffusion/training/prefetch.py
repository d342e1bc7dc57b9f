"""Batches made in a thread while the device works on the ones before."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Generic, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")

_DEPTH = 4  # batches: the host is then some steps ahead, and a batch is small


class Prefetcher(Iterator[Item], Generic[Item]):
    """The items of an iterable in order, made by a thread that stays a few ahead.

    What the thread raises is raised where the item would have come. Close it, or use it in `with`, to end the thread.
    """

    def __init__(self, items: Iterable[Item], *, depth: int = _DEPTH) -> None:
        self._queue: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(iter(items),), name="prefetch", daemon=True)
        self._thread.start()

    def __enter__(self) -> Prefetcher[Item]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __next__(self) -> Item:
        item, error = self._queue.get()
        if error is not None:
            self._queue.put((None, error))  # asked again, it is still over
            raise error
        return item  # pyright: ignore[reportReturnType]  # None only beside an error

    def close(self) -> None:
        """End the thread; what it made ahead is dropped."""
        self._is_closed.set()
        while self._thread.is_alive():
            with suppress(queue.Empty):
                self._queue.get(timeout=0.05)  # makes room for a thread that waits to put

    def _work(self, items: Iterator[Item]) -> None:
        try:
            for item in items:
                self._queue.put((item, None))
                if self._is_closed.is_set():
                    return
        except BaseException as error:  # whatever it is, it belongs to whoever waits for the item
            self._queue.put((None, error))
            return
        self._queue.put((None, StopIteration()))


class Copier:
    """Copies tensors from the host to a device; on CUDA beside the kernels, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Begin; the result, called once the copies are needed, makes the current stream wait for them."""
        if self._stream is None:
            copies = {name: tensor.to(self.device) for name, tensor in tensors.items()}
            return lambda: copies
        with torch.cuda.stream(self._stream):
            copies = {name: tensor.pin_memory().to(self.device, non_blocking=True) for name, tensor in tensors.items()}
            is_done = torch.cuda.Event()
            is_done.record(self._stream)

        def take() -> dict[str, Tensor]:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(is_done)
            for copy in copies.values():
                copy.record_stream(current)
            return copies

        return take
