"""The command line: `enginesmith`. Thin over exporter.api; loads what a command needs and no more."""

import sys


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `enginesmith` command; ends the process with the contract's exit code."""
    from exporter.cli.main import run

    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))
