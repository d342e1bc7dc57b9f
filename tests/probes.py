"""Ways to lead a program out of the folder it was given, and places where a program takes names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

CANARY = "canary-3f9a"
"""What the files that must not be read hold."""


def probes(secret: Path, name: str) -> list[str]:
    """Ways to say `secret/name` where a name below a folder beside it is meant."""
    absolute = str(secret / name)
    return [
        f"../{name}",
        f"../../../../../../../../../..{absolute}",
        f"....//....//{name}",
        absolute,
        f"/{absolute}",
        quote(absolute, safe=""),
        f"..%2f{name}",
        f"%2e%2e/{name}",
        f"%2e%2e%2f{name}",
        f"%252e%252e%252f{name}",
        f"..%5c{name}",
        f"..\\{name}",
        f"..\\..\\{name}",
        f"runs/../../{name}",
        f"data/folder/{name}",
        "data/link.png",
        f"file:{absolute}",
        f"file://{absolute}",
        f"~/{name}",
        f"{absolute}\0.png",
        f"../{name}%00.png",
        f"\\\\host\\share\\{name}",
        f"//host/share/{name}",
        f"\\\\?\\{absolute}",
        f"C:\\{name}",
        f"{name}::$DATA",
        f"..\u2215{name}",
        f"\uff0e\uff0e/{name}",
    ]


def walk(routes: Sequence[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, route) of an app, with those of the apps and routers in it."""
    for route in routes:
        inner = getattr(route, "original_router", None) or (None if hasattr(route, "endpoint") else route.app)
        if inner is None:
            yield prefix + route.path, route
        else:
            yield from walk(inner.routes, prefix + getattr(route, "path", "").rstrip("/"))
