"""`lora-diffusion inspect`, `convert`, `resize`, `overlap`: thin commands over the tools on adapter files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_diffusion.cli_base import DebugOption, app, errors_as_messages
from lora_diffusion.progress import bar, silent

JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
PlotOption = Annotated[Path | None, typer.Option("--plot", metavar="OUT.png", help="Draw it into a picture as well.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there already.")]
InArgument = Annotated[Path, typer.Argument(metavar="IN", help="The adapter file to read.")]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="The file to write, never an input.")]


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="An adapter file.")],
    as_json: JsonOption = False,
    plot: PlotOption = None,
    overwrite: OverwriteOption = False,
    debug: DebugOption = False,
) -> None:
    """Tell what an adapter file holds and what other programs make of it. No base model is needed."""
    with errors_as_messages(debug):
        from lora_diffusion.tools.inspect import inspect_file, plot_inspection
        from lora_diffusion.tools.outputs import check_output
        from lora_diffusion.tools.tables import print_inspection

        if plot:
            check_output(plot, [file], overwrite=overwrite, ending=".png")
        report = inspect_file(file, track=silent if as_json else bar)
        if as_json:
            typer.echo(report.to_json())
        else:
            print_inspection(report)
        if plot:
            plot_inspection(report, plot)


@app.command()
def convert(
    source: InArgument,
    target: OutArgument,
    format: Annotated[str, typer.Option(metavar="kohya|peft", help="Names of the modules in the output.")],
    precision: Annotated[
        str, typer.Option(metavar="same|fp16|bf16|fp32", help="Of the weights; `same` keeps every bit.")
    ] = "same",
    overwrite: OverwriteOption = False,
    debug: DebugOption = False,
) -> None:
    """Rewrite an adapter in the names of kohya, which all programs read, or PEFT, for diffusers."""
    with errors_as_messages(debug):
        from lora_diffusion.tools.convert import convert_file
        from lora_diffusion.tools.tables import print_conversion

        print_conversion(target, convert_file(source, target, format, precision=precision, overwrite=overwrite))


@app.command()
def resize(
    source: InArgument,
    target: OutArgument,
    rank: Annotated[int | None, typer.Option(min=1, help="Of every module.")] = None,
    energy: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Keep this share of each module's squared singular values.")
    ] = None,
    conv_rank: Annotated[int | None, typer.Option(min=1, help="Of 3x3 convolutions, beside --rank.")] = None,
    overwrite: OverwriteOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a LoRA of lower rank that is as near as can be; LoHa and LoKr become LoRA."""
    with errors_as_messages(debug):
        from lora_diffusion.tools.resize import resize_file
        from lora_diffusion.tools.tables import print_resizing

        options = {"rank": rank, "conv_rank": conv_rank}
        print_resizing(target, resize_file(source, target, energy=energy, overwrite=overwrite, track=bar, **options))


@app.command()
def overlap(
    files: Annotated[list[Path], typer.Argument(metavar="A B [C …]", help="Adapter files for one model family.")],
    as_json: JsonOption = False,
    plot: PlotOption = None,
    overwrite: OverwriteOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare adapters: do they move the model in the same directions, and where?"""
    with errors_as_messages(debug):
        from lora_diffusion.tools.outputs import check_output
        from lora_diffusion.tools.overlap import ALIKE, overlap_of_files, plot_overlap
        from lora_diffusion.tools.tables import print_overlap

        if plot:
            check_output(plot, files, overwrite=overwrite, ending=".png")
        report = overlap_of_files(files, track=silent if as_json else bar)
        if as_json:
            typer.echo(report.to_json())
        else:
            print_overlap(report, ALIKE)
        if plot:
            plot_overlap(report, plot)
