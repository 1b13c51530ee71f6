"""What a manifest says of calibration: the parameters an engine was built with, and the text behind them."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from exporter.artifact.json_fields import Fields
from exporter.core.data_summary import DataSummary

if TYPE_CHECKING:
    from calibration.qparams import QParams

LARGEST = 1 << 53


@dataclass(frozen=True)
class CalibrationRecord:
    """`qparams` is the digest of the file of parameters, `text` None where it came from no text, `transforms` counts
    those of each kind (`ScaleInput`)."""

    qparams: str
    text: DataSummary | None
    algorithms: tuple[str, ...]
    transforms: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "algorithms": list(self.algorithms)}

    def describe(self) -> str:
        """One line for people."""
        how = ", ".join(self.algorithms) or "statistics alone"
        if self.text is None:
            return f"{how}; no text; parameters {self.qparams[:12]}"
        text = self.text
        return f"{how}; {text.tokens:,} tokens of text {text.text_sha256[:12]}; parameters {self.qparams[:12]}"


def record_of(parameters: "QParams") -> CalibrationRecord:
    """What a manifest keeps of a file of parameters."""
    data = parameters.data
    text = DataSummary(**{name: data[name] for name in DataSummary.__dataclass_fields__}) if data else None  # type: ignore[arg-type]
    kinds = Counter(type(transform).__name__ for transform in parameters.transforms)
    return CalibrationRecord(parameters.digest, text, parameters.recipe.algorithms, dict(sorted(kinds.items())))


def record_from_json(value: dict[str, Any]) -> CalibrationRecord:
    """Raises ArtifactError for anything `to_json` does not write."""
    fields = Fields(value, "calibration")
    text = fields.optional_mapping("text")
    transforms = Fields(fields.mapping("transforms"), "transforms")
    counts = {name: transforms.integer(name, 1, LARGEST) for name in sorted(value["transforms"])}
    record = CalibrationRecord(
        fields.digest("qparams"),
        _text(text) if text is not None else None,
        tuple(fields.texts("algorithms")),
        counts,
    )
    fields.done()
    return record


def _text(value: dict[str, Any]) -> DataSummary:
    fields = Fields(value, "text")
    counts = [fields.integer(name, 0, LARGEST) for name in ("documents", "tokens", "sequences", "length", "seed")]
    record = DataSummary(fields.digest("text_sha256"), fields.text("format"), *counts)
    fields.done()
    return record
