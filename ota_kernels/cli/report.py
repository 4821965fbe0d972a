"""`ota-merge report`: what a merge did, as a page to look at."""

from __future__ import annotations

from pathlib import Path

import click

from .options import reading

PAGE = "report.html"


@click.command()
@click.argument("out", type=click.Path(file_okay=False))
@click.option(
    "--html", "target", type=click.Path(dir_okay=False), help="The page.  [default: OUT/report.html]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON instead.")
@reading
def report(out: str, target: str | None, as_json: bool, **options) -> None:
    """Write a page about the merged folder OUT: what of each expert was kept and where, how experts overlap
    and disagree, how long edits are, and what is worth a warning.

    Reads the inputs once more. The page is one file that fetches nothing.
    """
    folder = Path(out)
    if as_json:
        from ..run import analysis

        click.echo(analysis.as_json(analysis.analyse(folder, **options)))
    else:
        click.echo(f"wrote {write(folder, Path(target) if target else folder / PAGE, **options)}")


def write(out: Path, path: Path, **options) -> Path:
    """The page of a merged folder."""
    from ..run.analysis import analyse
    from .report_page import page

    path.write_text(page(analyse(out, **options), f"Merge {out.resolve().name}"), encoding="utf-8")
    return path
