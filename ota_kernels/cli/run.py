"""`ota-merge run`: the whole job."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

import click

from .compat import mergekit_flags
from .options import merging


class _Signal(KeyboardInterrupt):
    def __init__(self, number: int) -> None:
        self.number = number


def _raise(number: int, _frame: object) -> None:
    raise _Signal(number)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGHUP as Ctrl-C, where nobody has them ignored (nohup)."""
    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        with contextlib.suppress(ValueError):  # not in the main thread
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@click.command()
@click.argument("recipe", type=click.Path(dir_okay=False))
@click.argument("out", type=click.Path())
@merging
@click.option(
    "--overwrite", is_flag=True, help="Replace OUT; without --resume, start an unfinished merge again."
)
@click.option(
    "--resume", is_flag=True, help="Go on with an unfinished merge; nothing to do if OUT is complete."
)
@click.option(
    "--dry-run", is_flag=True, help="Check everything that can be checked, print the plan, write nothing."
)
@click.option(
    "-I",
    "--intermediate-dir",
    type=click.Path(),
    help="Of a RECIPE of several documents: where named results go.  [default: OUT.stages]",
)
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
@click.option("--report", "page", is_flag=True, help="Write OUT/report.html too: see `ota-merge report`.")
@mergekit_flags
def run(
    recipe: str, out: str, dry_run: bool, intermediate_dir: str | None, quiet: bool, page: bool, **options
) -> None:
    """Merge the models of RECIPE (YAML) into the folder OUT.

    Several documents in RECIPE are several merges: the `name` of one may stand for a model in others.

    OUT appears only when it is complete. A merge that was stopped, however hard, goes on with --resume.
    """
    from pathlib import Path

    from ..errors import RecipeError
    from ..run import job
    from ..run.devices import command
    from ..run.ranks import is_first
    from ..run.stages import load_stages, run_stages
    from . import show

    several_gpus = None if dry_run else command(options["device"], sys.argv[1:])
    if several_gpus is not None:
        os.execv(several_gpus[0], several_gpus)
    several = len(load_stages(Path(recipe))) > 1
    if dry_run:
        if several:
            raise RecipeError(f"{recipe}: --dry-run plans one merge, and this is several")
        plan = job.plan(recipe, out=out, **options)
        if not quiet:
            show.plan(plan)
        return
    quiet = quiet or not is_first()
    progress = job.Silent() if quiet else show.progress()
    try:
        with _signals(), progress:
            if several:
                folder = Path(intermediate_dir or f"{out}.stages")
                stages = run_stages(
                    Path(recipe),
                    Path(out),
                    folder,
                    lambda r, o: job.merge(r, o, progress=progress, **options),
                )
                reports = list(stages)
            else:
                reports = [(out, job.merge(recipe, out, progress=progress, **options))]
    except KeyboardInterrupt as stop:
        number = getattr(stop, "number", signal.SIGINT)
        said = {signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}.get(number, "interrupted")
        click.echo(f"{said}; the same command with --resume goes on", err=True)
        raise SystemExit(128 + number) from None
    if page and is_first():
        from .report import PAGE, write

        write(Path(out), Path(out) / PAGE, threads=options["threads"])
    if quiet:
        return
    try:
        for place, report in reports:
            show.report(report, str(place))
    except BrokenPipeError:  # the merge is done, whoever reads of it
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
