"""TensorRT-RTX parses and builds the typed graph of every recipe, and makes of it what the table of support says."""

from dataclasses import replace

import pytest

from exporter.core.config import parse_config
from exporter.core.recipe import CHANNEL, TENSOR, Precision
from exporter.core.task import Task
from targets.tensorrt.support import LEAST_HEADS, precision_support, recipe_support
from tests.support.tiny import BASE, SHAPES, write_checkpoint
from tests.targets.engines import build_source
from tests.targets.tensorrt import rtx
from tests.targets.tensorrt.typed_engines import LIMITS, recipe_of, typed, typed_source

pytest.importorskip("tensorrt_rtx")
FP16 = Precision("fp16")
# Whole blocks of 128 in every row, more than one of them.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4}
MATRICES = 4
DECODED_IN_PRODUCT = [
    *(Precision("int4", group) for group in (16, 32, 64, 128, 256, CHANNEL)),
    Precision("int4", 128, activations="int8/token"),
    Precision("int8", CHANNEL),
    Precision("fp8", CHANNEL),
    Precision("fp8", TENSOR),
]
DECODED_APART = [Precision("int8", 32), Precision("int6", 64), Precision("int8", 128, activations="int8/token")]
EIGHT_BIT_PRODUCT = [
    *(Precision("int8", CHANNEL, activations=f"int8/{way}") for way in ("token", "tensor")),
    *(Precision("fp8", group, activations=f"fp8/{way}") for group in (CHANNEL, TENSOR) for way in ("token", "tensor")),
]
CODE_TYPES = {"int4": "Int4", "int8": "Int8", "int6": "Int8", "fp8": "FP8", "nvfp4": "FP4E2M1"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("wide"), gain=0.5, **WIDE)


def built(checkpoint, tmp_path, precision, capability="SM89", half="fp16"):
    found = rtx.build(typed(checkpoint, recipe_of(precision, half), tmp_path).model.path, capability)
    assert found.plan, found.complaints
    return found


