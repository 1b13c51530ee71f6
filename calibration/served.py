"""Which matrices a file of quantization parameters serves as they are, and which a target derives from it."""

from typing import NamedTuple

from calibration.coverage import coverage
from calibration.qparams import QParams
from calibration.qparams_format import codes_key
from calibration.transforms import transformed_config
from exporter.core.config import ModelConfig
from exporter.core.recipe import Precision, Recipe


class Served(NamedTuple):
    """One matrix: `stored` codes are taken as they are, `derived` ones rounded to nearest from the transformed
    weights, `unquantized` ones stay floats; and why."""

    tensor: str
    how: str
    why: str


def served(qparams: QParams, recipe: Recipe, config: ModelConfig) -> list[Served]:
    """Every matrix of the model under a recipe as a target completed it; from headers alone.

    `config` is the checkpoint's. A tied head and embedding appear twice, under the head's name and the embedding's.
    """
    after = transformed_config(config, qparams.transforms)
    return [
        _served(qparams, t.name, after.head_source if t.name == "lm_head.weight" else t.name, t.actual, t.why)
        for t in coverage(after, recipe).tensors
    ]


def _served(qparams: QParams, name: str, source: str, precision: Precision, why: str) -> Served:
    described = precision.weight_only.describe()
    if not precision.is_coded:
        return Served(name, "unquantized", why or f"{described} is asked")
    if codes_key(source, precision) in qparams.codes:
        return Served(name, "stored", f"codes {described} from the file")
    others = sorted(stored.precision.describe() for stored in qparams.codes.values() if stored.tensor == source)
    if others:
        return Served(name, "derived", f"the file has {', '.join(others)}, {described} is asked: rounded to nearest")
    return Served(name, "derived", f"the file has no codes of it: {described}, rounded to nearest")
