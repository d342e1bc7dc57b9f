"""`lora-diffusion caption` and `queue caption`: a model looks at pictures and writes captions for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_diffusion.cli_base import DebugOption, app, errors_as_messages
from lora_diffusion.cli_queue import RootOption, announce, open_queue, queue_app
from lora_diffusion.progress import bar

if TYPE_CHECKING:
    from lora_diffusion.captioning.proposals import Proposals
    from lora_diffusion.config_captions import CaptionOrder

FolderArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="The pictures, also those in its subfolders.")]
CaptionerOption = Annotated[str, typer.Option(help="Folder of an image-to-text model such as BLIP, or a hub id.")]
PrefixOption = Annotated[str, typer.Option(help="Text in front of every caption, such as the trigger word.")]
SuffixOption = Annotated[str, typer.Option(help="Text behind every caption.")]
PromptOption = Annotated[
    str, typer.Option(help="How the caption begins (BLIP, GIT), or what the model is asked (models that chat).")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Caption also the pictures that have a caption; without it they are left.")
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Pictures at a time.")]
MaxTokensOption = Annotated[int, typer.Option(min=1, help="Length of a caption at most, in tokens of the model.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
PrecisionOption = Annotated[str, typer.Option(help="auto, fp32, fp16 or bf16.")]


@app.command()
def caption(
    folder: FolderArgument,
    captioner: CaptionerOption,
    prefix: PrefixOption = "",
    suffix: SuffixOption = "",
    prompt: PromptOption = "",
    overwrite: OverwriteOption = False,
    proposals: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write the captions into this file, none beside pictures.")
    ] = None,
    batch_size: BatchSizeOption = 4,
    max_tokens: MaxTokensOption = 60,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Let a model write captions, in text files beside the pictures. Pictures that have a caption are left alone."""
    with errors_as_messages(debug):
        from lora_diffusion.config_captions import CaptionOrder
        from lora_diffusion.errors import UserError

        if proposals and (proposals.exists() or not proposals.parent.is_dir()):
            reason = "there is such a file already" if proposals.exists() else "its folder is not there"
            raise UserError(f"--proposals {proposals}: {reason}. Choose another name.")
        order = CaptionOrder.of(
            folder=folder, captioner=captioner, prefix=prefix, suffix=suffix, prompt=prompt, overwrite=overwrite,
            write="none" if proposals else "all", batch_size=batch_size, max_tokens=max_tokens, device=device,
            precision=precision,
        )  # fmt: skip
        from lora_diffusion.caption_run import check_all_done, run_captions
        from lora_diffusion.captioning.proposals import Proposals

        made = Proposals()
        try:
            run_captions(order.caption, made, track=bar)
        finally:
            if proposals:
                made.write(proposals)
        typer.echo(_report(made, proposals))
        check_all_done(made)


@queue_app.command(name="caption")
def queue_caption(
    folder: FolderArgument,
    captioner: CaptionerOption,
    prefix: PrefixOption = "",
    suffix: SuffixOption = "",
    prompt: PromptOption = "",
    overwrite: OverwriteOption = False,
    propose: Annotated[
        bool, typer.Option("--propose", help="Write none: they are looked at and accepted in the web UI.")
    ] = False,
    batch_size: BatchSizeOption = 4,
    max_tokens: MaxTokensOption = 60,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    root: RootOption = Path(),
    debug: DebugOption = False,
) -> None:
    """Put a captioning at the end of the queue; it waits for the device as runs do."""
    with errors_as_messages(debug):
        from lora_diffusion.config_captions import CaptionOrder
        from lora_diffusion.errors import UserError

        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder. Name the folder of the pictures.")
        queue = open_queue(root)
        local = Path(captioner).expanduser()
        order = CaptionOrder.of(
            folder=folder.resolve(), captioner=str(local.resolve()) if local.exists() else captioner, prefix=prefix,
            suffix=suffix, prompt=prompt, overwrite=overwrite, write="none" if propose else "all",
            batch_size=batch_size, max_tokens=max_tokens, device=device, precision=precision,
        )  # fmt: skip
        announce(queue.add_captions(order))


@app.command(name="caption-job", hidden=True)
def caption_job(config: Path, folder: Path, debug: DebugOption = False) -> None:
    """One captioning of the queue, whose order is in CONFIG."""
    with errors_as_messages(debug):
        order = _read(config)
        from lora_diffusion.caption_run import run_caption_job
        from lora_diffusion.runs import RunFolder

        run_caption_job(order.caption, RunFolder(folder))


def _read(config: Path) -> CaptionOrder:
    from lora_diffusion.config_captions import CaptionOrder
    from lora_diffusion.config_file import read_text

    return CaptionOrder.parse(read_text(config), str(config))


def _report(made: Proposals, proposals: Path | None) -> str:
    num_written = sum(proposal.is_written for proposal in made.made.values())
    if proposals:
        return f"{len(made.made)} captions proposed in {proposals}"
    if not made.made and not made.problems:
        return "No caption written: every picture has one. --overwrite captions those too."
    changed = [name for name, proposal in made.made.items() if not proposal.is_written]
    left = f"; left as they are, for they were changed meanwhile: {', '.join(changed)}" if changed else ""
    return f"{num_written} captions written{left}"
