"""`lora-diffusion sweep`: several runs that differ a little, trained together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_diffusion.cli_base import DebugOption, app, errors_as_messages
from lora_diffusion.errors import UserError
from lora_diffusion.launch import lasting_imports


@app.command()
def sweep(
    config: Annotated[list[Path], typer.Option("--config", help="A run's TOML file; several are the members.")],
    vary: Annotated[
        list[str] | None,
        typer.Option("--vary", metavar="SECTION.KEY=A,B", help="A setting and its values; repeatable, all combine."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting of all; repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue every member that is not finished.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for what compares them; `<output>-sweep` if left out.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Train several adapters at once on one base that they share: a grid of settings, or several configs."""
    with errors_as_messages(debug):
        from lora_diffusion.config import TrainConfig
        from lora_diffusion.config_sweep import check_together, grid, parse_variation, written_out

        if vary and len(config) > 1:
            raise UserError("--vary and several --config are two ways to say what the members are; use one.")
        settings = overrides or []
        members = (
            grid(config[0], settings, [parse_variation(text) for text in vary])
            if vary
            else written_out(config, settings)
        )
        check_together(members)  # before torch: what is wrong is told within a second
        output = TrainConfig.load(config[0], settings).run.output if vary else members[0].config.run.output
        from lora_diffusion.tools.outputs import check_output_folder

        comparison = out or output.with_name(f"{output.name}-sweep")
        check_output_folder(comparison)
        with lasting_imports():
            from lora_diffusion.sweep_run import run_sweep

        run_sweep(members, comparison, resume=resume)
