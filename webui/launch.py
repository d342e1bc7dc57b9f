"""Starting the web server: who may reach it, and what it can see."""

from __future__ import annotations

import ipaddress
import logging
import os
import shutil
import signal
import socket
import threading
import time
import warnings
import webbrowser
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.errors import UserError
from lora_diffusion.jobs.queue import Queue
from lora_diffusion.workspace import Workspace
from webui.login import Login

logger = logging.getLogger(__name__)

SHUTDOWN_S = 2
LOOK_EVERY_S = 10.0
"""So often it is looked whether the process that works through the queue is missed."""


@dataclass(frozen=True)
class Options:
    """The options of `lora-diffusion ui`."""

    host: str = "127.0.0.1"
    port: int = 7860
    root: Path = Path()
    allow: tuple[Path, ...] = ()
    auth: str | None = None
    is_open: bool = False
    names: tuple[str, ...] = ()
    opens_browser: bool = True


def serve(options: Options) -> None:
    """Serve the pages until Ctrl-C. Raises UserError where that would be unsafe or impossible."""
    login = login_of(options)
    roots = [folder.expanduser().resolve() for folder in (options.root, *options.allow)]
    for folder in roots:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder.")
    _check_port(options.host, options.port)
    _leave_for_an_empty_folder(Workspace(roots[0]))

    import uvicorn

    from webui.server import make_app
    from webui.services.site import make_site

    site = make_site(roots[0], tuple(roots[1:]))
    any_address = not is_loopback(options.host)
    with warnings.catch_warnings():
        # Gradio says so for every mounted app, also for one that never asked for it.
        warnings.filterwarnings("ignore", "SSR mode is not supported", UserWarning)
        app = make_app(site, options.names, any_address=any_address, login=login)
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    address = address_of(options)
    print(f"The web UI of {roots[0]} is at {address} (Ctrl-C ends it; runs go on)", flush=True)
    threading.Thread(target=keep_queue_going, args=(site.queue,), daemon=True, name="queue").start()
    if options.opens_browser:
        threading.Timer(1.0, webbrowser.open, [address]).start()
    # uvicorn passes the signals that ended it on to the handlers from before; an orderly end is no failure
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    uvicorn.Server(config).run()


def keep_queue_going(queue: Queue) -> None:
    """As long as the web UI lives, also if nobody looks at a page: what waits does not wait for a dead runner."""
    told = ""
    while True:
        try:
            if queue.keep_going():
                logger.warning("The process that works through the queue was gone: it is started again.")
            told = ""
        except (UserError, OSError) as error:
            if str(error) != told:  # once, not every few seconds
                logger.warning("The queue does not go on: %s", error)
            told = str(error)
        time.sleep(LOOK_EVERY_S)


def address_of(options: Options) -> str:
    """What to type into the browser of this machine."""
    host = "127.0.0.1" if options.host in ("0.0.0.0", "::") else options.host
    return f"http://{f'[{host}]' if ':' in host else host}:{options.port}"


def login_of(options: Options) -> Login | None:
    """Raises UserError if others could reach the server and nobody said that this is meant."""
    if options.auth is not None:
        user, colon, password = options.auth.partition(":")
        if not (user and colon and password):
            raise UserError("--auth takes a name and a password with a colon between: --auth me:secret")
        return Login(user, password)
    if not is_loopback(options.host) and not options.is_open:
        raise UserError(
            f"--host {options.host}: others could reach the web UI, start runs and see your pictures. "
            "Add --auth USER:PASSWORD, or --open if everyone who can reach it may."
        )
    return None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"{host}:{port} cannot be used: {error.strerror}. Choose another one with --port."
            ) from None


def _leave_for_an_empty_folder(workspace: Workspace) -> None:
    """Gradio keeps uploads in a folder of ours, emptied at every start, and finds nothing where it runs."""
    uploads, empty = workspace.private / "uploads", workspace.private / "empty"
    shutil.rmtree(uploads, ignore_errors=True)
    for folder in (uploads, empty):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    os.chdir(empty)