def kernels_reading(found: rtx.Built, code_type: str) -> list[rtx.Kernel]:
    """Of one of the two profiles: both have their own kernels."""
    reading = [kernel for kernel in found.kernels if code_type in kernel.constants]
    assert len(reading) % 2 == 0
    return reading[: len(reading) // 2]


@pytest.mark.parametrize("precision", DECODED_IN_PRODUCT, ids=Precision.describe)
def test_weights_are_decoded_in_the_product(wide, tmp_path, precision):
    level = "emulated" if precision.activations else "native"
    assert precision_support(precision).level == level
    readers = kernels_reading(built(wide, tmp_path, precision), CODE_TYPES[precision.kind])
    assert len(readers) == MATRICES
    assert all(kernel.kind == "runtime_fusion" and "Fc" in kernel.name for kernel in readers), readers


@pytest.mark.parametrize("precision", DECODED_APART, ids=Precision.describe)
def test_blocks_of_eight_bits_are_decoded_apart(wide, tmp_path, precision):
    assert precision_support(precision).level == "emulated"
    readers = kernels_reading(built(wide, tmp_path, precision), "Int8")
    assert len(readers) == MATRICES
    assert all(kernel.kind == "kgen" and kernel.outputs == ("Half",) for kernel in readers), readers


@pytest.mark.parametrize("precision", EIGHT_BIT_PRODUCT, ids=Precision.describe)
def test_rounded_inputs_lead_to_products_of_codes_into_float32(wide, tmp_path, precision):
    assert precision_support(precision).level == "native"
    code_type = CODE_TYPES[precision.kind]
    readers = kernels_reading(built(wide, tmp_path, precision), code_type)
    assert len(readers) == MATRICES
    for kernel in readers:
        assert kernel.kind == "gemm" and kernel.inputs[0] == code_type and kernel.outputs == ("Float",), kernel


def test_nvfp4_with_rounded_inputs_is_a_product_of_codes(wide, tmp_path):
    rounded = Precision("nvfp4", 16, activations="nvfp4/tensor")
    assert precision_support(rounded).level == "native"
    readers = kernels_reading(built(wide, tmp_path / "rounded", rounded, "SM120"), "FP4E2M1")
    assert [kernel.kind for kernel in readers] == ["gemm"] * MATRICES
    assert all(kernel.inputs[0] == "FP4E2M1" for kernel in readers)
    weights_alone = Precision("nvfp4", 16)
    assert precision_support(weights_alone).level == "emulated"
    readers = kernels_reading(built(wide, tmp_path / "weights", weights_alone, "SM120"), "FP4E2M1")
    assert [kernel.kind for kernel in readers] == ["kgen"] * MATRICES


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_layers_of_a_plain_engine_are_native(tmp_path, half):
    """L layers: 2L caches updated in place, L attentions, 2L rotations. The parser makes ordinary operators of
    RMSNormalization; the builder fuses each into one kernel again."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", num_hidden_layers=3)
    layers = built(checkpoint, tmp_path / "engine", Precision(half), half=half).layers
    expected = {"KV_CACHE_UPDATE": 6, "ATTENTION_INPUT": 3, "ATTENTION_OUTPUT": 3, "ROTARY_EMBEDDING": 6, "REDUCE": 7}
    assert {kind: layers[kind] for kind in expected} == expected
    assert layers["MATRIX_MULTIPLY"] == 4 * 3 + 1


def test_a_step_copies_no_cache(tmp_path):
    """With queries scaled beforehand and a scale of 1, a kernel would copy one of the caches as it is."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    found = built(checkpoint, tmp_path / "engine", FP16)
    assert not [kernel for kernel in found.kernels if kernel.name.startswith("__myl_Move_")]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_model_builds(tmp_path, shape):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", shape)
    built(checkpoint, tmp_path / "engine", Precision("fp8", CHANNEL, activations="fp8/token"))


def test_classifiers_build_without_a_cache(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", num_attention_heads=2)
    task = Task("classify", ("safe", "unsafe"), (5, 9))
    source = replace(build_source(checkpoint, recipe_of(FP16), LIMITS), task=task)
    found = rtx.build(typed_source(source, tmp_path / "engine").model.path, classify=True)
    assert found.plan, found.complaints
    assert "KV_CACHE_UPDATE" not in found.layers


HEADS = [
    *((8, 4, 2), (16, 4, 2), (20, 4, 2), (24, 4, 1), (256, 4, 2), (264, 4, 2)),
    *((64, 1, 1), (64, 2, 1), (64, 3, 3), (64, 4, 4), (32, 5, 1), (32, 6, 3)),
]


@pytest.mark.parametrize(("size", "heads", "kv_heads"), HEADS)
def test_heads_build_where_support_says_so(tmp_path, size, heads, kv_heads):
    changes = {"head_dim": size, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint", **changes, hidden_size=heads * size, num_hidden_layers=1, intermediate_size=64
    )
    engine = typed(checkpoint, recipe_of(FP16), tmp_path / "engine")
    support = recipe_support(engine.source.config, engine.source.recipe)
    assert bool(rtx.build(engine.model.path).plan) == support.usable, support


@pytest.mark.parametrize(
    ("precision", "capability", "accepted"),
    [
        (Precision("fp8", CHANNEL), "SM86", False),
        (Precision("fp8", CHANNEL, activations="fp8/token"), "SM80", False),
        (Precision("fp8", CHANNEL, activations="fp8/token"), "SM89", True),
        (Precision("nvfp4", 16), "SM89", False),
        (Precision("nvfp4", 16), "SM120", True),
        (Precision("int8", CHANNEL, activations="int8/token"), "SM75", False),
        (Precision("int8", CHANNEL), "SM75", True),
        (Precision("int4", 128), "SM75", False),
    ],
    ids=str,
)
def test_what_an_sm_cannot_do_is_known_before(wide, tmp_path, precision, capability, accepted):
    engine = typed(wide, recipe_of(precision), tmp_path)
    number = int(capability.removeprefix("SM"))
    support = recipe_support(engine.source.config, engine.source.recipe, (number // 10, number % 10))
    assert support.usable == accepted
    assert bool(rtx.build(engine.model.path, capability).plan) == accepted
    if not accepted:
        assert capability in support.why and support.remedy


def test_fewer_heads_suffice_for_classifiers():
    config = parse_config({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **BASE})
    config = replace(config, num_heads=2, head_dim=32)
    recipe, task = recipe_of(FP16), Task("classify", ("a", "b"), (1, 2))
    assert recipe_support(config, recipe, None, task).usable
    refused = recipe_support(config, recipe)
    assert not refused.usable and f"{LEAST_HEADS['generate']} or more" in refused.why
