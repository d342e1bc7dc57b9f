"""Captions that a model made, in a file: what a person still has to look at, and what was written. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lora_diffusion.captioning.errors import CaptionerError
from lora_diffusion.files import write_json_atomically


@dataclass(frozen=True)
class Proposal:
    """before: the picture's caption when this one was made; None if it had none. is_written: it is in the data set."""

    caption: str
    before: str | None
    is_written: bool = False


@dataclass
class Proposals:
    """made, problems: by the picture's path below the data set's folder. problems: why a picture got no caption."""

    made: dict[str, Proposal] = field(default_factory=dict[str, Proposal])
    problems: dict[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def read(cls, path: Path) -> Proposals:
        """Empty if there is no such file. Raises CaptionerError if it is damaged."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            made = {
                str(name): Proposal(str(one["caption"]), _caption(one["before"]), bool(one["is_written"]))
                for name, one in values["made"].items()
            }
            return cls(made, {str(name): str(reason) for name, reason in values["problems"].items()})
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CaptionerError(f"{path} holds no proposals ({error}). Delete it and caption again.") from error

    def write(self, path: Path) -> None:
        write_json_atomically(path, asdict(self))


def proposals_file(folder: Path) -> Path:
    """Where a captioning of the queue keeps its proposals, in its folder."""
    return folder / "proposals.json"


def _caption(value: object) -> str | None:
    return None if value is None else str(value)
