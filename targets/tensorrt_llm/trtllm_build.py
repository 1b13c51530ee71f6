"""Compiling a TensorRT-LLM checkpoint into engines with TensorRT-LLM's own `trtllm-build`, where it is installed.

The compiler left TensorRT-LLM after 1.3.0rc20; 1.2.1 is the last stable version with it. Its options:
tensorrt_llm/commands/build.py. It needs the GPUs that the engines are for.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from exporter.core.engine_options import EngineOptions
from exporter.core.errors import UnsupportedError
from exporter.core.packages import installed_version
from exporter.core.progress import Progress
from targets.base import Limits

COMMAND = "trtllm-build"
ENGINE = "engine"
"""Directory of the engines inside the artifact."""
ENGINES = "ENGINES"
"""Stands in printed commands for a directory beside the checkpoint: an artifact is never written into."""
LAST_VERSION = "1.2.1"
PACKAGE = "tensorrt_llm"
TOLD_LINES, TOLD_BYTES = 20, 1 << 16
PATIENCE_S = 10.0
"""After an interrupt, for the compiler's processes to end by themselves."""


def build_command(
    checkpoint: Path | str, limits: Limits | None, engine: EngineOptions, engines: Path | str = ENGINES
) -> list[str]:
    """What compiles a checkpoint into the directory `engines`: one engine for each rank, all at a time."""
    ranks = engine.tensor_parallel * engine.pipeline_parallel
    command = [COMMAND, "--checkpoint_dir", str(checkpoint), "--output_dir", str(engines)]
    if limits is not None:
        prompt = min(engine.max_prompt or limits.max_seq_len, limits.max_seq_len)
        command += ["--max_batch_size", str(limits.max_batch), "--max_input_len", str(prompt)]
        command += ["--max_seq_len", str(limits.max_seq_len)]
    return [*command, "--workers", str(ranks)]


def compiler_missing(limits: Limits | None, engine: EngineOptions) -> UnsupportedError | None:
    """Why engines cannot be compiled here, with the command to run elsewhere; None where they can. Without limits the
    command leaves TensorRT-LLM's own."""
    if shutil.which(COMMAND) is not None:
        return None
    command = " ".join(build_command("CHECKPOINT", limits, engine))
    version = compiler_version()
    found = f"TensorRT-LLM {version} has no {COMMAND}" if version else f"{COMMAND} is not installed"
    return UnsupportedError(
        "tensorrt_llm.build",
        f"--engine: {found}, so no engine can be compiled here",
        f"leave --engine out, copy the checkpoint to a machine with the GPUs it is for and tensorrt-llm {LAST_VERSION} "
        f"(the last with {COMMAND}: pip install tensorrt-llm=={LAST_VERSION}), and run there: {command}",
    )


def compiler_version() -> str:
    """The installed TensorRT-LLM, or nothing."""
    return installed_version(PACKAGE)


def compile_engine(out_dir: Path, limits: Limits, engine: EngineOptions, progress: Progress) -> list[str]:
    """Compile the checkpoint in `out_dir`; the files written, relative to it.

    Raises UnsupportedError (`tensorrt_llm.build`) where the compiler is missing, fails, or leaves no engine behind.
    """
    if missing := compiler_missing(limits, engine):
        raise missing
    again = " ".join(build_command("CHECKPOINT", limits, engine))
    progress.advance(0.0, COMMAND)
    with TemporaryFile() as log:
        code = _run(build_command(out_dir, limits, engine, out_dir / ENGINE), log)
        if code:
            raise _failed(f"{COMMAND} ended with {_end(code)}", again, _tail(log))
        files = sorted(str(path.relative_to(out_dir)) for path in (out_dir / ENGINE).rglob("*") if path.is_file())
        wanted = [f"{ENGINE}/rank{rank}.engine" for rank in range(engine.tensor_parallel * engine.pipeline_parallel)]
        if lacking := [name for name in (*wanted, f"{ENGINE}/config.json") if name not in files]:
            raise _failed(f"{COMMAND} ended well but wrote no {', '.join(lacking)}", again, _tail(log))
    progress.advance(1.0, "compiled")
    return files


def _run(command: Sequence[str], log: IO[bytes]) -> int:
    """The exit status. Its processes are a group of their own, so that an interrupt here ends all of them."""
    with (
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
        _ended_with_us(process),
    ):
        return process.wait()


@contextmanager
def _ended_with_us(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _signal(process, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)
        # Workers may outlive the process that started them.
        _signal(process, signal.SIGKILL)
        raise


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _failed(what: str, again: str, said: str) -> UnsupportedError:
    return UnsupportedError(
        "tensorrt_llm.build",
        f"{what}. It said last:\n{said or '(nothing)'}",
        f"build the checkpoint without --engine, then compile it by itself: {again}",
    )


def _end(code: int) -> str:
    return f"exit status {code}" if code > 0 else f"signal {signal.Signals(-code).name}"


def _tail(log: IO[bytes]) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - TOLD_BYTES))
    return "\n".join(log.read().decode("utf-8", "replace").splitlines()[-TOLD_LINES:])
