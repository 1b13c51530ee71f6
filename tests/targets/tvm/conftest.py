"""Engines compiled once per session: one takes some seconds."""

import pytest

from tests.targets.engines import Engine
from tests.targets.tvm.builds import EngineFactory, build_tvm, tvm_source


@pytest.fixture(scope="session")
def tvm_engine(tiny_checkpoint, tmp_path_factory) -> EngineFactory:
    """`tvm_engine("gqa", "int4", "int8", "x86-64-v3", **config changes)`: shape, recipe, KV cache, device (None: this
    machine)."""
    pytest.importorskip("tvm", reason="apache-tvm is not installed: no engine can be compiled")
    built: dict[str, Engine] = {}

    def factory(
        shape: str = "gqa", recipe: str = "fp32", kv_cache: str = "fp32", device: str | None = None, **changes: object
    ) -> Engine:
        key = f"{shape} {recipe} {kv_cache} {device} {sorted(changes.items())}"
        if key not in built:
            source = tvm_source(tiny_checkpoint(shape, **changes), recipe, kv_cache, device)
            built[key] = build_tvm(source, tmp_path_factory.mktemp("engine"))
        return built[key]

    return factory
