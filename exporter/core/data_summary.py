"""What calibration text was: files of quantization parameters say it, and manifests repeat it."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class DataSummary:
    """What the data was: sha256 of the file, its format, and what was taken of it."""

    text_sha256: str
    format: str
    documents: int
    tokens: int
    sequences: int
    length: int
    seed: int

    def to_json(self) -> dict[str, str | int]:
        return asdict(self)
