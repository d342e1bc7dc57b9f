"""Programs that use the web UI, several in one process: what they call, how long it took, what went wrong.

    python -m tests.webui.clients URL FIRST NUMBER SECONDS

connects clients FIRST … FIRST + NUMBER - 1, prints a line, waits for one, and prints what they saw as JSON. Many
threads of one Python process would measure how they wait for each other.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

PAUSE_S = (1.0, 3.0)
"""Between two calls of a client. The pages ask every two seconds."""
PICTURE = {"base": "samples/base", "prompt": "a red house", "steps": 2, "width": 64, "height": 64}


@dataclass
class Seen:
    """What the clients of one process saw. calls: (name, seconds). runs: ids that were accepted."""

    calls: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])
    errors: list[str] = field(default_factory=list[str])
    busy: int = 0
    runs: list[str] = field(default_factory=list[str])

    def timed(self, name: str, call: Callable[[], Any]) -> Any:
        began = time.monotonic()
        try:
            return call()
        except Exception as error:
            if "Busy" in str(error):
                self.busy += 1
            else:
                self.errors.append(f"{name}: {type(error).__name__}: {error}")
        finally:
            self.calls.append((name, time.monotonic() - began))


class Program:
    """One client: looks at the queue, adds and stops runs, orders pictures, and asks as the pages do."""

    def __init__(self, url: str, seen: Seen, number: int) -> None:
        from gradio_client import Client

        self.seen = seen
        self.chance = random.Random(number)
        self.name = f"client{number}"
        # Plain HTTP: the client would load all certificates again for each call, which takes longer than the call.
        self.client = Client(url, verbose=False, ssl_verify=False)
        self.http = httpx.Client(base_url=url, trust_env=False, timeout=60)
        self.pages = [
            (item["id"], len(item["inputs"]))
            for item in self.client.config["dependencies"]
            if str(item["api_name"]).startswith("refresh") and len(item["inputs"]) < 3
        ]
        self.ordered: list[int] = []
        self.runs: list[str] = []

    def work(self, until: float) -> None:
        while time.monotonic() < until:
            time.sleep(self.chance.uniform(*PAUSE_S))
            self.act(self.chance.random())

    def act(self, choice: float) -> None:
        if choice < 0.1:
            self.seen.timed("healthz", lambda: self.http.get("/healthz").raise_for_status())
        elif choice < 0.35:
            self.page()
        elif choice < 0.55:
            self.call("status")
        elif choice < 0.75:
            self.call("list_runs")
        elif choice < 0.85:
            made = self.call("draw", seed=self.chance.randrange(1000), **PICTURE)
            self.ordered += [made["number"]] if made else []
        elif choice < 0.93 and self.ordered:
            drawing = self.call("drawing", self.ordered[-1])
            if drawing and drawing["phase"] == "failed":
                self.seen.errors.append(drawing["message"])
        elif choice < 0.97 and len(self.runs) < 2:
            made = self.call("queue_run", config_of(self.name))
            self.runs += [made["id"]] if made else []
            self.seen.runs += [made["id"]] if made else []
        elif self.runs:
            self.call("stop_run", self.runs[0])

    def call(self, name: str, *values: Any, **named: Any) -> Any:
        return self.seen.timed(name, lambda: self.client.predict(*values, **named, api_name=f"/{name}"))

    def page(self) -> None:
        """What an open page asks every two seconds."""
        id, num_inputs = self.chance.choice(self.pages)
        body = {"data": [None, "[]"][:num_inputs], "fn_index": id, "session_hash": self.name, "event_data": None}
        self.seen.timed("page", lambda: self.http.post("/gradio_api/run/predict", json=body).raise_for_status())


def config_of(name: str) -> str:
    return f'[run]\nname = "{name}"\nsteps = 2000\n[model]\npath = "base"\n[[dataset]]\npath = "data/shapes"\n'


def main(url: str, first: int, number: int, seconds: float) -> None:
    seen = Seen()
    programs = [Program(url, seen, index) for index in range(first, first + number)]
    print("connected", flush=True)
    sys.stdin.readline()
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=program.work, args=(until,), daemon=True) for program in programs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 60)
        if thread.is_alive():
            seen.errors.append("a call was not answered within a minute")
    print(json.dumps(vars(seen)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
