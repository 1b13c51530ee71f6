"""Which kernels an engine has, and in which types its products and its attention compute: what the compiler made of the
network, after it fused layers.

The compiler tells its kernels when it has built (the message `Layers:`, where profiling verbosity is detailed), without
a GPU too; an engine loaded on a GPU tells them through its inspector (NVIDIA, TensorRT, "Engine Inspector").
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

HEADING = "Layers:"
LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), (?P<rest>.*)$", re.MULTILINE)
PART = re.compile(r"(Inputs|Constants|Outputs): (\[.*?\])(?=, (?:Inputs|Constants|Outputs|TacticName)|$)")
TYPE = re.compile(r"Datatype: (\w+)")
# `..._myl1_6`: the seventh kernel of the second profile.
PROFILE = re.compile(r"_myl(\d+)_\d+$")
ATTENTION = re.compile(r"_(\w*mha)\w*?_v\d+|\b(fmha|mha)")
# A product stands alone (`gemm`), or within a fusion that is compiled on the GPU (`Fc`).
FUSED_PRODUCT = re.compile(r"Fc(?![a-z])")


@dataclass(frozen=True)
class Kernel:
    """One kernel: its kind (`gemm`, `kgen`, `runtime_fusion`), its profile's number, and the types it takes."""

    name: str
    kind: str
    profile: int
    inputs: tuple[str, ...]
    constants: tuple[str, ...]

    @property
    def attends(self) -> bool:
        return ATTENTION.search(self.name) is not None

    @property
    def multiplies(self) -> bool:
        return self.kind == "gemm" or (self.kind == "runtime_fusion" and FUSED_PRODUCT.search(self.name) is not None)

    @property
    def precision(self) -> str:
        """`FP8`, or `HALF x INT4` where activations and weights differ."""
        types = [*self.inputs[:1], *self.constants[:1]]
        return " x ".join(dict.fromkeys(kind.upper() for kind in types)) or "unknown"


def logged_kernels(messages: Iterable[str]) -> list[Kernel]:
    """The kernels of a build's log; none where it tells none."""
    return [
        _kernel(found["name"], found["kind"], dict(PART.findall(found["rest"])))
        for message in messages
        if message.startswith(HEADING)
        for found in LAYER.finditer(message)
    ]


def _kernel(name: str, kind: str, parts: dict[str, str]) -> Kernel:
    types = {part: tuple(TYPE.findall(text)) for part, text in parts.items()}
    return Kernel(name, kind, _profile(name), types.get("Inputs", ()), types.get("Constants", ()))


def _profile(name: str) -> int:
    found = PROFILE.search(name)
    return int(found.group(1)) if found else 0


def inspected_kernels(engine: Any, module: Any) -> list[Kernel]:
    """The kernels of an engine that is loaded on a GPU."""
    text = engine.create_engine_inspector().get_engine_information(module.LayerInformationFormat.JSON)
    layers = [layer for layer in json.loads(text).get("Layers", []) if isinstance(layer, dict)]
    return [
        Kernel(
            str(layer.get("Name", "")),
            str(layer.get("LayerType", "")),
            _profile(str(layer.get("Name", ""))),
            _inspected_types(layer.get("Inputs")),
            _inspected_types(layer.get("Constants")),
        )
        for layer in layers
    ]


def _inspected_types(tensors: Any) -> tuple[str, ...]:
    """TensorRT has one word for format and type (`Row major linear FP16 format`), RTX the type alone."""
    found = []
    for tensor in tensors if isinstance(tensors, list) else []:
        text = str(tensor.get("Datatype") or tensor.get("Format/Datatype") or "")
        found += re.findall(r"FP8|FP4|Int8|Int4|Half|FP16|BF16|BFloat16|Float|FP32|Int32|Int64|Bool", text)[:1]
    return tuple(found)


def kernel_report(kernels: list[Kernel], names: list[str]) -> dict[str, Any]:
    """For manifests: by profile the kernels by kind, the products by precision, the attention kernels by name."""
    by_profile: defaultdict[int, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        by_profile[kernel.profile].append(kernel)
    return {names[number] if number < len(names) else str(number): _counts(by_profile[number]) for number in by_profile}


def _counts(kernels: list[Kernel]) -> dict[str, dict[str, int]]:
    counted = {
        "kernels": Counter(kernel.kind for kernel in kernels),
        "products": Counter(kernel.precision for kernel in kernels if kernel.multiplies and not kernel.attends),
        "attention": Counter(re.sub(r"_myl\d+_\d+$", "", kernel.name) for kernel in kernels if kernel.attends),
    }
    return {what: dict(sorted(found.items())) for what, found in counted.items()}
