"""One run for its page: its numbers, pictures and log, with the followers kept between calls."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from lora_diffusion.jobs.follow import RunFollower
from lora_diffusion.runs import RunFolder

KEPT_RUNS = 40
LOG_LINES = 200


@dataclass
class Follower:
    """A run's follower with the end of its log. `lock` must be held while it is used: requests come in threads."""

    run: RunFollower
    log: deque[str] = field(default_factory=lambda: deque[str](maxlen=LOG_LINES))
    lock: Lock = field(default_factory=Lock)

    def read_log(self) -> list[str]:
        started_anew, new = self.run.new_log()
        if started_anew:
            self.log.clear()
        self.log.extend(new.splitlines())
        return list(self.log)


@dataclass
class Followers:
    """The runs that were looked at last: what was read of a run is not read again."""

    _kept: OrderedDict[Path, Follower] = field(default_factory=OrderedDict[Path, Follower])
    _lock: Lock = field(default_factory=Lock)

    def of(self, folder: Path) -> Follower:
        with self._lock:
            follower = self._kept.pop(folder, None) or Follower(RunFollower(RunFolder(folder)))
            self._kept[folder] = follower
            while len(self._kept) > KEPT_RUNS:
                self._kept.popitem(last=False)
            return follower
