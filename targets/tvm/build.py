"""Building: kernels are compiled on one thread while weights are packed on others."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from exporter.core.disk import output_errors
from exporter.core.errors import UnsupportedError
from exporter.core.progress import Progress
from targets.base import BuildResult, BuildSource
from targets.tvm.compile import compile_engine
from targets.tvm.devices import resolve_device
from targets.tvm.engine_index import engine_index, index_text
from targets.tvm.file_names import INDEX, LIBRARY, TUNING, WEIGHTS
from targets.tvm.signature import signature
from targets.tvm.tuning_choice import choose_tuning
from targets.tvm.weight_file import plan_weights, write_weights

# The share of the stage that weights take; the library is compiled meanwhile.
WEIGHTS_SHARE = 0.9
# The share of a search for kernel parameters, where one is asked for: it takes minutes.
TUNING_SHARE = 0.8


def build_engine(source: BuildSource, out_dir: Path, progress: Progress, versions: dict[str, str]) -> BuildResult:
    """Write engine.so, weights.bin and engine.json, and tuning.json where kernels are tuned; the same source and
    tuning give the same bytes. Raises UnsupportedError `tvm.missing`."""
    _import_tvm()
    from targets.tvm.lower.lower import lower
    from targets.tvm.lower.slice_lowering import Setting

    device, config = resolve_device(source.device), source.config
    isa, kv_cache = device.isa, source.recipe.kv_cache
    model = lower(source.model, Setting(config, source.checkpoint, isa, kv_cache))
    plan = plan_weights((stored for part in model.slices for stored in part.stored), source.checkpoint, isa)

    chosen = choose_tuning(
        source, device, model, lambda fraction, what: progress.advance(TUNING_SHARE * fraction, what)
    )
    start = TUNING_SHARE if source.device.tune_minutes else 0.0

    def report(fraction: float, name: str) -> None:
        progress.advance(start + (WEIGHTS_SHARE - start) * fraction, name)

    with ThreadPoolExecutor(1, thread_name_prefix="compile") as pool:
        library = pool.submit(compile_engine, model, device, out_dir / LIBRARY, chosen.tuning)
        write_weights(out_dir / WEIGHTS, plan, source.checkpoint, isa, source.rows, report)
        progress.advance(WEIGHTS_SHARE, "library")
        library.result()
    index = engine_index(config, source.limits, isa, kv_cache, chosen.tuning.chunk, model, plan)
    with output_errors(out_dir / INDEX):
        (out_dir / INDEX).write_text(index_text(index), encoding="utf-8")
    files = [LIBRARY, WEIGHTS, INDEX]
    if chosen.kept is not None:
        chosen.kept.write(out_dir / TUNING)
        files.append(TUNING)
    progress.advance(1.0, "written")
    return BuildResult(
        files=files,
        toolchain=versions,
        signature=signature(model),
        weights_bytes=plan.weights_bytes,
        requirements={"cpu_features": list(device.cpu_features)},
        triple=device.triple,
    )


def _import_tvm() -> None:
    """A package that is there, as `probe` sees, need not load: a library or a part of it may be missing."""
    try:
        import tvm  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise UnsupportedError(
            "tvm.missing", f"apache-tvm cannot be imported: {error}", "pip install --force-reinstall 'enginesmith[tvm]'"
        ) from error
