"""How long a run is, and what epochs and shares of it are in steps."""

from __future__ import annotations

from dataclasses import dataclass

from lora_diffusion.kohya.dataset import batch_sizes, steps_per_epoch
from lora_diffusion.kohya.ledger import Ledger

DEFAULT_STEPS = 1600  # of sd-scripts


@dataclass(frozen=True)
class Interval:
    """Steps between two savings or previews, and the settings that say so. steps: 0 never, None not known."""

    steps: int | None
    names: tuple[str, ...]
    note: str


@dataclass(frozen=True)
class Length:
    """Steps or epochs of the run; the steps of an epoch where the pictures can be counted."""

    ledger: Ledger
    steps: int | None
    epochs: int | None
    batch_size: int
    accumulation: int
    per_epoch: int | None

    @classmethod
    def of(cls, ledger: Ledger) -> Length:
        epochs = ledger.whole("max_train_epochs") or None
        steps = None if epochs else ledger.whole("max_train_steps") or DEFAULT_STEPS
        size = next((size for _, size in batch_sizes(ledger) if size), None) or 1
        accumulation = ledger.whole("gradient_accumulation_steps") or 1
        return cls(ledger, steps, epochs, size, accumulation, steps_per_epoch(ledger, size, accumulation))

    def translate(self) -> None:
        """Fill run.steps or run.epochs, run.batch_size, run.gradient_accumulation and run.save_every."""
        ledger = self.ledger
        if self.epochs:
            ledger.put("run.epochs", self.epochs, "max_train_epochs")
            ledger.ignore("max_train_steps", "epochs are given too, and count")
        else:
            note = "" if ledger.whole("max_train_steps") else f"{DEFAULT_STEPS} if not given"
            ledger.put("run.steps", self.steps, "max_train_steps", note=note)
        sizes = batch_sizes(ledger)
        names = [name for name, size in sizes if size == self.batch_size]
        ledger.put("run.batch_size", self.batch_size, *dict.fromkeys(names), note="" if names else "1 if not given")
        for name, size in sizes:
            if size and size != self.batch_size:
                ledger.refuse(name, f"all data sets are trained with one `run.batch_size`; {self.batch_size} is used")
        if ledger.value("gradient_accumulation_steps") is not None:
            ledger.put("run.gradient_accumulation", self.accumulation, "gradient_accumulation_steps")
        every = self.interval("save_every_n_steps", "save_every_n_epochs", first="steps")
        if every.steps is not None:
            ledger.put("run.save_every", every.steps, *every.names, note=every.note)

    def interval(self, by_steps: str, by_epochs: str, *, first: str = "epochs") -> Interval:
        """What two settings say together. first: the one that counts where both are given."""
        ledger = self.ledger
        steps, epochs = ledger.whole(by_steps) or 0, ledger.whole(by_epochs) or 0
        if steps > 0 and (epochs <= 0 or first == "steps"):
            if epochs > 0:
                ledger.refuse(by_epochs, f"there is one interval; that of `{ledger.origin(by_steps)}` is used")
            return Interval(steps, (by_steps,), "")
        if epochs <= 0:
            return Interval(0, (), "not given: at the end only")
        if steps > 0:
            ledger.ignore(by_steps, f"`{ledger.origin(by_epochs)}` is given too, and counts")
        if self.per_epoch is None:
            ledger.refuse(
                by_epochs, "the pictures could not be counted; set it in steps: `check` tells those of an epoch"
            )
            return Interval(None, (), "")
        return Interval(epochs * self.per_epoch, (by_epochs,), f"{self.per_epoch} steps are an epoch, about")

    def each_epoch(self, name: str) -> Interval:
        """What a setting without an interval of its own does after every epoch."""
        if self.per_epoch is None:
            self.ledger.refuse(name, "the pictures could not be counted: set `validation.every` in steps")
            return Interval(None, (), "")
        return Interval(self.per_epoch, (), "after every epoch if not given")

    def share(self, share: float) -> int | None:
        """A share of the run in steps; None where its length is not known."""
        total = self.steps or (self.epochs * self.per_epoch if self.epochs and self.per_epoch else None)
        return None if total is None else int(share * total)
