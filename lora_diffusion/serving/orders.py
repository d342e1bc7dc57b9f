"""Orders of pictures: a bounded queue of what waits, and the results of what was drawn, within limits."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from lora_diffusion.generation.request import Request
from lora_diffusion.generation.sheet import Sheet

Status = Literal["queued", "running", "done", "failed", "cancelled"]
Key = tuple[object, ...]

_PREVIEW_WANTED_S = 10.0
_MAX_REMEMBERED = 100_000  # ids of dropped orders, so that they are "gone" rather than "unknown"


class QueueFull(Exception):
    """There is no room for another order."""


class UnknownOrder(Exception):
    """There never was an order of this id, or it was long ago."""


class DroppedOrder(Exception):
    """The order's pictures made room for newer ones."""


@dataclass(eq=False)
class Order:
    """Pictures that a client asked for together. Its requests never change; the rest is the worker's progress."""

    requests: tuple[Request, ...]
    sheet: Sheet | None = None
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    status: Status = "queued"
    error: str = ""
    notes: tuple[str, ...] = ()
    """What is odd about the adapters that it has been drawn with so far."""
    images: list[bytes | None] = field(init=False)
    """PNG files, as they are done."""
    sheet_png: bytes | None = None
    progress: list[float] = field(init=False)
    """Per picture, from 0 to 1."""
    pending: list[int] = field(init=False)
    keys: list[Key] = field(default_factory=list[Key])
    preview: bytes | None = None
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    ended_at: float | None = None
    _preview_wanted_until: float = 0.0

    def __post_init__(self) -> None:
        self.images = [None] * len(self.requests)
        self.progress = [0.0] * len(self.requests)
        self.pending = list(range(len(self.requests)))

    @property
    def has_ended(self) -> bool:
        return self.status in ("done", "failed", "cancelled")

    @property
    def num_bytes(self) -> int:
        return sum(len(image) for image in self.images if image) + len(self.sheet_png or b"")

    @property
    def steps(self) -> tuple[int, int]:
        """Denoising steps done, and all of them."""
        steps = [request.steps for request in self.requests]
        done = sum(part * count for part, count in zip(self.progress, steps, strict=True))
        return round(done), sum(steps)

    @property
    def seconds(self) -> float:
        """From its start to its end or to now."""
        if self.started_at is None:
            return 0.0
        return (self.ended_at or time.monotonic()) - self.started_at

    def want_preview(self) -> None:
        """Draw previews for the next ten seconds: they cost a little, so only while someone looks."""
        self._preview_wanted_until = time.monotonic() + _PREVIEW_WANTED_S

    @property
    def is_preview_wanted(self) -> bool:
        return time.monotonic() < self._preview_wanted_until


@dataclass(frozen=True)
class Unit:
    """One picture of an order."""

    order: Order
    index: int

    @property
    def request(self) -> Request:
        return self.order.requests[self.index]


