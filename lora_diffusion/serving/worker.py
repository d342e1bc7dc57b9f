"""The one thread that draws: it owns the pipeline, and fills each batch with pictures from many orders."""

from __future__ import annotations

import io
import logging
import re
import threading
import time
from collections.abc import Callable, Sequence

import torch
from PIL import Image

from lora_diffusion.errors import RunError, UserError
from lora_diffusion.generation.engine import Cancelled, Engine
from lora_diffusion.generation.infotext import png_bytes, write_parameters
from lora_diffusion.generation.library import AdapterLibrary
from lora_diffusion.generation.request import Request
from lora_diffusion.models.heap import trim_heap
from lora_diffusion.serving.device import DeviceBusy, DeviceLock
from lora_diffusion.serving.orders import Key, Order, OrderBook, Unit

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_PREVIEW_SIDE_PX = 256
_LONGEST_HOLD_S = 15.0
_PAUSE_S = 0.5  # others ask for the device five times a second


class Worker(threading.Thread):
    """Draws what the book holds until it is told to stop."""

    def __init__(
        self,
        engine: Engine,
        library: AdapterLibrary,
        book: OrderBook,
        device: DeviceLock,
        model_name: str,
        *,
        idle_s: float = 300.0,
        when_idle: Callable[[], None] | None = None,
    ) -> None:
        """idle_s: after so long without work the memory that is kept for the next pictures is given back.

        when_idle: called then in place of that, or as soon as another process has the device and nothing is left to
        draw. The worker ends with it.
        """
        super().__init__(name="engine", daemon=True)
        self._engine = engine
        self._library = library
        self._book = book
        self._device = device
        self._model_name = model_name
        self._idle_s = idle_s
        self._when_idle = when_idle
        self._stopping = threading.Event()
        self.waiting_for = ""
        """Who has the device, while pictures wait for it."""

    def stop(self, timeout_s: float = 60.0) -> None:
        """End at the next step; what is not done is cancelled."""
        self._stopping.set()
        self._book.end_all()
        self._book.wake()
        if self.is_alive():
            self.join(timeout_s)

    def run(self) -> None:
        last_work = last_pause = time.monotonic()
        is_cache_full = was_asked = has_made_way = False
        while not self._stopping.is_set():
            if not self._book.wait(_POLL_S):
                last_pause = time.monotonic()
                is_idle = last_pause - last_work > self._idle_s
                # Who has started an engine while another has the device is about to ask.
                is_taken = was_asked and self._device.is_held_by_another()
                if self._when_idle and (is_idle or is_taken):
                    self._when_idle()
                    return
                if is_taken and not has_made_way:
                    self._make_way()
                    is_cache_full, has_made_way = False, True
                elif is_cache_full and is_idle:
                    _free_cache()
                    is_cache_full = False
                continue
            was_asked = True
            if self._device.is_shared and time.monotonic() - last_pause > _LONGEST_HOLD_S:
                self._stopping.wait(_PAUSE_S)  # a training run that waits for the device gets its turn
                last_pause = time.monotonic()
            try:
                with self._device.held():
                    self.waiting_for, has_made_way = "", False
                    self._draw(self._book.take(self._engine.batch_size, self._key))
                    is_cache_full, last_work = True, time.monotonic()
            except DeviceBusy as busy:
                self.waiting_for = str(busy)
                if not has_made_way:
                    self._make_way()
                    is_cache_full, has_made_way = False, True
                self._stopping.wait(_POLL_S)
            except Exception:  # a fault of ours or a full disk must not end the engine, nor keep it busy
                logger.exception("the engine thread went on after an unexpected error")
                self._stopping.wait(_POLL_S)

    def _make_way(self) -> None:
        """Leave the device's memory to the process that has the device now. The next picture brings the base back."""
        try:
            self._engine.make_way()
        except (RuntimeError, MemoryError) as error:  # the next picture brings back what has left
            logger.warning(
                "the base stays beside another process on the device: there is no room elsewhere (%s)", error
            )
        _free_cache()

    def _draw(self, units: Sequence[Unit]) -> None:
        """Draw together; if that fails, each alone, so that one client's mistake is not another's."""
        units = [unit for unit in units if not unit.order.has_ended]
        if not units:
            return
        try:
            self._library.need(list(dict.fromkeys(name for unit in units for name in unit.request.adapters)))
            for unit in units:
                notes = self._library.notes(unit.request.adapters)
                unit.order.notes = tuple(dict.fromkeys([*unit.order.notes, *notes]))
            images = self._engine.generate(
                [unit.request for unit in units], on_step=self._step(units), on_preview=self._preview(units)
            )
        except Cancelled:
            return
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                _free_cache()
            if len(units) == 1:
                self._book.end(units[0].order, "failed", self._message(error))
                return
            for unit in units:
                self._draw([unit])
            return
        for unit, image in zip(units, images, strict=True):
            try:
                self._finish(unit, image)
            except Exception as error:
                self._book.end(unit.order, "failed", self._message(error))

    def _key(self, request: Request) -> Key:
        """What batches it may be in. One that cannot be told is drawn alone and fails there, with a reason."""
        try:
            return self._engine.batch_key(request)
        except Exception:
            return ("alone", id(request))

    def _step(self, units: Sequence[Unit]) -> Callable[[int, int], None]:
        def on_step(done: int, total: int) -> None:
            for unit in units:
                unit.order.progress[unit.index] = done / total
            if self._stopping.is_set() or all(unit.order.has_ended for unit in units):
                raise Cancelled

        return on_step

    def _preview(self, units: Sequence[Unit]) -> Callable[[int, Callable[[], Image.Image]], None]:
        shown = {unit.order: row for row, unit in reversed(list(enumerate(units)))}  # the first of each order

        def on_preview(row: int, draw: Callable[[], Image.Image]) -> None:
            order = units[row].order
            if shown[order] == row and order.is_preview_wanted and not order.has_ended:
                order.preview = _jpeg(draw())

        return on_preview

    def _finish(self, unit: Unit, image: Image.Image) -> None:
        text = write_parameters(unit.request, self._model_name, self._library.hashes())
        if self._book.finish(unit, png_bytes(image, text)):
            if unit.order.sheet is not None:
                unit.order.sheet_png = self._sheet(unit.order)
            self._book.end(unit.order, "done")

    def _sheet(self, order: Order) -> bytes:
        assert order.sheet is not None
        images = [Image.open(io.BytesIO(data)) if data else None for data in order.images]
        text = order.sheet.parameters(self._model_name, self._library.hashes())
        return png_bytes(order.sheet.picture(images), text)

    def _message(self, error: Exception) -> str:
        if isinstance(error, torch.OutOfMemoryError):
            return "The picture does not fit in the device's memory. Use a smaller size."
        if isinstance(error, UserError | RunError):
            return _without_folders(str(error))
        logger.error("a picture failed", exc_info=error)
        return f"The engine made a mistake ({type(error).__name__}). Its log has the details."


def _without_folders(message: str) -> str:
    """Clients know files by name; where they lie is the server's business."""
    return re.sub(r"(?:[A-Za-z]:)?(?:[/\\][^/\\:\n\"']+)+[/\\](?=[^/\\\s])", "", message)


def _jpeg(image: Image.Image) -> bytes:
    scale = max(1.0, _PREVIEW_SIDE_PX / max(image.size))
    size = (round(image.width * scale), round(image.height * scale))
    file = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(file, format="JPEG", quality=85)
    return file.getvalue()


def _free_cache() -> None:
    trim_heap()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
