"""What verification found, as data: the `verify` JSON of the contract plus the per-layer errors behind it."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from exporter.core.errors import ParityError
from exporter.parity.limits import EagerLimits, within
from exporter.parity.metrics import LogitMetrics


@dataclass(frozen=True)
class Check:
    """One measured value and its gate; `limit` None is reported, not gated. `value` None: could not be measured here,
    `note` says why."""

    name: str
    value: float | None
    limit: float | None = None
    stage: str = "compile"
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.limit is None if self.value is None else within(self.value, self.limit)

    @property
    def verdict(self) -> bool | None:
        """None where it was not run."""
        return None if self.value is None and self.passed else self.passed

    def to_json(self) -> dict[str, Any]:
        data = {"name": self.name, "value": finite(self.value), "limit": self.limit, "passed": self.verdict}
        return {**data, "stage": self.stage} | ({"note": self.note} if self.note else {})


@dataclass(frozen=True)
class Divergence:
    """Where things first went wrong. `layer` None: in the embedding or the head. `error` is relative L2 there.

    `value` names the graph's value, `suspects` the operators between the last good values and it.
    """

    stage: str
    layer: int | None
    operator: str | None
    error: float
    part: str = "layer"
    value: str | None = None
    suspects: tuple[str, ...] = ()
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        data = {"stage": self.stage, "layer": self.layer, "operator": self.operator, "error": finite(self.error)}
        more = {"part": self.part, "value": self.value, "suspects": list(self.suspects)}
        return {**data, **more} | ({"note": self.note} if self.note else {})

    def describe(self) -> str:
        where = f"layer {self.layer}" if self.layer is not None else f"the {self.part}"
        operator = f", operator {self.operator}" if self.operator else ""
        return f"stage {self.stage}, {where}{operator}, relative L2 error {self.error:.2g}"


@dataclass(frozen=True)
class StageResult:
    """One stage held to the reference. `layer_errors`: relative L2 to eager of the hidden states after the embedding
    and after each layer, the stage running on its own; `local_errors`: of the embedding, each layer and the head,
    given the reference's input."""

    stage: str
    checks: tuple[Check, ...] = ()
    layer_errors: tuple[float, ...] = ()
    local_errors: tuple[float, ...] = ()
    divergence: Divergence | None = None

    @property
    def passed(self) -> bool:
        return self.divergence is None and all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "passed": self.passed,
            "checks": [check.to_json() for check in self.checks],
            "layer_errors": [finite(error) for error in self.layer_errors],
            "local_errors": [finite(error) for error in self.local_errors],
        }


