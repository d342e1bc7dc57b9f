"""`lora-diffusion import`: settings of sd-scripts and kohya_ss as ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_diffusion.cli_base import DebugOption, app, errors_as_messages


@app.command(name="import")
def import_file(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="KOHYA", help="A --config_file or dataset config of sd-scripts (TOML), or a JSON file of kohya_ss."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="X.toml", help="The config to write, never the input.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Set what the file lacks, or otherwise; repeatable."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there already.")] = False,
    debug: DebugOption = False,
) -> None:
    """Translate settings of sd-scripts or kohya_ss, and list what has no equal here. Trains nothing."""
    with errors_as_messages(debug):
        from lora_diffusion.files import write_text_atomically
        from lora_diffusion.kohya.write import import_settings
        from lora_diffusion.tools.outputs import check_output

        check_output(out, [source], overwrite=overwrite, ending=".toml")
        imported = import_settings(source, overrides or ())
        write_text_atomically(out, imported.text)
        typer.echo(f"{imported.report()}\n{out} is written. Look at it with: lora-diffusion check --config {out}")
