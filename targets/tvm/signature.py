"""What the engine's function `forward` takes and fills, for manifests."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from targets.tvm.lower.program import LoweredModel, Tensor

SIZES = {"T": "tokens", "R": "segments", "Q": "wanted", "B": "batch", "C": "blocks", "S": "capacity"}
"""Words for the letters in shapes."""


def signature(model: "LoweredModel") -> dict[str, dict[str, dict[str, object]]]:
    """Names, types and shapes of a step's inputs, cache and logits; words stand for what a run chooses."""

    def entry(tensor: "Tensor") -> dict[str, object]:
        return {"dtype": tensor.dtype, "shape": [SIZES.get(str(size), size) for size in tensor.shape]}

    layer = model.layers[0].program
    inputs = {tensor.name: tensor for part in model.slices for tensor in part.program.parameters}
    logits = inputs.pop("logits")
    hidden = inputs.pop("hidden")
    caches = {f"{number}.{each.name}": entry(each) for number in range(len(model.layers)) for each in layer.cache}
    return {
        "inputs": {**{name: entry(tensor) for name, tensor in inputs.items()}, **caches},
        "outputs": {"hidden": entry(hidden), "logits": entry(logits), **caches},
    }
