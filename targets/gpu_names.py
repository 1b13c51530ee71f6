"""GPUs by their names on the command line: `--device sm89`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A kind of GPU by its compute capability. `in_rtx`: TensorRT-RTX compiles for it (its `ComputeCapability`)."""

    capability: str
    summary: str
    in_rtx: bool = True

    @property
    def numbers(self) -> tuple[int, int]:
        """`8.9` -> (8, 9)."""
        major, _, minor = self.capability.partition(".")
        return int(major), int(minor)


DEVICES = {
    "sm75": Device("7.5", "Turing: T4, RTX 20"),
    "sm80": Device("8.0", "Ampere data center: A100, A30"),
    "sm86": Device("8.6", "Ampere: A10, A40, RTX 30"),
    "sm89": Device("8.9", "Ada Lovelace: L4, L40S, RTX 40"),
    "sm90": Device("9.0", "Hopper: H100, H200", in_rtx=False),
    "sm100": Device("10.0", "Blackwell data center: B200", in_rtx=False),
    "sm120": Device("12.0", "Blackwell: RTX 50, RTX PRO 6000"),
    "sm121": Device("12.1", "Blackwell: GB10 (DGX Spark)"),
}


def split(text: str) -> tuple[str, ...]:
    """`sm89,sm120` -> its names, known or not."""
    return tuple(name.strip() for name in text.split(","))
