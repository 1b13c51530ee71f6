"""What a fusing pass is, and how rewrite rules of onnxscript become one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnxscript.rewriter import MatchingTracer
from onnxscript.rewriter.pattern import RewriteRule, RewriteRuleSet

from exporter.core.canonical import Slice
from exporter.core.config import ModelConfig


@dataclass(frozen=True)
class Context:
    """What a pass may know beside the slice. `max_seq_len` bounds positions and the static cache."""

    config: ModelConfig
    max_seq_len: int


@dataclass(frozen=True)
class Outcome:
    """How often a pass fired in a slice, and why not where it came close (empty if unknown)."""

    fired: int
    why_not: str = ""


@dataclass(frozen=True)
class FusePass:
    """A step of the pipeline: rewrites a slice in place. `expected` says how often it must fire in each kind.

    A kind that `expected` lacks is left alone; None means any number of times.
    """

    name: str
    summary: str
    expected: Mapping[str, int | None]
    apply: Callable[[Slice, Context], Outcome]


def apply_rules(model: ir.Model, rules: list[RewriteRule], expected: int) -> Outcome:
    """Apply rules to a graph, operands of Add and Mul in either order; explains the best near-miss if too few fired."""
    ruleset = RewriteRuleSet(rules, commute=True)
    fired = ruleset.apply_to_model(model)
    if fired >= expected:
        return Outcome(fired)
    tracer = MatchingTracer()
    ruleset.apply_to_model(model, tracer=tracer)
    matches = [match for best in tracer.best_matches_map.values() for match in best]
    if not matches:
        return Outcome(fired)
    nearest = max(matches, key=lambda match: match.score())
    reason = nearest.match_result.reason or "the operators around it differ"
    return Outcome(
        fired, f"nearest match at {nearest.root_node.op_type} {nearest.root_node.outputs[0].name!r}: {reason}"
    )
