"""Which kinds of layers a network has, and which precision each matrix product and attention computes in."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MATMUL, ATTENTION, CACHE = "MATRIX_MULTIPLY", "ATTENTION", "KV_CACHE_UPDATE"
# What stands between a dequantization and the product that takes it: reshapes, transposes, casts.
CARRIERS = {"SHUFFLE", "CAST", "IDENTITY", "SQUEEZE", "UNSQUEEZE"}
# A layer's type in the network -> what the report calls it, for those whose precision is told.
TOLD = {"MATRIX_MULTIPLY": MATMUL, "ATTENTION_OUTPUT": ATTENTION, "KV_CACHE_UPDATE": CACHE}
ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


@dataclass(frozen=True)
class LayerReport:
    """`layers` counts layers by type. `precisions` names the precision of each matrix product, attention and cache by
    its node: the type of what is multiplied, before dequantization (`FP8`, `HALF`), or both where they differ
    (`HALF x INT4`: the activations' and the weights'). `types` are all number types of the network."""

    layers: dict[str, int]
    precisions: dict[str, dict[str, str]]
    types: frozenset[str]

    def to_json(self) -> dict[str, Any]:
        """For manifests: counts, and nodes of all decoder layers in one line (`layers.*.q_proj.matmul`)."""
        counts = {kind: dict(sorted(Counter(named.values()).items())) for kind, named in self.precisions.items()}
        nodes: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for name, precision in self.precisions.get(MATMUL, {}).items():
            nodes[re.sub(r"\d+", "*", name)][precision] += 1
        return {
            "layers": self.layers,
            "precisions": counts,
            "matmuls": {name: dict(sorted(found.items())) for name, found in sorted(nodes.items())},
        }


def layer_report(network: Any) -> LayerReport:
    """Read a parsed network (`INetworkDefinition`): what the builder is given, before it fuses anything."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers = {layer.get_output(index).name: layer for layer in layers for index in range(layer.num_outputs)}
    precisions: dict[str, dict[str, str]] = {}
    for layer in layers:
        if kind := TOLD.get(layer.type.name):
            precisions.setdefault(kind, {})[node_name(layer)] = _precision(layer, kind, producers)
    counts = Counter(layer.type.name for layer in layers)
    return LayerReport(dict(sorted(counts.items())), precisions, frozenset(_types(network, layers)))


def node_name(layer: Any) -> str:
    """The ONNX node that a layer was made for, as the parser notes it; the layer's own name where it does not."""
    found = ONNX_NODE.search(layer.metadata or "")
    return found.group(1) if found else str(layer.name)


def _precision(layer: Any, kind: str, producers: dict[str, Any]) -> str:
    if kind != MATMUL:
        return str(layer.get_output(0).dtype.name)
    types = [_multiplied(layer.get_input(index), producers) for index in range(2)]
    return types[0] if types[0] == types[1] else " x ".join(types)


def _multiplied(tensor: Any, producers: dict[str, Any]) -> str:
    """The type an operand is stored in: behind carriers that of the codes a dequantization takes, else its own."""
    layer = producers.get(tensor.name)
    while layer is not None and layer.type.name in CARRIERS:
        layer = producers.get(layer.get_input(0).name)
    if layer is not None and layer.type.name == "DEQUANTIZE":
        return str(layer.get_input(0).dtype.name)
    return str(tensor.dtype.name)


def _types(network: Any, layers: list[Any]) -> Iterator[str]:
    for index in range(network.num_inputs):
        yield network.get_input(index).dtype.name
    for layer in layers:
        for index in range(layer.num_outputs):
            yield layer.get_output(index).dtype.name
