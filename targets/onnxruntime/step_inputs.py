"""What a step needs to know about positions, computed once from `input_ids` and `attention_mask`."""

from dataclasses import dataclass

import onnx_ir as ir

from targets.onnxruntime.engine_graph import EngineGraph
from targets.onnxruntime.even_rows import EvenRows

INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64


@dataclass(frozen=True)
class StepInputs:
    """Values of one step. With S new columns and T = columns of the mask so far:

    seqlens_k int32 [B]: valid positions of a row after this step, less one; total_sequence_length int32: T;
    last_rows int64 [B]: where each row's last valid position lies among the B * S new ones. Rows start at T - S,
    except in a step of one token, where each row stands at its own length. `standard` holds what the canonical
    layer asks for where its attention stays in standard operators; empty otherwise. `tokens` are the B * S rows that
    layers multiply, `last_tokens` the B ones of the head.
    """

    input_ids: ir.Value
    seqlens_k: ir.Value
    total_sequence_length: ir.Value
    last_rows: ir.Value
    standard: dict[str, ir.Value]
    tokens: EvenRows
    last_tokens: EvenRows


def step_inputs(graph: EngineGraph, standard_attention: bool) -> StepInputs:
    """Declare the token inputs and derive the rest from them."""
    ids = graph.input("input_ids", INT64, ["batch_size", "sequence_length"])
    mask = graph.input("attention_mask", INT64, ["batch_size", "total_sequence_length"])
    op, zero, one = graph.op, graph.constant(0), graph.constant(1)
    valid = op("ReduceSum", [mask, graph.constant([1])], "step.valid_positions", attributes={"keepdims": 0})
    last = op("Sub", [valid, one], "step.last_positions")
    total = op("Gather", [op("Shape", [mask], "step.mask_shape"), one], "step.total_positions")
    shape = op("Shape", [ids], "step.ids_shape")
    batch, new = op("Gather", [shape, zero], "step.batch"), op("Gather", [shape, one], "step.new_positions")
    start = op("Sub", [total, new], "step.first_column")
    column = op("Sub", [last, start], "step.last_column")
    bounded = op(
        "Min", [op("Max", [column, zero], "step.at_least_0"), op("Sub", [new, one], "step.end")], "step.column"
    )
    firsts = op("Mul", [op("Range", [zero, batch, one], "step.rows"), new], "step.row_starts")
    last_rows = op("Add", [firsts, bounded], "step.last_rows")
    return StepInputs(
        input_ids=ids,
        seqlens_k=op("Cast", [last], "step.seqlens_k", attributes={"to": int(INT32)}),
        total_sequence_length=op("Cast", [total], "step.total_sequence_length", attributes={"to": int(INT32)}),
        last_rows=last_rows,
        standard=_standard_inputs(graph, valid, new) if standard_attention else {},
        tokens=EvenRows(graph, ids, axes=2),
        last_tokens=EvenRows(graph, last_rows, axes=1),
    )


def _standard_inputs(graph: EngineGraph, valid: ir.Value, new: ir.Value) -> dict[str, ir.Value]:
    """The inputs of a canonical layer: write_indices [B], nonpad_kv_seqlen [B], position_ids [B, S].

    A row starts where its valid positions end, less the new columns; at 0 for a right-padded first prompt.
    """
    op, zero, one = graph.op, graph.constant(0), graph.constant(1)
    write = op("Max", [op("Sub", [valid, new], "step.start"), zero], "step.write_indices")
    columns = op("Range", [zero, new, one], "step.columns")
    first = op("Unsqueeze", [write, graph.constant([1])], "step.first_position")
    return {
        "write_indices": write,
        "nonpad_kv_seqlen": op("Add", [write, new], "step.nonpad_kv_seqlen"),
        "position_ids": op("Add", [first, columns], "step.position_ids"),
    }
