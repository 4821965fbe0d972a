"""The command line. Commands are imported when they run: `ota-merge --help` starts without numpy or torch."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import traceback

import click

from .. import _native
from ..errors import OtaError, StoppedError, one_line
from . import remarks

_COMMANDS = {
    "run": "Merge models as a recipe says.",
    "files": "Merge single files, such as ComfyUI's checkpoints.",
    "sweep": "Merge the same models with several values of parameters, reading them once.",
    "adapters": "Merge LoRA adapters into one adapter, in their core space.",
    "plan": "Show what a merge would read, write and hold in memory.",
    "verify": "Check a merged folder: checksums, and its recipe once more.",
    "recipe": "Write a recipe that needs no tuning.",
    "report": "Write a page about a merged folder: what was kept, where, how experts overlap.",
    "methods": "List the merge methods, or show one with its keys.",
    "inspect": "Show what a model is, and what differs between several.",
    "densities": "Show what each density would keep of each expert, and where.",
    "pack": "Store an expert as its base plus packed edits.",
    "unpack": "Write the expert of a pack as a model.",
    "add": "Merge one more expert into a finished merge.",
    "remove": "Take an expert out of a finished merge.",
    "moments": "Get second moments: extract, compress, show, lift, estimate.",
    "demo": "Train small experts on digits, merge them, print what came out.",
}
INTERRUPTED, WRONG_INPUT = 130, 2


class _LazyGroup(click.Group):
    """Subcommands live in modules of their own name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        return getattr(importlib.import_module(f"{__name__}.{name}"), name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.command(
    cls=_LazyGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(package_name="ota-kernels", prog_name="ota-merge")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Merge fine-tuned models at memory speed: OTA with Fast Fisher Grafting, and linear merges."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> None:
    """Entry point: exit codes 0, 1 (failed while running), 2 (wrong recipe, option or input), 130."""
    # Imports and headers make many objects and hardly any garbage: to look for it after every 700 of them
    # would take as long as to import numpy.
    gc.set_threshold(50_000)
    _fill_standard_files()
    _native.end_where_lost()
    remarks.hold()
    try:
        cli.main(standalone_mode=False)
        remarks.release()
    except click.exceptions.Exit as stop:
        remarks.release()
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, click.Abort):
        remarks.release()
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        _fail(" ".join(error.format_message().split()), error.exit_code)
    except StoppedError as error:
        remarks.release()
        sys.exit(error.exit_code)
    except OtaError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        _fail(f"{error.filename or 'input/output'}: {error.strerror or error}", 1)
    except MemoryError:
        _fail("out of memory: lower --threads or --memory-limit", 1)


def _fill_standard_files() -> None:
    """A shard must not get the number of a standard output that is closed: what a library prints would go
    into it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


def _fail(message: str, code: int) -> None:
    if logging.getLogger("ota_kernels").isEnabledFor(logging.INFO):
        traceback.print_exc()
    remarks.drop() if code == WRONG_INPUT else remarks.release()
    click.echo(f"error: {one_line(message)}", err=True)
    sys.exit(code)
