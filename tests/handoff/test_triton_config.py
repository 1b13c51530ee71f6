"""config.pbtxt, read by protobuf's own text parser against Triton's field names."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from google.protobuf import text_format

from exporter.handoff.files import handoff_files
from exporter.handoff.pbtxt import Word, write_message
from exporter.handoff.triton import MODEL_PY, config, triton_repository
from exporter.handoff.triton_native import LABELS as LABELS_FILE
from exporter.handoff.triton_native import native_files, native_section, onnx_config, plan_config
from tests.artifact.sample import manifest
from tests.handoff.model_config import ENUMS, MESSAGES, ModelConfig, parse
from tests.handoff.samples import LABELS, facts, plan_facts

TENSORRT = {"toolkit": "tensorrt_rtx", "version": "1.7.1"}


def dtype(tensor: Any) -> str:
    return ENUMS["DataType"][tensor.data_type]


def kind(model: Any) -> str:
    return ENUMS["ModelInstanceGroup.Kind"][model.instance_group[0].kind]


def test_generating_models_take_text_and_options() -> None:
    model = parse(config(facts()))
    assert (model.backend, model.platform, model.max_batch_size, model.name) == ("python", "", 4, "")
    inputs = {tensor.name: (dtype(tensor), list(tensor.dims), tensor.optional) for tensor in model.input}
    assert inputs == {
        "text_input": ("TYPE_STRING", [1], False),
        "max_new_tokens": ("TYPE_INT32", [1], True),
        "temperature": ("TYPE_FP32", [1], True),
        "top_p": ("TYPE_FP32", [1], True),
        "seed": ("TYPE_INT64", [1], True),
    }
    outputs = {tensor.name: (dtype(tensor), list(tensor.dims)) for tensor in model.output}
    assert outputs["text_output"] == ("TYPE_STRING", [1]) and outputs["output_ids"] == ("TYPE_INT64", [-1])
    assert model.HasField("dynamic_batching") and not model.model_transaction_policy.decoupled
    assert kind(model) == "KIND_CPU" and model.instance_group[0].count == 1


def test_the_model_knows_its_engine_by_parameters() -> None:
    given = {name: value.string_value for name, value in parse(config(facts())).parameters.items()}
    assert given == {"engine": "../..", "digest": "", "threads": "0", "rows": "4", "max_new_tokens": "128"}


def test_streaming_models_are_decoupled_and_not_batched() -> None:
    model = parse(config(facts(), streaming=True))
    assert model.model_transaction_policy.decoupled and not model.HasField("dynamic_batching")
    assert [t.name for t in model.input] == [t.name for t in parse(config(facts())).input]


def test_classifiers_give_a_label_and_a_probability_each() -> None:
    model = parse(config(facts(task=LABELS)))
    outputs = {tensor.name: (dtype(tensor), list(tensor.dims)) for tensor in model.output}
    assert outputs == {"label": ("TYPE_STRING", [1]), "probabilities": ("TYPE_FP32", [2])}
    assert [tensor.name for tensor in model.input] == ["text_input"]
    assert set(triton_repository(facts(task=LABELS))) == {"enginesmith/config.pbtxt", "enginesmith/1/model.py"}


def test_engines_of_gpus_are_placed_on_one() -> None:
    assert kind(parse(config(facts("tensorrt", gpu=TENSORRT)))) == "KIND_GPU"


def test_the_repository_has_the_layout_triton_reads() -> None:
    files = triton_repository(facts())
    assert set(files) == {
        "enginesmith/config.pbtxt",
        "enginesmith/configs/streaming.pbtxt",
        "enginesmith/1/model.py",
    }
    compile(MODEL_PY, "model.py", "exec")


def test_graphs_of_onnxruntime_keep_whole_shapes_and_name_their_caches() -> None:
    model = parse(onnx_config(facts()))
    assert (model.platform, model.max_batch_size, kind(model)) == ("onnxruntime_onnx", 0, "KIND_CPU")
    shapes = {tensor.name: list(tensor.dims) for tensor in (*model.input, *model.output)}
    assert shapes["past_key_values.0.key"] == shapes["present.0.key"] == [-1, 2, -1, 16]
    assert shapes["logits"] == [-1, 1, 320] and shapes["input_ids"] == [-1, -1]


def test_plans_leave_the_batch_to_triton_and_scalars_are_reshaped() -> None:
    model = parse(plan_config(plan_facts()))
    assert (model.platform, model.max_batch_size, kind(model)) == ("tensorrt_plan", 4, "KIND_GPU")
    inputs = {tensor.name: tensor for tensor in model.input}
    assert list(inputs["input_ids"].dims) == [-1] and not inputs["input_ids"].HasField("reshape")
    assert list(inputs["last_rows"].dims) == [1] and inputs["last_rows"].HasField("reshape")
    assert not inputs["last_rows"].reshape.shape
    (logits,) = model.output
    assert (list(logits.dims), dtype(logits), logits.label_filename) == ([2], "TYPE_FP32", LABELS_FILE)
    assert native_files(plan_facts())["enginesmith_graph/labels.txt"] == "safe\nunsafe\n"


def test_what_tritons_own_backends_do_not_take_is_said() -> None:
    assert not native_files(plan_facts("tensorrt_rtx"))
    assert "TensorRT-RTX" in native_section(plan_facts("tensorrt_rtx"))
    generating = plan_facts(task=facts().task)
    assert not native_files(generating) and "caches must keep their address" in native_section(generating)
    assert not native_files(facts("tvm")) and not native_section(facts("tvm"))
    odd = facts(inputs={"x": facts().inputs["input_ids"], "y": type(facts().inputs["input_ids"])("float8e4m3fn", ())})
    assert not native_files(odd) and "no name for" in native_section(odd)


def test_native_models_stand_apart_from_the_repository(tmp_path: Path) -> None:
    """A model without its file would keep Triton from starting."""
    files = handoff_files(manifest(), tmp_path)
    folders = {Path(name).parts[0] for name in files if "/" in name}
    assert folders == {"triton", "triton-native"}
    assert not [name for name in files if name.startswith("triton/") and "enginesmith_graph" in name]
    assert all(parse(text) for name, text in files.items() if name.endswith(".pbtxt"))


def test_text_is_escaped_as_the_format_asks() -> None:
    text = write_message({"name": 'a "b" \\ c\nd', "max_batch_size": 2, "input": [{"dims": []}, {"optional": True}]})
    model = parse(text)
    assert model.name == 'a "b" \\ c\nd' and model.max_batch_size == 2
    assert [list(model.input[0].dims), model.input[1].optional] == [[], True]


@pytest.mark.parametrize("bad", [{"no_such_field": 1}, {"backend": Word("python")}, {"max_batch_size": "4"}])
def test_the_parser_of_these_tests_refuses_what_triton_would(bad: dict[str, Any]) -> None:
    with pytest.raises(text_format.ParseError):
        parse(write_message(bad))


def published() -> ModuleType:
    """tritonclient's model_config_pb2, without the gRPC that its package imports."""
    package = importlib.util.find_spec("tritonclient")
    if package is None or not package.submodule_search_locations:
        pytest.skip("the package tritonclient, which has the published descriptors, is not installed")
    path = Path(next(iter(package.submodule_search_locations)), "grpc", "model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["model_config_pb2"] = module
    spec.loader.exec_module(module)
    return module


def test_the_subset_is_that_of_the_published_descriptors() -> None:
    module = published()
    for name, fields in MESSAGES.items():
        theirs = getattr(module, name).DESCRIPTOR.fields_by_name
        ours = ModelConfig.DESCRIPTOR.file.message_types_by_name[name].fields_by_name
        for field in fields:
            for what in ("number", "type", "is_repeated"):
                assert getattr(ours[field], what) == getattr(theirs[field], what), f"{name}.{field} {what}"
    enum = module.DESCRIPTOR.enum_types_by_name["DataType"]
    assert tuple(value.name for value in enum.values) == ENUMS["DataType"]
    for text in (*triton_repository(facts()).values(), onnx_config(facts()), plan_config(plan_facts())):
        if text != MODEL_PY:
            text_format.Parse(text, module.ModelConfig())
