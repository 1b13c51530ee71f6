"""Files of parameters of a tiny checkpoint, with every kind of code in them."""

from pathlib import Path

import numpy as np

from calibration.qparams import QParams
from calibration.qparams_writer import QParamsWriter
from calibration.rtn import quantize_rows
from calibration.transforms import FoldNorms, RotateHeads, RotateResidual, ScaleInput
from exporter.core.checkpoint import Checkpoint
from exporter.core.recipe import Precision, Recipe
from exporter.core.weights import QuantizedRows

RECIPE = Recipe("int4-gptq", Precision("int4", 32), Precision("int8", 32), Precision("int8", 32), "fp8", ("gptq",))
DATA = {
    "text_sha256": "ab" * 32,
    "format": "text",
    "documents": 3,
    "tokens": 512,
    "sequences": 4,
    "length": 128,
    "seed": 0,
}
PRECISIONS = (
    Precision("int4", 32),
    Precision("int4", 16, symmetric=False),
    Precision("int4", -1),
    Precision("int6", 32),
    Precision("int8", -1),
    Precision("int8", 64, symmetric=False),
    Precision("fp8", 0),
    Precision("fp8", -1),
    Precision("nf4", 64),
    Precision("nvfp4", 16),
    Precision("mxfp4", 32),
)
TENSOR = "model.layers.0.mlp.up_proj.weight"
TRANSFORMS = (
    FoldNorms(),
    RotateResidual(11),
    RotateHeads(12),
    ScaleInput(0, "mlp_hidden", np.linspace(0.5, 2, 128, dtype=np.float32)),
    ScaleInput(1, "attention_output", np.linspace(0.5, 2, 32, dtype=np.float32)),
)


def random_codes(precision: Precision, rows: int = 128, width: int = 64, seed: int = 0) -> QuantizedRows:
    """Every code and any scale that a precision allows."""
    random = np.random.default_rng(seed)
    shape = (rows, precision.groups(width))
    scales = random.uniform(0.01, 2, shape).astype(np.float32)
    zeros = None
    if precision.kind == "mxfp4":
        scales = np.exp2(random.integers(-100, 100, shape)).astype(np.float32)
    if precision.is_integer and precision.symmetric:
        half = 1 << (precision.bits - 1)
        codes = random.integers(-half, half, (rows, width)).astype(np.int8)
        scales *= random.choice(np.array([-1, 1], np.float32), shape)
    else:
        codes = random.integers(0, 1 << precision.bits, (rows, width)).astype(np.uint8)
    if precision.kind == "fp8":
        codes[(codes & 0x7F) == 0x7F] = 0
    if not precision.symmetric:
        zeros = random.integers(0, 1 << precision.bits, shape).astype(np.uint8)
    return QuantizedRows(codes, scales, zeros, precision)


def write_sample(path: Path, checkpoint: Checkpoint, *, reverse: bool = False) -> QParams:
    """Codes at every precision of one tensor, of another as rounded, all statistics, transforms and reports."""
    with QParamsWriter(path, source_digest=checkpoint.digest, recipe=RECIPE, data=DATA) as writer:
        for transform in TRANSFORMS:
            writer.add_transform(transform)
        for precision in reversed(PRECISIONS) if reverse else PRECISIONS:
            writer.add_codes(TENSOR, random_codes(precision))
        name = "lm_head.weight"
        values = np.random.default_rng(1).standard_normal((checkpoint.config.vocab_size, 64)).astype(np.float32)
        step = 7 if reverse else 100
        writer.add_codes(
            name, (quantize_rows(values[low : low + step], RECIPE.lm_head) for low in range(0, len(values), step))
        )
        add_statistics(writer, 1 if reverse else 0)
        add_statistics(writer, 0 if reverse else 1)
        writer.add_input_amax(None, "head_input", np.full(64, 3.0))
        return writer.finish()


def add_statistics(writer: QParamsWriter, layer: int) -> None:
    widths = {"attention_input": 64, "attention_output": 64, "mlp_input": 64, "mlp_hidden": 128}
    for point, width in widths.items():
        clip = 1.5 if point == "mlp_hidden" else None
        writer.add_input_amax(layer, point, np.linspace(1, 2 + layer, width), clip)
    writer.add_kv_amax(layer, np.linspace(0, 5, 32), np.linspace(0, 2, 32))
    writer.add_report(f"model.layers.{layer}.mlp.up_proj", {"damping": 0.01, "order": "descending"})
