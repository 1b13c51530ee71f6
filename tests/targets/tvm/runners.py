"""Runners over engines of target `tvm`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from targets.base import RunOptions
from targets.registry import get_target
from targets.tvm.file_names import INDEX
from targets.tvm.runner import TvmRunner
from tests.targets.engines import Engine


def open_runner(engine: Engine, **options: object) -> TvmRunner:
    """Two threads unless `threads` says otherwise."""
    chosen = RunOptions(**{"threads": 2, **options})  # type: ignore[arg-type]
    runner = get_target("tvm").runner(engine.path, engine.config, engine.source.limits, chosen)
    assert isinstance(runner, TvmRunner)
    return runner


def with_index(engine: Engine, folder: Path, **fields: object) -> Engine:
    """A copy of an engine in an empty directory, with fields of its engine.json changed."""
    shutil.copytree(engine.path, folder, dirs_exist_ok=True)
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | fields))
    return replace(engine, path=folder)
