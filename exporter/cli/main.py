"""One command line from its arguments to its exit code."""

import typer

# Each of these modules adds its commands to `app`.
import exporter.cli.build
import exporter.cli.calibrate
import exporter.cli.engines
import exporter.cli.lists  # noqa: F401
from exporter.cli.app import app
from exporter.cli.output import INTERRUPTED, Output, UsageError, run_guarded

# Typer carries its own copy of click since 0.2x; the usage error it raises is the parent of its BadParameter.
CLICK_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]


def run(arguments: list[str]) -> int:
    """Run one command line; returns its exit code."""
    output = Output(arguments)
    return run_guarded(output, lambda: _invoke([a for a in arguments if a != "--debug"], output))


def _invoke(arguments: list[str], output: Output) -> None:
    try:
        code = app(arguments, standalone_mode=False, obj=output, prog_name="enginesmith")
    except CLICK_USAGE_ERROR as error:
        raise UsageError("usage", _message(error), f"see `{_help_command(arguments)}`") from error
    except typer.Abort:
        raise KeyboardInterrupt from None
    if code == INTERRUPTED:  # typer turns Ctrl-C into this code without a word
        raise KeyboardInterrupt
    if isinstance(code, int) and code:
        raise SystemExit(code)


def _help_command(arguments: list[str]) -> str:
    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    return " ".join(["enginesmith", *(a for a in arguments[:1] if a in known), "--help"])


def _message(error: Exception) -> str:
    """Click's sentence about a usage error, as it would print it."""
    formatted = getattr(error, "format_message", None)
    return str(formatted()) if formatted else str(error)
