"""What a GPU machine without a network lacks, packed into files small enough to be carried there in two goes.

    python -m tests.gpu.pack OUT [--python 3.12] [--version 1.7.1.116] [--part-bytes 34000000]

Needs a network (pip) and about 3 GB of memory for some minutes: the compiler's library, 234 MB, is compressed as far as
it goes. OUT/1 and OUT/2 hold the parts; tests.gpu.unpack puts them together again. What is left out is on such machines
already: torch, transformers, onnx, onnx-ir, onnxscript, onnxruntime, tokenizers, typer, ml_dtypes, pytest.
"""

import argparse
import io
import lzma
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION, POLYGRAPHY = "1.7.1.116", "0.53.6"
PART_BYTES = 34_000_000
"""Two parts hold it all, each with the repository's own files under what is carried at once (64 MiB)."""
GOES = 2
FILTERS = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 256 << 20}]
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--python", default="3.12", help="version of Python on the GPU machine")
    parser.add_argument("--version", default=VERSION, help="of TensorRT-RTX")
    parser.add_argument("--part-bytes", type=int, default=PART_BYTES)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder)
        for command in pip_commands(site, asked.version, asked.python):
            subprocess.run(command, check=True)
        parts = pack(site, asked.out, asked.part_bytes)
    for part in parts:
        print(f"{part}  {part.stat().st_size} bytes")


def pip_commands(site: Path, version: str, python: str) -> list[list[str]]:
    """Wheels of compiled code for the other machine's Python; packages of plain Python are made into ones here."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(site)]
    foreign = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    foreign += [word for platform in PLATFORMS for word in ("--platform", platform)]
    compiled = [f"tensorrt_rtx_cu13_{part}=={version}" for part in ("libs", "bindings")]
    plain = [f"tensorrt_rtx=={version}", f"tensorrt_rtx_cu13=={version}"]
    return [[*install, *foreign, *compiled, f"polygraphy=={POLYGRAPHY}"], [*install, *plain]]


def pack(site: Path, out: Path, part_bytes: int = PART_BYTES) -> list[Path]:
    """A folder as one compressed archive, cut into parts in OUT/1 and OUT/2. Raises ValueError if two do not do."""
    data = compressed(site)
    pieces = [data[start : start + part_bytes] for start in range(0, len(data), part_bytes)]
    if len(pieces) > GOES:
        raise ValueError(f"{len(data)} bytes do not fit into {GOES} parts of {part_bytes}")
    parts = []
    for number, piece in enumerate(pieces, 1):
        folder = out / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"site.tar.xz.{number}-of-{len(pieces)}"
        part.write_bytes(piece)
        parts.append(part)
    return parts


def compressed(site: Path) -> bytes:
    buffer = io.BytesIO()
    with (
        lzma.open(buffer, "wb", format=lzma.FORMAT_XZ, filters=FILTERS) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in sorted(site.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                archive.add(path, str(path.relative_to(site)), filter=_without_owner)
    return buffer.getvalue()


def _without_owner(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """The same archive whoever makes it, and whenever."""
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mtime = 0
    return info


if __name__ == "__main__":
    main()
