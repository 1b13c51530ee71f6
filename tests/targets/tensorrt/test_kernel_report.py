"""Kernels of engines, from lines that TensorRT-RTX 1.7.1 logged and from the form of TensorRT's inspector."""

import json
from typing import Any

from targets.tensorrt.kernel_report import Kernel, inspected_kernels, kernel_report, logged_kernels

FP8 = "Dimensions: [-1,128], Strides: [128,1], StrideOrder: [1,0], Datatype: FP8, Format: (Linear) Row major"
LOG = f"""Layers:
Name: __mye4078_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0
Name: l.v+l.q_myl0_2, LayerType: gemm, Inputs: [ {{ Name: x.1_myl0, {FP8} }}], Constants: [ {{ Name: c1, {FP8} }}, {{ Name: c2, Dimensions: [], Datatype: Float, Format: Linear }}], Outputs: [ {{ Name: y, Dimensions: [-1,4], Datatype: Half, Format: L }}], TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: l.q]
Name: _gemv_mha_v1_myl0_4, LayerType: kgen, Inputs: [ {{ Name: q, Datatype: Half }}, {{ Name: m, Datatype: Bool }}], Constants: [], Outputs: [ {{ Name: y, Datatype: Half }}], TacticName: _gemv_mha_v1_0xe1, StreamId: 0, Metadata: 
Name: __myl_ReplCastMulCastFc_myl1_2, LayerType: runtime_fusion, Inputs: [ {{ Name: x, Datatype: Half }}], Constants: [ {{ Name: w, Datatype: Int4 }}, {{ Name: s, Datatype: Half }}], Outputs: [ {{ Name: y, Datatype: Half }}], TacticName: , StreamId: 0, Metadata: 
"""  # noqa: E501


def test_logged_kernels() -> None:
    kernels = logged_kernels(["Engine generation completed in 0.3 seconds.", LOG])
    assert kernels == [
        Kernel("__mye4078_0_myl0_0", "shape_call", 0, (), ()),
        Kernel("l.v+l.q_myl0_2", "gemm", 0, ("FP8",), ("FP8", "Float")),
        Kernel("_gemv_mha_v1_myl0_4", "kgen", 0, ("Half", "Bool"), ()),
        Kernel("__myl_ReplCastMulCastFc_myl1_2", "runtime_fusion", 1, ("Half",), ("Int4", "Half")),
    ]
    assert logged_kernels(["Layers that are none"]) == []


def test_what_manifests_say() -> None:
    assert kernel_report(logged_kernels([LOG]), ["decode", "prefill"]) == {
        "decode": {
            "kernels": {"gemm": 1, "kgen": 1, "shape_call": 1},
            "products": {"FP8": 1},
            "attention": {"_gemv_mha_v1": 1},
        },
        "prefill": {"kernels": {"runtime_fusion": 1}, "products": {"HALF x INT4": 1}, "attention": {}},
    }
    assert kernel_report([], ["prefill"]) == {}


class Inspected:
    """An engine whose inspector gives this JSON."""

    JSON = "JSON"

    def __init__(self, layers: list[Any]) -> None:
        self.layers, self.LayerInformationFormat = layers, self

    def create_engine_inspector(self) -> "Inspected":
        return self

    def get_engine_information(self, form: str) -> str:
        return json.dumps({"Layers": self.layers, "Bindings": []})


def test_inspected_kernels() -> None:
    rows = {"Name": "x", "Location": "Device", "Dimensions": [1, 3], "Format/Datatype": "Row major linear FP16 format"}
    codes = {"Name": "w", "Datatype": "FP8", "Format": "(Linear) Row major linear format"}
    unknown = {"Name": "d", "Format/Datatype": "N/A due to dynamic shapes"}
    layers = [
        {"Name": "a_myl1_0", "LayerType": "gemm", "Inputs": [rows, unknown], "Constants": [codes]},
        {"Name": "Reformatting CopyNode", "LayerType": "Reformat", "Inputs": [rows], "Outputs": [rows]},
        "a name alone, where verbosity is that of names",
    ]
    engine = Inspected(layers)
    assert inspected_kernels(engine, engine) == [
        Kernel("a_myl1_0", "gemm", 1, ("FP16",), ("FP8",)),
        Kernel("Reformatting CopyNode", "Reformat", 0, ("FP16",), ()),
    ]
