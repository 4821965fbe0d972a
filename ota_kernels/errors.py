"""Every exception a user can meet. The command line prints `error: TEXT` and exits with `exit_code`."""

from __future__ import annotations


class OtaError(Exception):
    """Base of all errors of this package; its text is one line that says what to do."""

    exit_code = 1


class RecipeError(OtaError, ValueError):
    """The recipe, an option or an argument is wrong: unknown key, wrong type, value out of range."""

    exit_code = 2


class InputError(OtaError, ValueError):
    """A model or curvature file is missing, malformed, inconsistent with the others, or not finite."""

    exit_code = 2


class OutputError(OtaError):
    """The output folder cannot be used: it exists, lies inside an input, or the disk has no room."""

    exit_code = 2


class BackendError(OtaError):
    """A backend that was asked for cannot run, or its device failed; the text says why."""

    exit_code = 2


class RunError(OtaError):
    """The merge failed while running; the work folder is kept, so that `--resume` can go on."""

    exit_code = 1


class StoppedError(RunError):
    """Another process of the merge has failed, and has said why: nothing more is shown. of_input: whether by
    an InputError."""

    def __init__(self, text: str, of_input: bool = False) -> None:
        super().__init__(text)
        self.of_input = of_input


def one_line(text: str) -> str:
    """`text` with what would break a line or steer a terminal written as Python escapes it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
