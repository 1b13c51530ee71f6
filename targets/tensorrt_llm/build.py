"""Building: the checkpoint in the form that is asked for, and its engines where the vendor's compiler is here."""

from pathlib import Path

from exporter.core.progress import PartOfStage, Progress
from targets.base import BuildResult, BuildSource
from targets.tensorrt_llm.formats import COMPRESSED, HF, LEGACY, form_of
from targets.tensorrt_llm.served_by import labels, named_devices
from targets.tensorrt_llm.trtllm_build import COMMAND, compile_engine, compiler_version
from targets.tensorrt_llm.written import Written

# The share of the stage that writing the checkpoint takes, where engines are compiled after it.
CHECKPOINT_SHARE = 0.3
TITLES = {
    HF: "quantized Hugging Face checkpoint",
    LEGACY: "TensorRT-LLM checkpoint",
    COMPRESSED: "compressed-tensors checkpoint",
}


def build_checkpoint(source: BuildSource, out_dir: Path, progress: Progress, versions: dict[str, str]) -> BuildResult:
    """Write the checkpoint's files into `out_dir`, and engines below `engine/` with `--engine`."""
    form, share = form_of(source.engine), CHECKPOINT_SHARE if source.engine.compile_engine else 1.0
    compiled = ""
    written = _write(form, source, out_dir, PartOfStage(progress, 0.0, share))
    files, report = list(written.files), {"form": form, **written.report}
    if devices := named_devices(source.device):
        report["computed_by"] = labels(devices)
    if source.engine.compile_engine:
        files += compile_engine(out_dir, source.limits, source.engine, PartOfStage(progress, share, 1.0))
        report["engine"] = {"compiler": compiler_version(), "run": None}
        compiled = (
            f", whose engines {' '.join(filter(None, (COMMAND, compiler_version())))} compiled and nobody has run"
        )
    return BuildResult(
        files=files,
        toolchain=versions,
        signature={"inputs": {}, "outputs": {}},
        weights_bytes=written.weights_bytes,
        triple="any",
        report=report,
        built_by=f"enginesmith, as a {TITLES[form]}{compiled}",
    )


def _write(form: str, source: BuildSource, out_dir: Path, progress: Progress) -> Written:
    if form == LEGACY:
        from targets.tensorrt_llm.trtllm_form import write_trtllm

        return write_trtllm(source, out_dir, progress)
    if form == COMPRESSED:
        from targets.tensorrt_llm.compressed_form import write_compressed

        return write_compressed(source, out_dir, progress.advance)
    from targets.tensorrt_llm.hf_form import write_hf

    return write_hf(source, out_dir, progress.advance)
