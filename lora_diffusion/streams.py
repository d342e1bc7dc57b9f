"""All randomness of the project: every draw comes from a generator that is a function of its purpose and indices.

Nothing else may draw random numbers, so a run is resumed from one integer, the step, and a sample's noise does not
depend on the number of workers or processes, nor on what else the data set holds.
"""

from __future__ import annotations

import hashlib

import torch


def stream_seed(seed: int, purpose: str, *ids: int | str) -> int:
    """A 63-bit hash of the arguments; `1` and `"1"` are different ids, as are `("ab",)` and `("a", "b")`."""
    digest = hashlib.blake2b(digest_size=8)
    for part in (seed, purpose, *ids):
        text = str(part).encode()
        kind = b"s" if isinstance(part, str) else b"i"
        digest.update(kind + len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest(), "little") >> 1


def stream(seed: int, purpose: str, *ids: int | str) -> torch.Generator:
    """A CPU generator that is a pure function of its arguments.

    Drawing on the CPU and moving the result gives the same numbers on every device.
    """
    return torch.Generator("cpu").manual_seed(stream_seed(seed, purpose, *ids))
