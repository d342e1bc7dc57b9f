"""Commands that draw for others to choose from: `grid` and `serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_diffusion.cli_base import DebugOption, app, errors_as_messages
from lora_diffusion.progress import bar
from lora_diffusion.timesteps import max_denoising_steps

if TYPE_CHECKING:
    from lora_diffusion.generation.sheet import Axis

BaseOption = Annotated[str, typer.Option(help="Diffusers folder, single .safetensors file or hub id.")]
PrecisionOption = Annotated[str, typer.Option(help="auto, fp32, fp16 or bf16.")]
ConfigsOption = Annotated[
    Path | None, typer.Option(help="Diffusers folder with the configs and the tokenizer of a single-file base.")
]


@app.command()
def grid(
    base: BaseOption,
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    x: Annotated[str, typer.Option("--x", metavar="SETTING=VALUE,…", help="Columns, as in strength=0,0.5,1.")],
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="The sheet.")],
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:STRENGTH]", help="An adapter and its strength (1.0); repeatable.")
    ] = None,
    y: Annotated[str | None, typer.Option("--y", metavar="SETTING=VALUE,…", help="Rows.")] = None,
    z: Annotated[str | None, typer.Option("--z", metavar="SETTING=VALUE,…", help="Sheets below one another.")] = None,
    negative: Annotated[str, typer.Option(help="What to keep out of the picture.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="The same in all cells, unless it is an axis.")] = 0,
    steps: Annotated[int, typer.Option(min=1, max=max_denoising_steps(), help="Denoising steps.")] = 25,
    cfg: Annotated[float, typer.Option(min=1.0, help="Guidance scale; 1 switches it off.")] = 7.0,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels; the model's own size if left out.")] = None,
    sampler: Annotated[str, typer.Option(help="For example ddim, euler, euler-a, dpm++2m-karras, unipc.")] = "ddim",
    clip_skip: Annotated[int, typer.Option(min=1, help="1 is the text encoder's last layer.")] = 1,
    precision: PrecisionOption = "auto",
    configs: ConfigsOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there already.")] = False,
    debug: DebugOption = False,
) -> None:
    """Draw a sheet: strength, checkpoint, adapter, prompt, seed, cfg, sampler or steps along two or three axes.

    `checkpoint=a.safetensors,b.safetensors` takes the place of the first --adapter; `adapter=ink+neon:0.5,ink,none`
    names sets of the --adapter files; `prompt=red|blue|green` replaces the first term by the others.
    """
    with errors_as_messages(debug):
        from lora_diffusion.errors import UserError
        from lora_diffusion.formats.argument import parse_adapters
        from lora_diffusion.generation.request import Request, adapter_name
        from lora_diffusion.generation.request_line import parse_size, write_sheet
        from lora_diffusion.generation.sheet import Sheet, parse_axis
        from lora_diffusion.tools.outputs import check_output, check_output_folder

        if out.suffix.lower() != ".png":
            raise UserError(f"--out {out}: the sheet is a PNG. Give the file a name that ends in .png.")
        if out.is_dir():
            raise UserError(f"--out {out}: this is a folder. Choose another name.")
        check_output_folder(out.parent)
        if out.exists():
            check_output(out, (), overwrite=overwrite, ending=out.suffix)
        chosen = parse_adapters(adapter or ())
        request = Request(
            prompt=prompt,
            negative=negative,
            seed=seed,
            steps=steps,
            cfg=cfg,
            size=parse_size(size) if size else None,
            sampler=sampler,
            clip_skip=clip_skip,
            adapters={adapter_name(path.stem): strength for path, strength in chosen.items()},
        )
        files = dict.fromkeys(chosen)
        axes: dict[str, Axis] = {}
        for name, text in (("x", x), ("y", y), ("z", z)):
            if text:
                axes[name] = _with_names(parse_axis(text, f"--{name}"), files)
        write_sheet(base, list(files), Sheet(request, **axes), out, precision=precision, configs=configs, track=bar)
        typer.echo(out)


def _with_names(axis: Axis, files: dict[Path, None]) -> Axis:
    """An axis of checkpoint files with the names that requests know them by; the files join `files`."""
    from dataclasses import replace

    from lora_diffusion.generation.request import adapter_name
    from lora_diffusion.generation.sheet import NONE

    if axis.name != "checkpoint":
        return axis
    files |= {Path(value): None for value in axis.values if value != NONE}
    return replace(axis, values=tuple(v if v == NONE else adapter_name(Path(v).stem) for v in axis.values))


@app.command()
def serve(
    base: BaseOption,
    adapters: Annotated[list[Path], typer.Option(metavar="DIR", help="Folder with adapter files; repeatable.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 7861,
    is_open: Annotated[bool, typer.Option("--open", help="Let everyone who can reach it draw.")] = False,
    token: Annotated[str | None, typer.Option(help="What clients must send as a bearer token.")] = None,
    workspace: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Share the device with the queue of this workspace.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=64, help="Pictures drawn together at most.")] = 8,
    memory_mb: Annotated[
        int, typer.Option(min=1, help="Memory for adapters' weights; the least used go first.")
    ] = 1024,
    end_when_idle: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=1,
            help="End after so long without work, and when another process of the workspace has the device.",
        ),
    ] = None,
    precision: PrecisionOption = "auto",
    configs: ConfigsOption = None,
    debug: DebugOption = False,
) -> None:
    """Draw for other programs over HTTP: one process that owns the base, with all adapters of a folder by name."""
    with errors_as_messages(debug):
        try:
            from lora_diffusion.serving.process import serve as run
        except ModuleNotFoundError as error:
            from lora_diffusion.errors import UserError

            if error.name not in ("fastapi", "uvicorn", "starlette"):
                raise
            raise UserError(f"{error.name} is missing. Install it: pip install 'lora-diffusion[serve]'.") from None
        run(
            base,
            adapters,
            host=host,
            port=port,
            is_open=is_open,
            token=token,
            workspace=workspace,
            precision=precision,
            configs=configs,
            batch_size=batch_size,
            memory_mb=memory_mb,
            end_when_idle_s=end_when_idle,
        )
