"""One slice run on ONNX Runtime with its optimizer off: the second runtime that parity compares with."""

from typing import TYPE_CHECKING, Any

import numpy as np

from targets.onnxruntime.ortvalues import Feed, to_numpy

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime as ort


class SliceSession:
    """A canonical or raw slice, ready to run; weights are inputs, so one session serves every layer of a structure.

    `constants` are inputs that stay the same for all runs. Four-bit inputs (INT4, UINT4) are numpy arrays of
    codes [N, K], one a byte; bfloat16 ones have ml_dtypes' dtype. Inputs are bound by pointer, not copied
    (four-bit ones are packed). A session is created for each set of fetched values and kept.
    """

    def __init__(
        self, structure: "ir.Model", constants: dict[str, np.ndarray] | None = None, *, threads: int = 0
    ) -> None:
        import onnx_ir as ir

        self._proto = ir.to_proto(structure)
        self._types = {value.name: value.type.tensor_type.elem_type for value in self._proto.graph.input}
        self._outputs = [value.name for value in self._proto.graph.output]
        self._constants = self._feeds(constants or {})
        self._threads = threads
        self._sessions: dict[tuple[str, ...], ort.InferenceSession] = {}

    @property
    def input_names(self) -> list[str]:
        """Activations and weights that `run` expects, those given as constants included."""
        return list(self._types)

    @property
    def output_names(self) -> list[str]:
        return list(self._outputs)

    def run(self, feeds: dict[str, np.ndarray], fetch: list[str] | None = None) -> dict[str, np.ndarray]:
        """Values by name: the slice's outputs, or exactly those in `fetch`, which may name intermediate values.

        Raises KeyError for missing or unknown inputs and for unknown values, TypeError for a wrong dtype.
        """
        names = list(dict.fromkeys(fetch)) if fetch is not None else self._outputs
        session = self._session(names)
        given = {**self._constants, **self._feeds(feeds)}
        if missing := sorted(self._types.keys() - given.keys()):
            raise KeyError(f"inputs missing: {missing}")
        binding = session.io_binding()
        for name, feed in given.items():
            feed.bind(binding, name)
        for name in names:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        return {name: to_numpy(value) for name, value in zip(names, binding.get_outputs(), strict=True)}

    def _feeds(self, arrays: dict[str, np.ndarray]) -> dict[str, Feed]:
        if unknown := sorted(arrays.keys() - self._types.keys()):
            raise KeyError(f"no such inputs: {unknown}")
        return {name: Feed.of(name, array, self._types[name]) for name, array in arrays.items()}

    def _session(self, names: list[str]) -> "ort.InferenceSession":
        key = tuple(sorted(names))
        if key not in self._sessions:
            self._sessions[key] = _open(self._with_outputs(names), self._threads)
        return self._sessions[key]

    def _with_outputs(self, names: list[str]) -> Any:
        """The slice as a ModelProto whose outputs are exactly `names`; values left over are computed in vain."""
        produced = {name for node in self._proto.graph.node for name in node.output if name}
        if unknown := [name for name in names if name not in produced]:
            raise KeyError(f"no such values in the slice: {unknown}")
        proto = type(self._proto)()
        proto.CopyFrom(self._proto)
        # A value without a type is allowed as an output: ONNX Runtime infers it.
        known = {value.name: value for value in self._proto.graph.output}
        del proto.graph.output[:]
        for name in names:
            output = proto.graph.output.add(name=name)
            if name in known:
                output.CopyFrom(known[name])
        return proto


def _open(proto: Any, threads: int) -> "ort.InferenceSession":
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # Without arena and pattern, the memory of a large layer goes back when its run ends.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
