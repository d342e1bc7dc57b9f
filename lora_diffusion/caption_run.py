"""One captioning: find the model and the pictures, hold the device, write captions or propose them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from lora_diffusion.captioning.captioner import load_captioner
from lora_diffusion.captioning.errors import CaptionerError
from lora_diffusion.captioning.find import find_captioner
from lora_diffusion.captioning.folder import Picture, caption_pictures, choose_pictures
from lora_diffusion.captioning.proposals import Proposals, proposals_file
from lora_diffusion.config_captions import CaptionConfig
from lora_diffusion.errors import RunError
from lora_diffusion.jobs.device_lock import NoLongerWanted, shared_device
from lora_diffusion.jobs.record import log_file, recorded_end
from lora_diffusion.models.precision import resolve_device, resolve_precision
from lora_diffusion.progress import Track, silent
from lora_diffusion.runs import RunFolder
from lora_diffusion.training.memory import is_out_of_memory
from lora_diffusion.training.signals import StopRequest

logger = logging.getLogger(__name__)

SAVE_EVERY_S = 2.0  # the file of twenty thousand captions has some megabytes
MAX_NAMED = 20


def run_captions(
    config: CaptionConfig,
    into: Proposals,
    *,
    begun: Callable[[int], None] = lambda _: None,
    after_batch: Callable[[int], bool] = lambda _: True,
    should_stop: Callable[[], bool] = lambda: False,
    track: Track = silent,
) -> None:
    """Caption the pictures that `config` means and `into` does not hold yet.

    begun: told the number of pictures when all is ready. after_batch: told how many are done; False ends it.
    should_stop: asked before the first batch. Raises UserError, or NoLongerWanted.
    """
    choice = choose_pictures(config.folder, overwrite=config.overwrite, done=into.made)
    into.problems = dict(choice.problems)
    folder = find_captioner(config.captioner)
    device = resolve_device(config.device, "device cuda")
    dtype = resolve_precision(config.precision, device, f"precision {config.precision}")
    if not choice.pictures:
        begun(0)
        return
    with shared_device(device.type, device.index, f"the captioning of {config.folder.name}", should_stop):
        captioner = load_captioner(folder, dtype=dtype, device=device)
        if should_stop():
            raise NoLongerWanted
        begun(len(choice.pictures))
        caption_pictures(
            choice.pictures,
            partial(captioner.describe, prompt=config.prompt, max_tokens=config.max_tokens),
            into,
            write=partial(_is_to_write, config),
            prefix=config.prefix,
            suffix=config.suffix,
            batch_size=config.batch_size,
            after_batch=after_batch,
            track=track,
        )


def run_caption_job(config: CaptionConfig, run: RunFolder) -> None:
    """A captioning of the queue: its state, log and captions are in the folder `run`.

    One that was stopped goes on with the pictures that are left. Raises UserError or RunError.
    """
    with run.lock(), log_file(run.log), recorded_end(run, partial(_told, config)):
        run.control.mkdir(exist_ok=True)
        run.take_control()
        run.begin(0, 0)
        logger.info("captioning %s with %s", config.folder, config.captioner)
        job = _Job(run)
        try:
            with job.stop.listen():
                run_captions(
                    config, job.made, begun=job.begin, after_batch=job.after_batch, should_stop=job.should_stop
                )
        except NoLongerWanted:
            logger.info("Stopped before the first picture.")
        finally:
            job.save()
        job.end()


def check_all_done(made: Proposals) -> None:
    """Raises RunError that names the pictures which got no caption, if there are any."""
    if not made.problems:
        return
    number = "1 picture" if len(made.problems) == 1 else f"{len(made.problems)} pictures"
    named = [f"\n  {name}: {reason}" for name, reason in list(made.problems.items())[:MAX_NAMED]]
    more = f"\n  and {len(made.problems) - MAX_NAMED} more" if len(made.problems) > MAX_NAMED else ""
    raise RunError(f"{number} got no caption:{''.join(named)}{more}")


class _Job:
    """What a captioning of the queue does between batches: tell how far it is, look whether it is to stop."""

    def __init__(self, run: RunFolder) -> None:
        self.stop = StopRequest()
        self.made = Proposals.read(proposals_file(run.path))
        self._run = run
        self._total: int | None = None
        self._done = 0
        self._began = self._saved = 0.0

    def should_stop(self) -> bool:
        if "stop" in self._run.take_control():
            self.stop.reason = "asked to"
        return bool(self.stop)

    def begin(self, num_pictures: int) -> None:
        logger.info("%d pictures to caption", num_pictures)
        self._total = num_pictures
        self._began = time.monotonic()
        self._run.beat(0, num_pictures)

    def after_batch(self, num_done: int) -> bool:
        assert self._total is not None
        self._done = num_done
        now = time.monotonic()
        self._run.beat(num_done, self._total, (now - self._began) / num_done)
        if now - self._saved > SAVE_EVERY_S:
            self.save()
        return not self.should_stop()

    def save(self) -> None:
        self.made.write(proposals_file(self._run.path))
        self._saved = time.monotonic()

    def end(self) -> None:
        for name, reason in self.made.problems.items():
            logger.warning("%s: %s", name, reason)
        if self._done != self._total:
            logger.info("Stopped (%s) after %d pictures.", self.stop.reason, self._done)
            self._run.end("stopped")
            return
        if not self.made.made:
            check_all_done(self.made)
        logger.info("%d captions made", len(self.made.made))
        self._run.end("finished")


def _is_to_write(config: CaptionConfig, picture: Picture) -> bool:
    return config.write == "all" or (config.write == "missing" and picture.caption is None)


def _told(config: CaptionConfig, error: BaseException) -> BaseException:
    if is_out_of_memory(error):
        smaller = "Use a smaller batch" if config.batch_size > 1 else 'Use a smaller captioner, or precision "bf16"'
        return CaptionerError(f"Out of memory with {config.batch_size} pictures at a time. {smaller}.")
    return error
