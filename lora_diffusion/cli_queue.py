"""`lora-diffusion queue …` and `runner`: runs that wait for their turn and survive what happens around them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_diffusion.cli_base import DebugOption, app, errors_as_messages

if TYPE_CHECKING:
    from lora_diffusion.jobs.queue import Job, Queue

queue_app = typer.Typer(name="queue", help="Runs that wait for their turn, one after the other.", no_args_is_help=True)
app.add_typer(queue_app)

RootOption = Annotated[Path, typer.Option("--root", help="The workspace: the folder with runs/ in it.")]
JobArgument = Annotated[int, typer.Argument(metavar="ID", help="As `queue list` shows it.")]

NEGATIVE_IDS = {"ignore_unknown_options": True}  # -17 is the ID of a run, not an option

_COLOURS = {"running": "green", "starting": "green", "finished": "cyan", "failed": "red", "interrupted": "red"}


@queue_app.command()
def add(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's TOML file.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting; repeatable.")
    ] = None,
    root: RootOption = Path(),
    debug: DebugOption = False,
) -> None:
    """Put a run at the end of the queue. It starts at once if nothing is before it, and needs no open terminal."""
    with errors_as_messages(debug):
        from lora_diffusion.config import TrainConfig
        from lora_diffusion.config_file import read_text

        settings = TrainConfig.load(config, overrides or ())
        toml = settings.to_toml() if overrides else read_text(config)
        announce(open_queue(root).add(toml))


@queue_app.command(name="list")
def list_jobs(
    as_json: Annotated[bool, typer.Option("--json", help="Print the jobs as JSON.")] = False,
    root: RootOption = Path(),
    debug: DebugOption = False,
) -> None:
    """Show what waits, runs and ended. A negative ID is a run that was started from a terminal."""
    with errors_as_messages(debug):
        queue = open_queue(root)
        jobs = queue.jobs()
        if as_json:
            typer.echo(json.dumps([asdict(job) | {"run": str(job.run)} for job in jobs], indent=2))
        else:
            _print_table(jobs)
        if queue.keep_going():
            typer.echo("The process that works through the queue was gone: it is started again.", err=True)


@queue_app.command(context_settings=NEGATIVE_IDS)
def pause(id: JobArgument, root: RootOption = Path(), debug: DebugOption = False) -> None:
    """Let a run save everything and free the device; `resume` continues it bit for bit."""
    _ask(root, debug, lambda queue: queue.pause(id))


@queue_app.command(context_settings=NEGATIVE_IDS)
def resume(id: JobArgument, root: RootOption = Path(), debug: DebugOption = False) -> None:
    """Continue a run that was paused, stopped or interrupted, before all that wait."""
    _ask(root, debug, lambda queue: queue.resume(id))


@queue_app.command(context_settings=NEGATIVE_IDS)
def stop(id: JobArgument, root: RootOption = Path(), debug: DebugOption = False) -> None:
    """Let a run save everything and end."""
    _ask(root, debug, lambda queue: queue.stop(id))


@queue_app.command(context_settings=NEGATIVE_IDS)
def cancel(id: JobArgument, root: RootOption = Path(), debug: DebugOption = False) -> None:
    """Take a run that has not begun out of the queue."""
    _ask(root, debug, lambda queue: queue.cancel(id))


@queue_app.command(context_settings=NEGATIVE_IDS)
def retry(id: JobArgument, root: RootOption = Path(), debug: DebugOption = False) -> None:
    """Put a run that ended early at the end of the queue: it continues from its newest checkpoint if it has one."""
    _ask(root, debug, lambda queue: queue.retry(id))


@queue_app.command()
def move(
    id: JobArgument,
    position: Annotated[int, typer.Argument(metavar="POSITION", min=1, help="1 is next.")],
    root: RootOption = Path(),
    debug: DebugOption = False,
) -> None:
    """Change the order of what waits."""
    _ask(root, debug, lambda queue: queue.move(id, position))


@app.command()
def runner(root: RootOption = Path(), debug: DebugOption = False) -> None:
    """Work through the queue in this terminal. `queue add` starts this by itself, without a terminal."""
    with errors_as_messages(debug):
        from lora_diffusion.jobs.runner import Runner, work

        workspace = open_queue(root.resolve()).workspace
        minutes = Runner.idle_s / 60
        typer.echo(f"Working through the queue of {workspace.root}; ends after {minutes:g} minutes without a run.")
        if not work(workspace):
            typer.echo("Another runner works here already and goes on; this one is not needed.")


def open_queue(root: Path) -> Queue:
    """The queue of a workspace. Raises UserError if `root` is no folder."""
    from lora_diffusion.errors import UserError
    from lora_diffusion.jobs.queue import Queue
    from lora_diffusion.workspace import Workspace

    if not root.is_dir():
        raise UserError(f"--root {root} is not a folder. Name the folder that runs/ is or shall be in.")
    return Queue(Workspace(root))


def announce(job: Job) -> None:
    """Tell that a job was added."""
    place = f" at place {job.position}" if job.position else ""
    where = f", run folder {job.run}" if job.kind == "train" else ""
    typer.echo(f"job {job.id}: {job.title} is {job.status}{place}{where}")


def _ask(root: Path, debug: bool, request: Callable[[Queue], None]) -> None:
    with errors_as_messages(debug):
        request(open_queue(root))


def _print_table(jobs: list[Job]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if not jobs:
        typer.echo("No runs yet. lora-diffusion queue add CONFIG puts one into the queue.")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("ID", "name", "status", "step", "time left", "run folder"):
        table.add_column(column, overflow="fold")
    for job in jobs:
        status = f"queued, {job.position}." if job.position else job.status
        colour = _COLOURS.get(job.status, "default")
        steps = f"{job.step}/{job.steps}" if job.steps else str(job.step)
        table.add_row(
            str(job.id), escape(job.title), f"[{colour}]{status}[/]", steps, _time_left(job), escape(str(job.run))
        )
    console = Console()
    console.print(table)
    for job in jobs:
        if job.error is not None and job.id > 0:
            console.print(
                f"\njob {job.id}: {job.error.message} {job.error.hint}".rstrip(), markup=False, highlight=False
            )


def _time_left(job: Job) -> str:
    if job.seconds_per_step is None:
        return ""
    minutes, seconds = divmod(round((job.steps - job.step) * job.seconds_per_step), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
