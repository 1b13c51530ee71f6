"""Put together what tests.gpu.pack made, on the GPU machine.

    python -m tests.gpu.unpack PACK SITE

PACK holds the parts, in any folders below it; SITE becomes a folder for PYTHONPATH. Nothing is done where it is there.
"""

import argparse
import io
import lzma
import re
import shutil
import tarfile
from pathlib import Path

DONE = ".unpacked"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("site", type=Path)
    asked = parser.parse_args()
    print(unpack(asked.pack, asked.site))


def unpack(pack: Path, site: Path) -> str:
    """What was done, in words. Raises FileNotFoundError, naming the part, where one is missing."""
    if (site / DONE).is_file():
        return f"{site} is there already"
    parts = find_parts(pack)
    data = b"".join(part.read_bytes() for part in parts)
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    with lzma.open(io.BytesIO(data)) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        archive.extractall(site, filter="data")
    (site / DONE).touch()
    return f"{len(parts)} parts unpacked into {site}"


def find_parts(pack: Path) -> list[Path]:
    """All parts, in order."""
    found = {}
    total = 0
    for path in pack.rglob("site.tar.xz.*"):
        if match := re.fullmatch(r"site\.tar\.xz\.(\d+)-of-(\d+)", path.name):
            found[int(match[1])], total = path, int(match[2])
    missing = [number for number in range(1, total + 1) if number not in found]
    if not found or missing:
        what = f"part {missing[0]} of {total}" if found else "any part"
        raise FileNotFoundError(f"{pack} lacks {what}: make gpu-pack, then carry its folders 1 and 2")
    return [found[number] for number in sorted(found)]


if __name__ == "__main__":
    main()
