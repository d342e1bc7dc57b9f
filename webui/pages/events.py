"""How events of pages are run."""

from __future__ import annotations

from typing import Any

QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""What takes no time: it overtakes everything that waits."""

GO = "(address) => { if (address) window.location.assign(address); }"
"""In the browser, after an event whose answer is an address."""

LOADED = "while (!window.loraDiffusion) await new Promise((resolve) => setTimeout(resolve, 20));"
"""In the browser, within an async function: until our script is there, which may be later than Gradio's."""

TOOLS: dict[str, Any] = {
    "concurrency_id": "tools",
    "concurrency_limit": 2,
    "show_progress": "hidden",
    "api_visibility": "private",
}
"""Processes on adapter files: two at a time."""
