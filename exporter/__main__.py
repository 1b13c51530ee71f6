"""`python -m exporter` is the `enginesmith` command."""

from exporter.cli import main

main()
