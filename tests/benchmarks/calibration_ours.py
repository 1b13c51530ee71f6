"""Our recipes on a checkpoint: calibrated by the real driver, then the eager model with what the recipe leaves.

Weights come from the file of quantization parameters through the transformed checkpoint, as a build reads them;
activations and caches are rounded as the recipe asks. Embedding and head stay fp32 unless a case says otherwise.
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from calibration.calibrate import CalibrateOptions, calibrate
from calibration.coverage import coverage, plain_matrix_bits
from calibration.data import CalibrationData, DataSummary
from calibration.presets import load_recipe
from calibration.qparams import QParams
from calibration.rtn import absmax_rows
from calibration.weight_rows import WeightRows
from exporter.core.checkpoint import Checkpoint
from exporter.core.progress import NoProgress
from exporter.core.recipe import CHANNEL, TENSOR, Precision, Recipe
from exporter.core.weights import QuantizedRows, read_tensor_rows
from exporter.parity.activations import asked_rounding
from exporter.parity.reference import EagerModel
from exporter.parity.weight_values import RecipeValues, WeightPrecisions
from exporter.recipe_numbers import RecipeNumbers, calibrated_numbers, plain_numbers
from targets.registry import get_target
from tests.benchmarks.quality import Scorer

matrix_bits = partial(plain_matrix_bits, scale_bits=16)
_FP32 = Precision("fp32")


@dataclass(frozen=True)
class Case:
    """A recipe whose quality is measured; `absmax` rounds its weights with the plain scale instead."""

    recipe: Recipe
    absmax: bool = False


@dataclass(frozen=True)
class PlainScales:
    """`StoredWeights`: every matrix rounded with scale max|w| / 7 (int4) of its group."""

    checkpoint: Checkpoint

    def rows(self, tensor: str, precision: Precision, start: int, stop: int) -> QuantizedRows:
        return absmax_rows(read_tensor_rows(self.checkpoint, tensor, start, stop), precision)


def preset_case(name: str, group: int | None = None, *, rotate: bool = False, kv_cache: str | None = None) -> Case:
    """A preset with embedding and head in fp32."""
    recipe = load_recipe(name, group_size=group, lm_head="fp32", embedding="fp32", kv_cache=kv_cache, rotate=rotate)
    return Case(recipe)


def cases(groups: list[int]) -> dict[str, Case]:
    """Every row of the table by its name."""
    found: dict[str, Case] = {}
    for group in groups:
        int4 = Precision("int4", group)
        found[f"int4 abs-max g{group}"] = Case(Recipe("int4-absmax", int4, _FP32, _FP32), absmax=True)
        for name in ("int4-rtn", "int4-rtn-asym", "int4-awq", "int4-gptq"):
            found[f"{name} g{group}"] = preset_case(name, group)
        for algorithms in (("awq", "gptq"), ("rotate",), ("rotate", "gptq")):
            recipe = Recipe("int4", int4, _FP32, _FP32, algorithms=algorithms)
            found[f"int4-{'-'.join(algorithms)} g{group}"] = Case(recipe)
    for name in ("nf4", "nvfp4", "mxfp4", "int8-smoothquant", "fp8", "fp8-channel", "int8-weight"):
        found[name] = preset_case(name)
    plain = Precision("int8", CHANNEL, activations="int8/token")
    found["W8A8 plain"] = Case(Recipe("w8a8", plain, _FP32, _FP32))
    static = Precision("int8", CHANNEL, activations="int8/tensor")
    found["W8A8 plain, one scale of activations"] = Case(Recipe("w8a8", static, _FP32, _FP32))
    smooth = Recipe("w8a8", static, _FP32, _FP32, algorithms=("smoothquant",))
    found["W8A8 SmoothQuant, one scale of activations"] = Case(smooth)
    found["w4a8 g32"] = preset_case("w4a8")
    fp8 = Precision("fp8", TENSOR, activations="fp8/tensor")
    found["fp8 in every layer"] = Case(Recipe("fp8", fp8, _FP32, _FP32))
    found["fp8 + fp8 KV"] = Case(Recipe("fp8", fp8, _FP32, _FP32, kv_cache="fp8"))
    for kind in ("fp16", "int8", "fp8"):
        found[f"{kind} KV cache alone"] = Case(Recipe("fp32", _FP32, _FP32, _FP32, kv_cache=kind))
    return found


def data_of(ids: np.ndarray) -> CalibrationData:
    """Calibration data of given sequences [n, S]."""
    digest = hashlib.sha256(ids.tobytes()).hexdigest()
    return CalibrationData(ids, DataSummary(digest, "text", len(ids), ids.size, len(ids), ids.shape[1], 0))


def parameters_of(checkpoint: Checkpoint, recipe: Recipe, ids: np.ndarray, work: Path) -> tuple[QParams | None, float]:
    """What calibration found, and the seconds it took; kept in `work`. None for recipes that need none."""
    if not recipe.calibrated:
        return None, 0.0
    key = json.dumps([checkpoint.digest, asdict(recipe), hashlib.sha256(ids.tobytes()).hexdigest()])
    path = work / f"{recipe.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
    start = time.perf_counter()
    if path.exists():
        return QParams.open(path), 0.0
    parameters = calibrate(checkpoint, recipe, data_of(ids), path, CalibrateOptions(), NoProgress())
    return parameters, time.perf_counter() - start


def numbers_of(checkpoint: Checkpoint, case: Case, parameters: QParams | None) -> RecipeNumbers:
    if case.absmax:
        return RecipeNumbers(checkpoint, WeightRows(checkpoint, stored=PlainScales(checkpoint)))
    if parameters is None:
        return plain_numbers(checkpoint)
    return calibrated_numbers(checkpoint, case.recipe, parameters, get_target("onnxruntime"))


def scorer(numbers: RecipeNumbers, recipe: Recipe) -> Scorer:
    """The eager model with the recipe's weights, activations and caches; layers are made once and kept."""
    config = numbers.checkpoint.config
    precisions = WeightPrecisions.from_recipe(recipe, config)
    model = EagerModel(
        numbers.checkpoint,
        RecipeValues(numbers.rows, precisions),
        activation_rounding=precisions.rounding(asked_rounding),
        input_scales=numbers.input_scales,
        kv_cache=recipe.kv_cache,
        kv_scales=numbers.kv_scales,
    )
    layers = [model.layer(index) for index in range(config.num_layers)]

    def score(ids: np.ndarray) -> np.ndarray:
        hidden = model.embed([ids])[0]
        for layer in layers:
            hidden = layer.run(hidden, chunk=len(ids)).hidden
        return model.logits(hidden)

    return score


def layer_bits(checkpoint: Checkpoint, recipe: Recipe) -> float:
    """Bits per weight of the decoder layers' matrices, scales and zero points included."""
    tensors = [tensor for tensor in coverage(checkpoint.config, recipe).tensors if ".layers." in tensor.name]
    return sum(each.stored_bits(matrix_bits) for each in tensors) / sum(each.parameters for each in tensors)


def measured(checkpoint: Checkpoint, case: Case, ids: np.ndarray, work: Path) -> tuple[Scorer, float, float]:
    """(scorer, bits per weight of the layers' matrices, seconds of calibration)."""
    parameters, seconds = parameters_of(checkpoint, case.recipe, ids, work)
    numbers = numbers_of(checkpoint, case, parameters)
    return scorer(numbers, case.recipe), layer_bits(checkpoint, case.recipe), seconds
