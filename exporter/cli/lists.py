"""`enginesmith targets`, `recipes` and `doctor`: what there is, and whether it works here."""

import typer

from exporter.cli.app import Debug, Json, app
from exporter.cli.output import Output


@app.command()
def targets(context: typer.Context, json: Json = False, debug: Debug = False) -> None:
    """List the targets: whether each is usable here, the recipes it takes, the devices it builds for."""
    from exporter import api

    listed = api.targets()
    lines = []
    for entry in listed:
        state = "usable" if entry["usable"] else f"not usable: {entry['why']}"
        recipes = ", ".join(f"{name} ({level})" for name, level in entry["recipes"].items())
        caches = ", ".join(kind for kind, level in entry["kv_caches"].items() if level != "refused")
        lines.append(f"{entry['name']}: {state}\n  recipes: {recipes}\n  KV cache: {caches}")
        lines += [f"  --device {device['name']:<16} {device['summary']}" for device in entry["devices"]]
    output: Output = context.obj
    output.result({"targets": listed}, "\n".join(lines))


@app.command()
def recipes(context: typer.Context, json: Json = False, debug: Debug = False) -> None:
    """List the recipes: what each stores, what it costs, and what it needs."""
    from exporter import api

    listed = api.recipes()
    lines = []
    for entry in listed:
        how = f" by {', '.join(entry['algorithms'])}" if entry["algorithms"] else ""
        lines += [
            f"{entry['name']:<16} {entry['summary']}",
            f"  linear {entry['linear']}{how}, head {entry['lm_head']}, embedding {entry['embedding']}",
            f"  costs {entry['costs']}; needs {entry['needs']}",
        ]
    output: Output = context.obj
    output.result({"recipes": listed}, "\n".join(lines))


@app.command()
def doctor(context: typer.Context, json: Json = False, debug: Debug = False) -> None:
    """Check this machine: Python, packages, targets, memory; exit 3 if nothing can be built or run."""
    from exporter.doctor import diagnose

    diagnosis = diagnose()
    output: Output = context.obj
    output.result(diagnosis.to_json(), diagnosis.describe())
    if not diagnosis.usable:
        raise typer.Exit(3)