class OrderBook:
    """All orders. Safe to use from any thread."""

    def __init__(self, *, max_waiting: int = 64, max_images: int = 2000, max_bytes: int = 512 * 2**20) -> None:
        """max_waiting: orders that are not done. max_images, max_bytes: of results kept; the oldest make room."""
        self._max_waiting = max_waiting
        self._max_images = max_images
        self._max_bytes = max_bytes
        self._orders: OrderedDict[str, Order] = OrderedDict()
        self._waiting: deque[Order] = deque()
        self._dropped: OrderedDict[str, None] = OrderedDict()
        self._changed = threading.Condition()

    @property
    def num_waiting(self) -> int:
        """Orders that wait or are being drawn."""
        with self._changed:
            return sum(not order.has_ended for order in self._orders.values())

    def add(self, order: Order) -> int:
        """Returns the position in the queue, 0 for the next. Raises QueueFull."""
        with self._changed:
            ahead = sum(not other.has_ended for other in self._orders.values())
            if ahead >= self._max_waiting:
                raise QueueFull
            self._orders[order.id] = order
            self._waiting.append(order)
            self._changed.notify_all()
            return ahead

    def get(self, id: str) -> Order:
        """Raises UnknownOrder or DroppedOrder."""
        with self._changed:
            if id in self._dropped:
                raise DroppedOrder
            if id not in self._orders:
                raise UnknownOrder
            return self._orders[id]

    def position(self, order: Order) -> int:
        """How many orders come before this one."""
        with self._changed:
            if order.status != "queued":
                return 0
            before = 0
            for other in self._orders.values():
                if other is order:
                    break
                before += not other.has_ended
            return before

    def cancel(self, order: Order) -> None:
        """Ends it at once for the client; what is being drawn for it alone ends at the next step."""
        with self._changed:
            if not order.has_ended:
                self._end(order, "cancelled")

    def wait(self, timeout_s: float) -> bool:
        """Whether there is something to draw, after at most `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._waiting), timeout_s)

    def wake(self) -> None:
        """Let `wait` return."""
        with self._changed:
            self._changed.notify_all()

    def take(self, size: int, key_of: Callable[[Request], Key]) -> list[Unit]:
        """Up to `size` pictures that can be drawn together, from as many orders as there are, in turns.

        The order that has waited longest decides what kind of batch it is; then it goes to the end of the line, so that
        a long order does not hold up short ones.
        """
        self._find_keys(key_of)
        with self._changed:
            ready = [order for order in self._waiting if order.keys]  # one that came meanwhile waits for the next batch
            if not ready:
                return []
            head = ready[0]
            key = head.keys[head.pending[0]]
            units: list[Unit] = []
            found = True
            while found and len(units) < size:
                found = False
                for order in ready:
                    index = next((i for i in order.pending if order.keys[i] == key), None)
                    if index is not None and len(units) < size:
                        order.pending.remove(index)
                        units.append(Unit(order, index))
                        found = True
            for unit in units:
                if unit.order.status == "queued":
                    unit.order.status, unit.order.started_at = "running", time.monotonic()
            self._waiting.rotate(-1)
            self._waiting = deque(order for order in self._waiting if order.pending)
            return units

    def _find_keys(self, key_of: Callable[[Request], Key]) -> None:
        """Outside the lock: long texts take their time, in which clients are answered."""
        with self._changed:
            new = [order for order in self._waiting if not order.keys]
        for order in new:
            order.keys = [key_of(request) for request in order.requests]

    def finish(self, unit: Unit, png: bytes) -> bool:
        """Store a picture; whether it was the order's last. Nothing happens if the order was cancelled meanwhile."""
        with self._changed:
            order = unit.order
            if order.has_ended:
                return False
            order.images[unit.index] = png
            order.progress[unit.index] = 1.0
            return all(image is not None for image in order.images)

    def end(self, order: Order, status: Status, error: str = "") -> None:
        """Nothing happens if it has ended already."""
        with self._changed:
            if not order.has_ended:
                order.error = error
                self._end(order, status)

    def end_all(self) -> None:
        """Cancel whatever is not done."""
        with self._changed:
            for order in [order for order in self._orders.values() if not order.has_ended]:
                self._end(order, "cancelled")

    def _end(self, order: Order, status: Status) -> None:
        order.status, order.ended_at, order.preview = status, time.monotonic(), None
        order.pending = []
        self._orders.move_to_end(order.id)  # those that ended stand in the order of their ends
        self._waiting = deque(other for other in self._waiting if other is not order)
        if status == "cancelled":
            order.images = [None] * len(order.requests)
        self._drop_oldest()

    def _drop_oldest(self) -> None:
        ended = [order for order in self._orders.values() if order.has_ended]
        num_images = sum(len(order.requests) for order in ended)
        num_bytes = sum(order.num_bytes for order in ended)
        for order in ended[:-1]:  # the newest stays, however large
            if num_images <= self._max_images and num_bytes <= self._max_bytes:
                return
            num_images -= len(order.requests)
            num_bytes -= order.num_bytes
            del self._orders[order.id]
            self._dropped[order.id] = None
            while len(self._dropped) > _MAX_REMEMBERED:
                self._dropped.popitem(last=False)
