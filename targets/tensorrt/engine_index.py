"""engine.json: what a TensorRT engine is and which steps it was built for, so that nothing has to be deserialized to
know."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporter.core.errors import ArtifactError
from exporter.core.strict_json import parse_json
from exporter.core.task import TASKS
from targets.tensorrt.file_names import INDEX

FORMAT = 1
AGAIN = "build the engine again with this version of enginesmith"
TOOLKITS = ("tensorrt", "tensorrt_rtx")
ARITHMETIC = ("fp16", "bf16")
DECODE, PREFILL = "decode", "prefill"
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class StepProfile:
    """An optimization profile: the least, usual and most rows (`batch`) and new positions a row (`sequence`)."""

    name: str
    batch: tuple[int, int, int]
    sequence: tuple[int, int, int]

    def __post_init__(self) -> None:
        for what in (self.batch, self.sequence):
            if len(what) != 3 or not 1 <= what[0] <= what[1] <= what[2] <= LARGEST:
                raise ValueError(f"profile {self.name!r} has the range {list(what)}")


@dataclass(frozen=True)
class EngineIndex:
    """The fields of engine.json. `outputs`: logits a row (the vocabulary, or the labels); `cache_length` 0: no cache.

    `profiles` stand in the engine's order. `version_compatible` engines carry code of the host that the runtime has to
    be allowed to run.
    """

    toolkit: str
    version: str
    compute_capabilities: tuple[str, ...]
    arithmetic: str
    cache_type: str
    cache_length: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    outputs: int
    task: str
    profiles: tuple[StepProfile, ...]
    version_compatible: bool = False
    hardware_compatible: bool = False

    def __post_init__(self) -> None:
        for value, known in ((self.toolkit, TOOLKITS), (self.task, TASKS)):
            _one_of(value, known)
        for value in (self.arithmetic, self.cache_type):
            _one_of(value, ARITHMETIC)
        wanted = {PREFILL} if self.task == "classify" else {DECODE, PREFILL}
        names = [profile.name for profile in self.profiles]
        if sorted(names) != sorted(wanted):
            raise ValueError(f"its profiles are {names}, not {sorted(wanted)}")
        if self.has_cache != (self.task != "classify"):
            raise ValueError(f"a {self.task} engine with a cache of {self.cache_length} positions")

    @property
    def has_cache(self) -> bool:
        return self.cache_length > 0

    @property
    def longest_step(self) -> int:
        """Most new positions a row in one step."""
        return self.profile(PREFILL).sequence[2]

    @property
    def cache_names(self) -> list[str]:
        """`0.key`, `0.value`, `1.key` ...: after `past_key_values.` among the inputs, `present.` among the outputs."""
        layers = range(self.num_layers if self.has_cache else 0)
        return [f"{layer}.{which}" for layer in layers for which in ("key", "value")]

    @property
    def hidden_names(self) -> list[str]:
        """The residual stream's values in the graph: entering each layer, then leaving the last one."""
        return [*(f"layers.{layer}.hidden" for layer in range(self.num_layers)), "final.hidden"]

    def profile(self, name: str) -> StepProfile:
        return self.profiles[self.profile_number(name)]

    def profile_number(self, name: str) -> int:
        return [profile.name for profile in self.profiles].index(name)

    def cache_shape(self, batch: int) -> tuple[int, int, int, int]:
        """[B, Hkv, M, D] of one layer's keys or values."""
        return batch, self.num_kv_heads, self.cache_length, self.head_dim

    def write(self, folder: Path) -> None:
        data = {"format": FORMAT, **asdict(self)}
        (folder / INDEX).write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> "EngineIndex":
        """Raises ArtifactError `tensorrt.index` when engine.json is missing or does not say what it must."""
        try:
            return _index(parse_json((folder / INDEX).read_bytes()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"the field {error}" if isinstance(error, KeyError) else str(error)
            raise ArtifactError("tensorrt.index", f"{INDEX} cannot be used: {what}", AGAIN) from error


def _index(fields: Any) -> EngineIndex:
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    sizes = ("num_layers", "num_kv_heads", "head_dim", "hidden_size", "vocab_size", "outputs")
    texts = ("toolkit", "version", "arithmetic", "cache_type", "task")
    flags = ("version_compatible", "hardware_compatible")
    values: dict[str, Any] = {name: _text(fields[name], name) for name in texts}
    values |= {name: _size(fields[name], name) for name in sizes}
    values |= {name: _flag(fields[name], name) for name in flags}
    return EngineIndex(
        **values,
        cache_length=_size(fields["cache_length"], "cache_length", 0),
        compute_capabilities=tuple(_text(each, "compute_capabilities") for each in fields["compute_capabilities"]),
        profiles=tuple(
            StepProfile(_text(each["name"], "name"), _range(each["batch"]), _range(each["sequence"]))
            for each in fields["profiles"]
        ),
    )


def _range(values: Any) -> tuple[int, int, int]:
    least, usual, most = (_size(value, "profiles") for value in values)
    return least, usual, most


def _size(value: Any, name: str, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
        raise ValueError(f"{name} is {value!r}")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is {value!r}")
    return value


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}")
    return value


def _one_of(value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(known)}")
