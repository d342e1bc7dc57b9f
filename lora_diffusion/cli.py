"""`lora-diffusion …`: thin commands over the packages. Heavy imports happen inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_diffusion import cli_captions, cli_files, cli_import, cli_merge, cli_queue, cli_serve, cli_sweep, cli_ui
from lora_diffusion.cli_base import DebugOption, app, errors_as_messages
from lora_diffusion.launch import end_quickly, lasting_imports, spin_briefly
from lora_diffusion.progress import bar, silent
from lora_diffusion.timesteps import max_denoising_steps

if TYPE_CHECKING:
    from lora_diffusion.generation.request import Request

# Importing the other files adds their commands.
__all__ = [
    "app",
    "cli_captions",
    "cli_files",
    "cli_import",
    "cli_merge",
    "cli_queue",
    "cli_serve",
    "cli_sweep",
    "cli_ui",
    "errors_as_messages",
    "main",
    "train",
]

ConfigOption = Annotated[Path, typer.Option("--config", help="The run's TOML file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting; repeatable.")
]


@app.command()
def train(
    config: ConfigOption,
    overrides: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    debug: DebugOption = False,
) -> None:
    """Train an adapter. Ctrl-C finishes the step, saves and ends; `--resume` continues bit for bit."""
    with errors_as_messages(debug):
        from lora_diffusion.config import TrainConfig

        settings = TrainConfig.load(config, overrides or ())  # before torch: a typo is told within a second
        with lasting_imports():
            from lora_diffusion.training_run import run_training

        run_training(settings, resume=resume)


@app.command()
def check(
    config: ConfigOption,
    overrides: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Look at a run before it starts: pictures, captions, buckets, steps, time and memory. Trains nothing."""
    with errors_as_messages(debug):
        from lora_diffusion.config import TrainConfig

        settings = TrainConfig.load(config, overrides or ())
        with lasting_imports():
            from lora_diffusion.check import check_run, render_report

        report = check_run(settings, track=silent if as_json else bar)
        if as_json:
            typer.echo(report.to_json())
        else:
            render_report(report)


@app.command()
def generate(
    base: Annotated[str, typer.Option(help="Diffusers folder, single .safetensors file or hub id.")],
    prompt: Annotated[list[str], typer.Option(help="What to draw; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")],
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:STRENGTH]", help="An adapter and its strength (1.0); repeatable.")
    ] = None,
    negative: Annotated[str, typer.Option(help="What to keep out of the picture.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="The first picture's seed; each further one adds 1.")] = 0,
    steps: Annotated[int, typer.Option(min=1, max=max_denoising_steps(), help="Denoising steps.")] = 25,
    cfg: Annotated[float, typer.Option(min=1.0, help="Guidance scale; 1 switches it off.")] = 7.0,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels; the model's own size if left out.")] = None,
    sampler: Annotated[str, typer.Option(help="For example ddim, euler, euler-a, dpm++2m-karras, unipc.")] = "ddim",
    count: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 1,
    clip_skip: Annotated[int, typer.Option(min=1, help="1 is the text encoder's last layer.")] = 1,
    precision: Annotated[str, typer.Option(help="auto, fp32, fp16 or bf16.")] = "auto",
    configs: Annotated[
        Path | None, typer.Option(help="Diffusers folder with the configs and the tokenizer of a single-file base.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Draw pictures with any number of adapters, each at its own strength."""
    with errors_as_messages(debug):
        from lora_diffusion.formats.argument import parse_adapters
        from lora_diffusion.tools.outputs import check_output_folder

        check_output_folder(out)
        with lasting_imports():
            from lora_diffusion.generation.request_line import parse_size, write_pictures

        adapters = parse_adapters(adapter or ())
        picture_size = parse_size(size) if size else None

        from lora_diffusion.generation.request import Request, adapter_name

        requests: list[Request] = [
            Request(
                prompt=text,
                negative=negative,
                seed=seed + index,
                steps=steps,
                cfg=cfg,
                size=picture_size,
                sampler=sampler,
                clip_skip=clip_skip,
                adapters={adapter_name(path.stem): strength for path, strength in adapters.items()},
            )
            for text in prompt
            for index in range(count)
        ]
        files = list(adapters)
        for path in write_pictures(base, files, requests, out, precision=precision, configs=configs, track=bar):
            typer.echo(path)


def main() -> None:
    spin_briefly()
    end_quickly()
    app()
