"""The commands and how their failures become exit codes."""

import sys
from difflib import get_close_matches
from typing import Annotated

import typer

from exporter.cli.output import INTERRUPTED, Output, UsageError, run_guarded
from exporter.core.errors import UnsupportedError

app = typer.Typer(
    name="enginesmith",
    help="Turn Llama checkpoints into verified inference engines.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
# Options of the contract that have no meaning yet: refused by name, never ignored.
LATER_OPTIONS = {
    "--calibration": "calibration data",
    "--calibration-tokens": "calibration data",
    "--seed": "calibration data",
    "--qparams": "quantization-parameter files",
    "--target-bits": "the recipe auto",
    "--target-bytes": "the recipe auto",
    "--max-kl": "the recipe auto",
    "--device": "device profiles",
    "--mtriple": "cross-compilation",
    "--mcpu": "cross-compilation",
    "--mattr": "cross-compilation",
    "--tune": "tuning",
    "--tp": "tensor parallelism",
    "--pp": "pipeline parallelism",
    "--format": "checkpoint exports",
    "--engine": "checkpoint exports",
    "--labels": "classifiers",
    "--work-dir": "builds that spill to disk",
}
LATER_COMMANDS = {"calibrate": "quantization-parameter files"}
LATER_NOTE = "Not available yet (exit 3): " + ", ".join(sorted(LATER_OPTIONS)) + "."
# Typer carries its own copy of click since 0.2x; the usage error it raises is the parent of its BadParameter.
CLICK_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
EXTRA_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True}


def refuse_extra(arguments: list[str], known: list[str]) -> None:
    """Arguments no parameter took: options that come later exit with 3, all else is bad usage."""
    for argument in arguments:
        name = argument.split("=")[0]
        if name in LATER_OPTIONS:
            raise UnsupportedError(
                "option.unavailable",
                f"{name} is not available yet: it needs {LATER_OPTIONS[name]}",
                f"leave {name} out",
            )
    if arguments:
        near = get_close_matches(arguments[0], known, 1)
        hint = f"did you mean {near[0]}?" if near else "see --help"
        raise UsageError("usage.option", f"unknown argument {arguments[0]!r}", hint)


def run(arguments: list[str]) -> int:
    """Run one command line; returns its exit code."""
    import exporter.cli.build
    import exporter.cli.engines
    import exporter.cli.lists  # noqa: F401  each module adds its commands to `app`

    output = Output(arguments)
    return run_guarded(output, lambda: _invoke([a for a in arguments if a != "--debug"], output))


def _invoke(arguments: list[str], output: Output) -> None:
    if arguments and arguments[0] in LATER_COMMANDS:
        needs = LATER_COMMANDS[arguments[0]]
        raise UnsupportedError("command.unavailable", f"{arguments[0]} is not available yet: it needs {needs}", "")
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


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Turn Llama checkpoints into verified inference engines."""
    if version:
        from exporter.version import VERSION

        print(f"enginesmith {VERSION}", file=sys.stdout)
    elif context.invoked_subcommand is None:
        print(context.get_help())
