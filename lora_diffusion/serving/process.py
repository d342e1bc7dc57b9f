"""The engine as a process: loads the base, listens, says where it is, and ends within a step."""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
import uvicorn

from lora_diffusion.errors import UserError
from lora_diffusion.files import write_json_atomically
from lora_diffusion.generation.library import AdapterLibrary
from lora_diffusion.generation.request_line import base_name, choose_dtype, load_engine
from lora_diffusion.serving.app import Service, create_app
from lora_diffusion.serving.device import DeviceLock
from lora_diffusion.serving.orders import OrderBook
from lora_diffusion.serving.worker import Worker
from lora_diffusion.workspace import Workspace

logger = logging.getLogger(__name__)

RECORD = "engine.json"
_MB = 2**20


def serve(
    base: str,
    adapters: Sequence[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 7861,
    is_open: bool = False,
    token: str | None = None,
    workspace: Path | None = None,
    precision: str = "auto",
    configs: Path | None = None,
    batch_size: int = 8,
    memory_mb: int = 1024,
    end_when_idle_s: float | None = None,
) -> None:
    """Listens until SIGTERM, Ctrl-C or `POST /v1/shutdown`.

    adapters: folders. port: 0 for any free one. memory_mb: for adapters' weights. workspace: where the device's lock
    and engine.json are. end_when_idle_s: also end after so long without work, and as soon as another process has the
    device and nothing is left to draw. Raises UserError for a host that others can reach without a token, a token
    that cannot be sent, a folder that is none, a base that cannot be used, or a port that is taken.
    """
    check_token(token)
    check_exposure(host, token, is_open)
    for folder in adapters:
        if not folder.is_dir():
            raise UserError(f"--adapters {folder}: there is no such folder.")
    listener = _listen(host, port)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtype = choose_dtype(precision, device)
    engine = load_engine(base, dtype, device, configs=configs, batch_size=batch_size)
    library = AdapterLibrary(engine, adapters, budget_bytes=memory_mb * _MB)
    book = OrderBook()
    lock_name = "cpu" if device.type == "cpu" else f"cuda-{device.index}"
    lock = DeviceLock(Workspace(workspace).lock(lock_name) if workspace else None)
    own_token = token or secrets.token_urlsafe(24)
    server: uvicorn.Server

    def shutdown() -> None:
        server.should_exit = True

    def end_when_idle() -> None:
        logger.info("nothing to draw: the memory is free for others")
        shutdown()

    ending = {} if end_when_idle_s is None else {"idle_s": end_when_idle_s, "when_idle": end_when_idle}
    worker = Worker(engine, library, book, lock, base_name(base), **ending)
    record = Workspace(workspace).private / RECORD if workspace else None
    bound_port = listener.getsockname()[1]
    app = create_app(
        Service(
            engine,
            library,
            book,
            worker,
            base_name(base),
            str(dtype).removeprefix("torch."),
            shutdown,
            own_token,
        ),
        hosts=[_in_url(host)],
        token=token,
        on_start=lambda: _announce(record, host, bound_port, own_token, base),
        on_end=lambda: _withdraw(record),
    )
    # uvicorn passes the signals that ended it on to the handlers from before; an orderly end is no failure
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5, server_header=False)
    )
    server.run(sockets=[listener])


def check_exposure(host: str, token: str | None, is_open: bool) -> None:
    """Raises UserError if others could reach the engine and nobody has said that they may."""
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        is_loopback = False
    if not (is_loopback or token or is_open):
        raise UserError(
            f"--host {host}: everyone in the network could draw with this engine and see its pictures. Add --token "
            "TOKEN, which clients then must send, or --open to allow everyone."
        )


def check_token(token: str | None) -> None:
    """Raises UserError for a token that clients cannot send, or each in another way."""
    if token is not None and not (token.isascii() and token.isprintable() and token and token == token.strip()):
        raise UserError(
            "--token: clients could not send this one, or would each encode it in another way. Use the letters a to z, "
            "digits and signs of ASCII, without spaces around them."
        )


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror or error}). Choose another port; 0 is "
            "any free one."
        ) from error


def _in_url(host: str) -> str:
    return f"[{host.strip('[]')}]" if ":" in host else host


def _announce(record: Path | None, host: str, port: int, token: str, base: str) -> None:
    logger.info("drawing with %s on http://%s:%d", base_name(base), _in_url(host), port)
    if record is None:
        return
    record.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    record.touch(mode=0o600)  # it holds the token; replacing it keeps its mode
    write_json_atomically(
        record,
        {
            "pid": os.getpid(),
            "process_start": psutil.Process().create_time(),
            "host": host,
            "port": port,
            "token": token,
            "base": base_name(base),
        },
    )


def _withdraw(record: Path | None) -> None:
    if record is not None:
        record.unlink(missing_ok=True)
