"""`lora-diffusion ui`: the pages in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_diffusion.cli_base import DebugOption, app, errors_as_messages
from lora_diffusion.errors import UserError


@app.command()
def ui(
    host: Annotated[str, typer.Option(help="Address to listen on; 127.0.0.1 is this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    root: Annotated[Path, typer.Option(help="The workspace: the folder with runs/ and data/ in it.")] = Path(),
    allow: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Another folder that may be used, such as a disk; repeatable.")
    ] = None,
    auth: Annotated[str | None, typer.Option(metavar="USER:PASSWORD", help="Ask everyone to log in.")] = None,
    is_open: Annotated[bool, typer.Option("--open", help="Let everyone in who reaches the address.")] = False,
    name: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="A host name to be called by, behind a proxy; repeatable.")
    ] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Open no browser.")] = False,
    debug: DebugOption = False,
) -> None:
    """Train in the browser: settings, queue, curves and samples. Runs go on when it is closed."""
    with errors_as_messages(debug):
        try:
            from webui.launch import Options, serve
        except ModuleNotFoundError as error:
            if (error.name or "").startswith(("lora_diffusion", "webui.")):
                raise
            raise UserError(
                f"The web UI needs the package {error.name}. Install what it needs: pip install -e '.[ui]'"
            ) from error
        serve(Options(host, port, root, tuple(allow or ()), auth, is_open, tuple(name or ()), not no_browser))
