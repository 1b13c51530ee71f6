"""Engines built once per session."""

from collections.abc import Callable

import pytest

from tests.targets.engines import RECIPES, Engine, build, build_source

EngineFactory = Callable[..., Engine]


@pytest.fixture(scope="session")
def engine(tiny_checkpoint, tmp_path_factory) -> EngineFactory:
    """`engine("gqa", "int4", **config changes)`."""
    built: dict[str, Engine] = {}

    def factory(shape: str = "gqa", recipe: str = "fp32", **changes: object) -> Engine:
        key = f"{shape} {recipe} {sorted(changes.items())}"
        if key not in built:
            source = build_source(tiny_checkpoint(shape, **changes), RECIPES[recipe])
            built[key] = build(source, tmp_path_factory.mktemp("engine"))
        return built[key]

    return factory
