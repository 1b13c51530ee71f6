"""The Relax module of an engine: kernels, and the VM functions `embed`, `layer`, `head` and `forward` over them."""

from collections.abc import Callable, Iterable
from functools import partial

import tvm
from tvm import relax, tirx

from targets.tvm.isa import Isa
from targets.tvm.lower.kernel_table import generate
from targets.tvm.lower.program import Call, Kernel, LoweredModel, Program, Tensor
from targets.tvm.lower.tensors import IDS, OUT_ROWS, POSITIONS, SEGMENTS, TOKEN_ROWS
from targets.tvm.tuning import DEFAULT, Tuning

Generate = Callable[[Isa, str, str, tuple[object, ...]], tirx.PrimFunc]


class _Sizes:
    """The letters of shapes as symbols of one function."""

    def __init__(self) -> None:
        self._symbols: dict[str, tirx.Var] = {}

    def type(self, tensor: Tensor) -> relax.TensorType:
        return relax.TensorType([self._size(size) for size in tensor.shape], tensor.dtype)

    def tuple(self, tensors: Iterable[Tensor]) -> relax.TupleType:
        return relax.TupleType([self.type(tensor) for tensor in tensors])

    def variable(self, tensor: Tensor) -> relax.Var:
        return relax.Var(tensor.name, self.type(tensor))

    def _size(self, size: int | str) -> tirx.Expr:
        if isinstance(size, int):
            return tirx.IntImm("int64", size)
        if size not in self._symbols:
            self._symbols[size] = tirx.Var(size, "int64")
        return self._symbols[size]


class ModuleBuilder:
    """Adds VM functions to one module; a kernel that several of them call is generated once.

    `chunk` bounds the tokens, segments and wanted rows of a step: memory is planned for it once. It reserves
    addresses, not pages: what a short step does not touch stays unused.
    """

    def __init__(self, isa: Isa, chunk: int, generate_kernel: Generate = generate) -> None:
        self._isa, self._chunk, self._generate = isa, chunk, generate_kernel
        self._builder = relax.BlockBuilder()
        self._kernels: dict[Kernel, tvm.ir.GlobalVar] = {}
        self._functions: dict[str, tvm.ir.GlobalVar] = {}

    def add_function(self, name: str, program: Program) -> None:
        """name(parameters..., [cache], weights) of a program; returns the tensor that it changed in place."""
        builder, sizes = self._builder, _Sizes()
        variables = [sizes.variable(tensor) for tensor in program.parameters]
        values: dict[str, relax.Expr] = dict(zip((t.name for t in program.parameters), variables, strict=True))
        tuples = {"cache": program.cache, "weights": program.weights}
        if not program.cache:
            del tuples["cache"]
        given = {word: relax.Var(word, sizes.tuple(tensors)) for word, tensors in tuples.items()}
        with builder.function(name, [*variables, *given.values()], attrs=self._bounds()):
            with builder.dataflow():
                for word, tensors in tuples.items():
                    for index, tensor in enumerate(tensors):
                        values[tensor.name] = builder.emit(relax.TupleGetItem(given[word], index))
                for call in program.calls:
                    self._emit(call, values, sizes)
                result = builder.emit_output(values[program.result.name])
            builder.emit_func_output(result)
        self._functions[name] = builder.get().get_global_var(name)

    def add_forward(self, model: LoweredModel) -> None:
        """The whole step: calls of the functions added before, so its size alone grows with depth."""
        builder, sizes = self._builder, _Sizes()
        hidden, _, logits = model.head.program.parameters
        steps = [sizes.variable(tensor) for tensor in (IDS, POSITIONS, TOKEN_ROWS, SEGMENTS, OUT_ROWS, hidden, logits)]
        ids, positions, token_rows, segments, out_rows, stream, filled = steps
        caches = relax.Var("caches", relax.TupleType([sizes.tuple(layer.program.cache) for layer in model.layers]))
        weights = relax.Var("weights", relax.TupleType([sizes.tuple(part.program.weights) for part in model.slices]))
        with builder.function("forward", [*steps, caches, weights], attrs=self._bounds()):
            with builder.dataflow():
                parts = [builder.emit(relax.TupleGetItem(weights, index)) for index in range(len(model.slices))]
                stream = builder.emit(relax.Call(self._functions["embed"], [ids, stream, parts[0]]))
                for index, function in enumerate(model.layer_functions):
                    cache = builder.emit(relax.TupleGetItem(caches, index))
                    arguments = [stream, positions, token_rows, segments, cache, parts[1 + index]]
                    stream = builder.emit(relax.Call(self._functions[function], arguments))
                result = builder.emit(relax.Call(self._functions["head"], [stream, out_rows, filled, parts[-1]]))
                result = builder.emit_output(result)
            builder.emit_func_output(result)

    def module(self) -> tvm.IRModule:
        return self._builder.get()

    def _bounds(self) -> dict[str, object]:
        return {"tir_var_upper_bound": dict.fromkeys(("T", "R", "Q"), self._chunk)}

    def _emit(self, call: Call, values: dict[str, relax.Expr], sizes: _Sizes) -> None:
        kernel = self._kernel(call.kernel)
        given = relax.Tuple([values[tensor.name] for tensor in (*call.inputs, *call.written)])
        results = [*call.written, *call.outputs]
        types = [sizes.type(tensor) for tensor in results]
        if call.written:
            first = len(call.inputs)
            places = [first + index for index in range(len(call.written))] + [-1] * len(call.outputs)
            value = self._builder.emit(relax.call_tir_inplace(kernel, given, places, types))
        else:
            value = self._builder.emit(relax.call_tir(kernel, given, types))
        for index, tensor in enumerate(results):
            single = len(results) == 1
            values[tensor.name] = value if single else self._builder.emit(relax.TupleGetItem(value, index))

    def _kernel(self, kernel: Kernel) -> tvm.ir.GlobalVar:
        if kernel not in self._kernels:
            name = f"{kernel.factory}_{len(self._kernels)}"
            function = self._generate(self._isa, name, kernel.factory, kernel.arguments)
            self._kernels[kernel] = self._builder.add_func(_with_root_block(function), name)
        return self._kernels[kernel]


def relax_module(model: LoweredModel, isa: Isa, tuning: Tuning = DEFAULT) -> tvm.IRModule:
    """`embed`, `layer` (or `layer_0`, `layer_1`, ...), `head` and `forward` of a model."""
    builder = ModuleBuilder(isa, tuning.chunk, partial(generate, tuning=tuning))
    builder.add_function("embed", model.embedding.program)
    for name, layer in dict(zip(model.layer_functions, model.layers, strict=True)).items():
        builder.add_function(name, layer.program)
    builder.add_function("head", model.head.program)
    builder.add_forward(model)
    return builder.module()


def _with_root_block(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Relax expects a kernel's body in a root block."""
    block = tvm.s_tir.SBlock([], [], [], "root", function.body)
    return function.with_body(tvm.s_tir.SBlockRealize([], True, block))
