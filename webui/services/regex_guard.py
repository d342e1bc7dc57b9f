"""Regular expressions of strangers: some patterns take years on a short text, and Python cannot interrupt them.

So they run in a process of their own that is ended after a while.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from lora_diffusion.data.sidecars import MAX_CAPTION_CHARACTERS
from lora_diffusion.errors import UserError

MAX_PATTERN = 4_000
"""Enough for a plain text of 2,000 characters with every one of them escaped."""

TIME_LIMIT_S = 5.0

_CHILD = """
import json, re, sys
task = json.load(sys.stdin)
limit = task["limit"]
pattern = re.compile(task["pattern"], task["flags"])
results = []
for text in task["texts"]:
    new = pattern.sub(task["to"], text)
    if len(new) > limit:
        sys.exit(3)
    results.append(new)
json.dump(results, sys.stdout)
"""


class RegexError(UserError):
    """A regular expression that is wrong or takes too long."""


def replace_in_all(
    pattern: str, to: str, texts: Sequence[str], *, ignore_case: bool = False, time_limit_s: float = TIME_LIMIT_S
) -> list[str]:
    r"""`re.sub` for every text. `to` may name groups: \1 or \g<name>. Raises RegexError."""
    flags = re.IGNORECASE if ignore_case else 0
    if len(pattern) > MAX_PATTERN:
        raise RegexError(f"The pattern has more than {MAX_PATTERN} characters.")
    try:
        re.compile(pattern, flags)
        re.sub(pattern, to, "", flags=flags)
    except (re.error, IndexError, OverflowError, RecursionError) as error:
        raise RegexError(f"This is not a regular expression: {error}.") from None
    task = {"pattern": pattern, "to": to, "flags": int(flags), "texts": list(texts), "limit": MAX_CAPTION_CHARACTERS}
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD],
            input=json.dumps(task),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=time_limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RegexError(
            f"The pattern was still searching after {time_limit_s:g} s and was stopped. Repeated groups inside "
            "repeated groups, such as (a+)+, take for ever; write it more plainly."
        ) from None
    if child.returncode == 3:
        raise RegexError(f"A caption would grow beyond {MAX_CAPTION_CHARACTERS:,} characters.")
    if child.returncode:
        last = child.stderr.strip().splitlines()[-1:] or ["it ended without a word"]
        raise RegexError(f"The replacement failed: {last[0]}")
    return json.loads(child.stdout)
