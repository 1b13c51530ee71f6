"""The peers of engines and recipes: llama.cpp built for this machine, others in environments of their own.

    python -m tests.benchmarks.peer_setup --work DIR

llama.cpp comes from the sources inside the `llama-cpp-python` source package; building takes a C++ compiler, CMake
and some minutes. OpenVINO gets its own environment, since its exporter wants another transformers; so do modelopt and
llm-compressor together.
"""

import argparse
import subprocess
import sys
import tarfile
from pathlib import Path

LLAMA_CPP_PYTHON = "0.3.36"
OPENVINO = ["torch==2.13.0", "openvino-genai==2026.4.*", "optimum-intel[openvino]==2.2.0", "gguf==0.19.0"]
CMAKE = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF"]
CMAKE += ["-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_SERVER=OFF"]
PROGRAMS = ["llama-bench", "llama-quantize", "llama-perplexity", "llama-imatrix"]
QUANTIZERS = ["nvidia-modelopt==0.47.0", "llmcompressor==0.14.0.1", "torch==2.13.0"]


def llama_cpp(work: Path) -> Path:
    """The directory of llama.cpp's programs, built if need be."""
    sources = work / f"llama_cpp_python-{LLAMA_CPP_PYTHON}" / "vendor" / "llama.cpp"
    programs = sources / "build" / "bin"
    if all((programs / name).exists() for name in PROGRAMS):
        return programs
    package = f"llama-cpp-python=={LLAMA_CPP_PYTHON}"
    only_source = ["--no-deps", "--no-binary", "llama-cpp-python", "-d", str(work)]
    _run([sys.executable, "-m", "pip", "download", "-q", package, *only_source])
    with tarfile.open(next(work.glob("llama_cpp_python-*.tar.gz"))) as archive:
        archive.extractall(work, filter="data")
    _run(["cmake", "-B", str(sources / "build"), "-S", str(sources), *CMAKE])
    _run(["cmake", "--build", str(sources / "build"), "-j", "--target", *PROGRAMS])
    return programs


def openvino(work: Path) -> Path:
    """The Python interpreter of an environment with OpenVINO GenAI and its exporter, made if need be."""
    python = work / "openvino" / "bin" / "python"
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(work / "openvino")])
        _run([str(python), "-m", "pip", "install", "-q", *OPENVINO])
        # Comes along built for another torch, and breaks transformers; nothing here needs it.
        _run([str(python), "-m", "pip", "uninstall", "-q", "-y", "torchvision"])
    return python


def quantizers(work: Path) -> Path:
    """The Python interpreter of an environment with modelopt and llm-compressor, made if need be."""
    python = work / "quantizers" / "bin" / "python"
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(work / "quantizers")])
        _run([str(python), "-m", "pip", "install", "-q", *QUANTIZERS])
    return python


def _run(command: list[str]) -> None:
    print("+", " ".join(command), flush=True)
    subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    print(llama_cpp(work), openvino(work), quantizers(work), sep="\n")


if __name__ == "__main__":
    main()