@dataclass(frozen=True)
class Proof:
    """What stands behind a pass. None: not run; never counted as passed. `simulation`: whether the engine equals the
    simulation of its quantization, slice by slice; `stand_in`: whether its own graph was executed on this CPU, where
    the engine itself could not be; `statement`: all of it in words."""

    graph_parity: bool | None
    built_by: str
    engine_run: bool | None
    simulation: bool | None = None
    stand_in: bool | None = None
    statement: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class VerifyReport:
    """The result of a verification. `positions` are those whose logits were compared."""

    target: str
    recipe: str
    perplexity_reference: float
    perplexity_engine: float
    checks: tuple[Check, ...]
    proof: Proof
    stages: tuple[StageResult, ...] = ()
    first_divergence: Divergence | None = None
    positions: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    is_checkpoint: bool = False

    @property
    def passed(self) -> bool:
        """Every gate that ran passed, and an engine ran: what was not run never counts as passed. Of a checkpoint:
        what its files hold passed."""
        return (self.proof.engine_run is True or self.is_checkpoint) and self.nothing_failed

    @property
    def nothing_failed(self) -> bool:
        """Every gate that ran passed; that is all there is to say of an engine for another machine."""
        return (
            self.proof.engine_run is not False
            and self.proof.graph_parity is not False
            and self.first_divergence is None
            and all(check.passed for check in self.checks)
            and all(stage.passed for stage in self.stages)
        )

    def describe(self) -> str:
        """The verdict and the figures behind it, for people."""
        lines = [f"parity {self.verdict}: {self.recipe} on {self.target}"]
        if not_run := self.facts.get("engine_not_run"):
            lines.append(f"  THE ENGINE ITSELF WAS NOT RUN: {not_run}")
        if self.proof.statement and self.proof.engine_run is None:
            lines.append(f"  {self.proof.statement}")
        if self.unsimulated:
            lines.append("  held to eager alone: the checks against its simulated quantization were not run, which")
            lines.append("  need the file of quantization parameters (--qparams)")
        if self.first_divergence:
            lines.append(f"  first divergence: {self.first_divergence.describe()}")
        for check in self.failures or self.checks:
            value = "not run" if check.value is None else f"{check.value:.3g}"
            limit = "reported" if check.limit is None else f"limit {check.limit:.3g}"
            limit = limit if check.value is not None or check.limit is not None else ""
            lines.append(f"  {check.name:<30}{value:>12}  {limit}" + ("" if check.passed else "  FAILED"))
        return "\n".join(lines)

    @property
    def unsimulated(self) -> bool:
        """Whether an engine ran without a simulation of its quantization beside it."""
        return self.proof.engine_run is True and self.proof.simulation is None

    @property
    def verdict(self) -> str:
        """`passed`, `FAILED`, or `of the graphs passed` where the engine is for another machine."""
        if self.passed:
            return "passed"
        return "of the graphs passed" if self.facts.get("engine_not_run") and self.nothing_failed else "FAILED"

    def require_passed(self, engine_run: bool = True) -> None:
        """Raise ParityError with this report unless everything passed; `engine_run` False: unless all that ran did."""
        if self.passed or (self.nothing_failed and not engine_run):
            return
        failed = [f"{c.name} {c.value} over its limit {c.limit} ({c.stage})" for c in self.failures[:3]]
        found = self.first_divergence
        where = f"first divergence: {found.describe()}" if found else "no divergence was localised"
        raise ParityError(
            "parity.failed",
            f"parity failed for {self.recipe} on {self.target}: {'; '.join(failed) or 'the engine was not run'}; "
            f"{where}",
            _remedy(found, self.failures),
            self.to_json(),
            self,
        )

    @property
    def failures(self) -> list[Check]:
        checks = [*self.checks, *(check for stage in self.stages for check in stage.checks)]
        return list(dict.fromkeys(check for check in checks if not check.passed))

    def to_json(self) -> dict[str, Any]:
        """The `verify` object; what is not finite becomes null."""
        return {
            "passed": self.passed,
            "target": self.target,
            "recipe": self.recipe,
            "perplexity_reference": finite(self.perplexity_reference),
            "perplexity_engine": finite(self.perplexity_engine),
            "checks": [check.to_json() for check in self.checks],
            "first_divergence": self.first_divergence.to_json() if self.first_divergence else None,
            "proof": self.proof.to_json(),
            "positions": self.positions,
            "stages": [stage.to_json() for stage in self.stages],
            "facts": self.facts,
        }


def _remedy(found: Divergence | None, failures: Sequence[Check]) -> str:
    lossy = found is not None and found.stage in ("quantize", "simulate")
    if lossy or (found is None and failures and all(check.name in AGAINST_EAGER for check in failures)):
        return "choose a finer recipe: a smaller group size, int8, or more bits for head or embedding"
    return "this is a fault of the build, not of the checkpoint: report it with the --report page"


AGAINST_EAGER = ("relative_l2_error", "kl_divergence_mean", "kl_divergence_max", "perplexity_ratio")
"""Checks that a faithful engine misses where its recipe loses too much."""


def finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None


LABELS_ALONE = "the logits are those of the labels: the text's own next tokens are not among them"


def eager_checks(
    metrics: LogitMetrics, limits: EagerLimits, stage: str = "compile", *, classifies: bool = False
) -> tuple[Check, ...]:
    """The contract's checks against eager; agreement of the top token is reported, not gated: near-ties flip.

    Over the logits of labels a perplexity means nothing, and the top token is a label.
    """
    shared = (
        Check("relative_l2_error", metrics.relative_l2_error, limits.relative_l2_error, stage),
        Check("kl_divergence_mean", metrics.kl_divergence_mean, limits.kl_divergence_mean, stage),
        Check("kl_divergence_max", metrics.kl_divergence_max, limits.kl_divergence_max, stage),
    )
    if classifies:
        return (
            *shared,
            Check("perplexity_ratio", None, None, stage, LABELS_ALONE),
            Check("top1_agreement", None, None, stage, f"{LABELS_ALONE}: see label_agreement"),
            Check("label_agreement", metrics.top1_agreement, None, stage),
        )
    return (
        *shared,
        Check("perplexity_ratio", metrics.perplexity_ratio, limits.perplexity_ratio, stage),
        Check("top1_agreement", metrics.top1_agreement, None, stage),
    )
