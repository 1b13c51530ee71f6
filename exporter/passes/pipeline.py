"""From raw slices to the canonical model: the ordered list of passes, and what each must have done."""

from dataclasses import dataclass, field

from exporter.core.canonical import CanonicalModel, CheckpointWeight, Slice, Weight
from exporter.core.checker import check_canonical
from exporter.core.config import ModelConfig
from exporter.core.errors import BudgetError
from exporter.core.traced import TracedModel
from exporter.passes.fold_shapes import fold_shapes
from exporter.passes.fuse_attention import fuse_attention
from exporter.passes.fuse_rms_norm import fuse_rms_norm
from exporter.passes.fuse_rope import fuse_rope
from exporter.passes.fuse_swish import fuse_swish
from exporter.passes.gather_rows import gather_rows
from exporter.passes.order_operands import order_operands
from exporter.passes.pack_linears import pack_gate_up, pack_qkv
from exporter.passes.remove_no_ops import remove_no_ops
from exporter.passes.rule import Context, FusePass, Outcome
from exporter.passes.set_interface import set_interface
from exporter.passes.use_static_cache import use_static_cache

EVERYWHERE: dict[str, int | None] = {"embedding": None, "layer": None, "head": None}

PASSES = (
    FusePass("fold_shapes", "shape computations become constants", EVERYWHERE, fold_shapes),
    FusePass("remove_no_ops", "operators that change nothing go", EVERYWHERE, remove_no_ops),
    FusePass("order_operands", "weights and constants stand second", EVERYWHERE, order_operands),
    FusePass("fuse_rms_norm", "RMSNormalization", {"layer": 2, "head": 1}, fuse_rms_norm),
    FusePass("fuse_rope", "RotaryEmbedding with tables", {"layer": 2}, fuse_rope),
    FusePass("fuse_attention", "Attention with grouped heads", {"layer": 1}, fuse_attention),
    FusePass("use_static_cache", "TensorScatter into a fixed cache, causal Attention", {"layer": 1}, use_static_cache),
    FusePass("fuse_swish", "Swish", {"layer": 1}, fuse_swish),
    FusePass("pack_qkv", "one projection for query, key and value", {"layer": 1}, pack_qkv),
    FusePass("pack_gate_up", "one projection for gate and up", {"layer": 1}, pack_gate_up),
    FusePass("gather_rows", "logits only of the rows asked for", {"head": 1}, gather_rows),
    FusePass("set_interface", "canonical order of inputs", EVERYWHERE, set_interface),
)


@dataclass(frozen=True)
class Firing:
    """How often a pass fired in the slices that share one structure; `expected` None: any number of times."""

    slices: str
    name: str
    fired: int
    expected: int | None


@dataclass(frozen=True)
class FuseResult:
    """`fired`: times each fusion fired in every layer (in the head, if it is for the head alone).

    `report` counts every pass in every distinct structure.
    """

    model: CanonicalModel
    fired: dict[str, int]
    report: list[Firing] = field(default_factory=list)


def passes_list() -> list[FusePass]:
    """The passes in their order, with what they are for and how often they must fire."""
    return list(PASSES)


def fuse(traced: TracedModel, config: ModelConfig, max_seq_len: int) -> FuseResult:
    """The canonical model of a traced one; `traced` is left as it is.

    Every distinct structure is fused once; slices that share one raw structure share one canonical structure.
    Raises BudgetError: `fuse.missing` when an expected fusion did not fire in every layer, `fuse.rotary` when the
    graph rotates otherwise than the config says, `canonical.invalid` when the result is not canonical.
    """
    context = Context(config, max_seq_len)
    fused: dict[int, Slice] = {}
    report: list[Firing] = []
    slices = []
    for piece in traced.slices:
        if id(piece.structure) not in fused:
            sharing = [each for each in traced.slices if each.structure is piece.structure]
            fused[id(piece.structure)] = _fuse_slice(piece, _labels(sharing), context, report)
        slices.append(_follow(fused[id(piece.structure)], piece))
    model = CanonicalModel(slices[0], slices[1:-1], slices[-1])
    check_canonical(model, config)
    counted = [firing for firing in report if firing.expected is not None]
    fired = {firing.name: firing.fired for firing in reversed(counted)}
    return FuseResult(model, fired, report)


def _fuse_slice(piece: Slice, labels: str, context: Context, report: list[Firing]) -> Slice:
    copy = Slice(piece.kind, piece.index, piece.structure.clone(), dict(piece.weights))
    for step in PASSES:
        if piece.kind not in step.expected:
            continue
        outcome, expected = step.apply(copy, context), step.expected[piece.kind]
        report.append(Firing(labels, step.name, outcome.fired, expected))
        if expected is not None and outcome.fired != expected:
            raise _missing(step, labels, outcome, expected)
    return copy


def _missing(step: FusePass, labels: str, outcome: Outcome, expected: int) -> BudgetError:
    why = f" ({outcome.why_not})" if outcome.why_not else ""
    return BudgetError(
        "fuse.missing",
        f"{step.name} fired {outcome.fired} times instead of {expected} in {labels}{why}",
        "the traced graph is not the expected one: use the torch and transformers versions enginesmith asks for, "
        "or try the other --tracer",
    )


def _labels(slices: list[Slice]) -> str:
    if len(slices) == 1:
        return slices[0].label
    return f"layers {slices[0].index} to {slices[-1].index}"


def _follow(fused: Slice, piece: Slice) -> Slice:
    """The fused structure for another slice that shares the raw one: same weights, of its own layer."""
    if piece.index is None or fused.index == piece.index:
        return fused
    old, new = f"model.layers.{fused.index}.", f"model.layers.{piece.index}."
    weights: dict[str, Weight] = {}
    for name, weight in fused.weights.items():
        if isinstance(weight, CheckpointWeight):
            sources = tuple(new + source.removeprefix(old) for source in weight.sources)
            weights[name] = CheckpointWeight(sources, weight.precision)
        else:
            weights[name] = weight
    return Slice("layer", piece.index, fused.structure, weights)
