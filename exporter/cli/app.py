"""The typer application, and what its commands share."""

import sys
from difflib import get_close_matches
from typing import Annotated

import typer

from exporter.cli.output import UsageError

app = typer.Typer(
    name="enginesmith",
    help="Turn Llama checkpoints into verified inference engines.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
EXTRA_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True}


def refuse_extra(arguments: list[str], known: list[str]) -> None:
    """Raise UsageError for arguments that no parameter took, with the nearest of those that are known."""
    if arguments:
        near = get_close_matches(arguments[0], known, 1)
        hint = f"did you mean {near[0]}?" if near else "see --help"
        raise UsageError("usage.option", f"unknown argument {arguments[0]!r}", hint)


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
