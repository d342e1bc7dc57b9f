"""Progress of work that can take more than two seconds. Library functions stay silent unless told otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    """Wraps a sequence; iterating over the result shows how far the work has come."""

    def __call__(self, items: Sequence[T], description: str) -> Iterable[T]: ...


def silent(items: Sequence[T], description: str) -> Iterable[T]:
    """Show nothing."""
    return items


def bar(items: Sequence[T], description: str) -> Iterable[T]:
    """Show a progress bar on stderr, with the time left; nothing is shown for an empty sequence."""
    # Imported here because the modules that only need `silent` should not pay for a terminal library.
    from rich.console import Console
    from rich.progress import track

    if not items:
        return items
    return track(items, description=description, console=Console(stderr=True))
