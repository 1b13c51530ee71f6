"""docs/qparams.md names every refusal that the modules of the format can raise, and no other."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    "qparams",
    "qparams_check",
    "qparams_format",
    "qparams_writer",
    "transforms",
    "transformed",
    "weight_changes",
)
RAISED = re.compile(r'(?:InputError|UnsupportedError)\(\s*"([\w.]+)"|damaged\("(\w+)"')
NAMED = re.compile(r"`((?:qparams|transform)\.[a-z_]+)`")
# Of reading any safetensors file; they come out under this file's prefix.
OF_SAFETENSORS = {f"qparams.{kind}" for kind in ("truncated", "trailing", "header", "dtype", "unreadable")}


def test_every_refusal_is_on_the_page() -> None:
    sources = [(ROOT / "calibration" / f"{name}.py").read_text(encoding="utf-8") for name in MODULES]
    found = [match for source in sources for match in RAISED.findall(source)]
    raised = {plain or f"qparams.{short}" for plain, short in found}
    named = set(NAMED.findall((ROOT / "docs" / "qparams.md").read_text(encoding="utf-8")))
    assert named == raised | OF_SAFETENSORS
