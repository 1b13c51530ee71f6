"""Lowering by hand: complete for a Llama, honest about what it does not know."""

import torch

from exporter.trace.lower_program import TRANSLATED, lower_program


class Steps(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halved = torch.nn.functional.dropout(x.to(torch.float64), 0.5, training=False)
        return halved.transpose(0, 1).contiguous().to(torch.float32) * 2


class Unknown(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cumsum(x, 0)


def export(module: torch.nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(module, (torch.randn(2, 3),), strict=False)


def test_lowers_composites_and_keeps_the_values() -> None:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    program = export(Steps())
    assert lower_program(program)
    assert {node.target for node in program.graph.nodes if node.op == "call_function"} <= TRANSLATED
    program.graph_module.recompile()
    assert torch.equal(program.graph_module(x)[0], Steps()(x))
    assert program.run_decompositions({}) is program


def test_leaves_the_decomposition_on_for_an_unknown_operator() -> None:
    program = export(Unknown())
    assert not lower_program(program)
    assert program.run_decompositions() is not program


def test_keeps_a_dropout_that_drops() -> None:
    program = torch.export.export(torch.nn.Dropout(0.5).train(), (torch.randn(2, 3),), strict=False)
    assert not lower_program(program)
