"""`lora-diffusion merge`, `extract` and `bake`: adapters mixed, taken out of models and put into them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_diffusion.cli_base import DebugOption, app, errors_as_messages
from lora_diffusion.progress import bar

OutOption = Annotated[Path, typer.Option(help="The adapter file to write.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the result if it exists.")]
PrecisionOption = Annotated[str, typer.Option(help="auto (that of the inputs), fp16, bf16 or fp32.")]


@app.command()
def merge(
    adapters: Annotated[list[str], typer.Argument(metavar="FILE[:WEIGHT]...", help="Adapters, each with its weight.")],
    out: OutOption,
    method: Annotated[str, typer.Option(help="concat (exact), svd (shortened), ties or dare.")] = "concat",
    rank: Annotated[int | None, typer.Option(help="Rank of the result; not for concat.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Instead of a rank: share of each squared change to keep, as 0.99.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="Share of entries that ties and dare keep (0.5).")] = None,
    seed: Annotated[int, typer.Option(help="Decides which entries dare drops.")] = 0,
    block_weight: Annotated[
        list[str] | None,
        typer.Option(metavar="[N:]PATTERN=FACTOR", help="A factor for parts of all adapters, or the Nth; repeatable."),
    ] = None,
    base: Annotated[Path | None, typer.Option(help="The base on disk; needed for DoRA only.")] = None,
    precision: PrecisionOption = "auto",
    format: Annotated[str, typer.Option(help="kohya, or peft for diffusers.")] = "kohya",
    overwrite: OverwriteOption = False,
    debug: DebugOption = False,
) -> None:
    """Make one LoRA of several adapters of any rank and kind, each times its weight."""
    with errors_as_messages(debug):
        from lora_diffusion.formats.argument import parse_adapter

        inputs = [parse_adapter(text, "merge") for text in adapters]

        from lora_diffusion.tools.block_weights import parse_block_weight
        from lora_diffusion.tools.merge import MergeSettings, merge_adapters
        from lora_diffusion.tools.summaries import render_merge

        block_weights = [parse_block_weight(text) for text in block_weight or ()]
        settings = MergeSettings(method, rank, energy, density, seed, block_weights, base, precision, format)
        render_merge(merge_adapters(inputs, out, settings, overwrite=overwrite, track=bar))


@app.command()
def extract(
    base: Annotated[Path, typer.Option(help="The model that was tuned: a diffusers folder or a .safetensors file.")],
    tuned: Annotated[Path, typer.Option(help="What became of it; its form may differ from the base's.")],
    rank: Annotated[int, typer.Option(help="Rank of every layer.")],
    out: OutOption,
    conv_rank: Annotated[
        int | None, typer.Option(help="Rank in resnets, down- and upsamplers; the same if left out.")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Share of each layer's squared change after which its rank may stop, as 0.99.")
    ] = None,
    precision: PrecisionOption = "auto",
    overwrite: OverwriteOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a LoRA of the difference between two models, and say what it cannot hold."""
    with errors_as_messages(debug):
        from lora_diffusion.tools.extract import ExtractSettings, extract_adapter
        from lora_diffusion.tools.summaries import render_extract

        settings = ExtractSettings(rank, conv_rank, energy, precision)
        render_extract(extract_adapter(base, tuned, out, settings, overwrite=overwrite, track=bar))


@app.command()
def bake(
    base: Annotated[Path, typer.Option(help="A diffusers folder or a .safetensors checkpoint; it is not changed.")],
    adapter: Annotated[
        list[str], typer.Option(metavar="FILE[:STRENGTH]", help="An adapter and its strength (1.0); repeatable.")
    ],
    out: Annotated[Path, typer.Option(help="A new folder, or a new .safetensors file, like the base.")],
    debug: DebugOption = False,
) -> None:
    """Copy a base with adapters in its weights, for programs that read no adapters."""
    with errors_as_messages(debug):
        from lora_diffusion.formats.argument import parse_adapter

        inputs = [parse_adapter(text) for text in adapter]

        from lora_diffusion.tools.bake import bake_adapters
        from lora_diffusion.tools.summaries import render_bake

        render_bake(bake_adapters(base, inputs, out, track=bar))
