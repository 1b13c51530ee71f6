"""What every target offers: probe, supports, build, runner. docs/targets.md describes the contract."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np

from exporter.core.canonical import CanonicalModel, CheckpointWeight
from exporter.core.checkpoint import Checkpoint
from exporter.core.config import ModelConfig
from exporter.core.device import THIS_MACHINE
from exporter.core.device import DeviceOptions as DeviceOptions
from exporter.core.engine_options import PLAIN
from exporter.core.engine_options import EngineOptions as EngineOptions
from exporter.core.errors import UnsupportedError
from exporter.core.progress import Progress
from exporter.core.recipe import Precision, Recipe
from exporter.core.support import Support
from exporter.core.task import GENERATE, Task
from exporter.core.weights import QuantizedRows

RowReader = Callable[[CheckpointWeight, int, int], "np.ndarray | QuantizedRows"]

ActivationRounding = Literal["group", "shared-exponent", "token", "tensor", "fp8-token", "fp8-tensor", "nvfp4"]
"""How an engine rounds what a matrix multiplies; exporter.parity.activations computes each. To int8: a scale
max|x| / 127 for each of its groups; one for each row, times a power of two for each group (`shared-exponent`); one for
each row (`token`); one from calibration (`tensor`). To E4M3: a scale max|x| / 448 for each row, or one from
calibration. To E2M1 (`nvfp4`): an E4M3 scale for each group of 16, times one from calibration."""


ASKED_ROUNDINGS: dict[str, ActivationRounding] = {
    "int8/token": "token",
    "int8/tensor": "tensor",
    "fp8/token": "fp8-token",
    "fp8/tensor": "fp8-tensor",
    "nvfp4/tensor": "nvfp4",
}
"""What a recipe asks of a matrix's input (`Precision.activations`), in these words."""


@dataclass(frozen=True)
class Limits:
    """What an engine is built for: rows in a batch and positions in a row (prompt and answer together)."""

    max_batch: int
    max_seq_len: int


@dataclass(frozen=True)
class BuildSource:
    """Everything a target builds from. `rows(weight, start, stop)` yields rows at the weight's precision:
    float32, bfloat16 or float16 arrays, or QuantizedRows; call it in ascending chunks and keep none.

    `input_scales` are those of activations rounded with a scale from calibration, by module
    (`model.layers.0.self_attn.q_proj`); `kv_scales` those of keys and values of each layer: an fp8 cache has them, an
    int8 one where they were measured. `checkpoint` is the transformed one where the recipe has transforms."""

    config: ModelConfig
    recipe: Recipe
    model: CanonicalModel
    checkpoint: Checkpoint
    rows: RowReader
    limits: Limits
    device: DeviceOptions = THIS_MACHINE
    kv_scales: Mapping[int, tuple[float, float]] | None = None
    input_scales: Mapping[str, float] = field(default_factory=dict)
    engine: EngineOptions = PLAIN
    task: Task = GENERATE


@dataclass(frozen=True)
class BuildResult:
    """What a build wrote: files relative to its directory, toolchain versions, input and output signature.

    `signature` maps tensor names to {"dtype": ..., "shape": [...]}; `weights_bytes` counts weight data alone;
    `requirements` is what the engine needs of a host ({"cpu_features": [...]}), `triple` the machine and system it is
    for (`aarch64-linux`) where that is not this machine's. `report` holds facts of the engine for its manifest
    (JSON-ready); `built_by` names the toolchain where its versions do not say enough; `not_run` says why this machine
    cannot run the engine, where the requirements do not.
    """

    files: list[str]
    toolchain: dict[str, str]
    signature: dict[str, dict[str, dict[str, object]]]
    weights_bytes: int
    requirements: dict[str, object] = field(default_factory=dict)
    triple: str | None = None
    report: dict[str, Any] = field(default_factory=dict)
    built_by: str | None = None
    not_run: str = ""


@dataclass(frozen=True)
class RunOptions:
    """How to run an engine. `threads` 0 means one per physical core; `batch` rows share one allocated cache.

    `hidden_states` asks for the residual stream at every layer boundary as well (for parity).
    """

    threads: int = 0
    batch: int = 1
    max_seq_len: int | None = None
    hidden_states: bool = False


class Runner(Protocol):
    """A loaded engine with a KV cache of `batch` rows. Token ids are int64 arrays; logits float32.

    Raises InputError (`run.too_long`) when a row would pass the engine's limit, before anything changes.
    """

    lengths: np.ndarray
    """Valid cached positions of each row, int64 [B]."""

    hidden: list[np.ndarray]
    """After a call with `hidden_states`: the residual stream [B, S, H] entering layer 0, 1, ... and leaving the
    last one, for the positions of that call."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def prefill(self, input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Start all rows anew: ids [B, S] right-padded, valid lengths [B] -> logits [B, V] of each last position."""
        ...

    def extend(self, input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Continue rows after their cached prefix with [B, S] more ids, `lengths` [B] of them valid (0: row rests)
        -> logits [B, V] at each row's last valid new position (rows that rest: undefined)."""
        ...

    def decode(self, input_ids: np.ndarray, active: np.ndarray) -> np.ndarray:
        """One more token [B] for each row where bool `active` [B] -> logits [B, V] (inactive rows: undefined)."""
        ...

    def truncate(self, row: int, length: int) -> None:
        """Keep only the first `length` cached positions of a row."""
        ...

    def reset(self) -> None:
        """Forget every row."""
        ...


class StoredModel(Protocol):
    """An artifact that is a checkpoint, decoded by a reader that shares nothing with what wrote it."""

    @property
    def config(self) -> ModelConfig:
        """Of the model that the files hold."""
        ...

    @property
    def input_scales(self) -> Mapping[str, float]:
        """Scales of rounded inputs by module, `model.layers.0.self_attn.q_proj`."""
        ...

    @property
    def kv_scales(self) -> Mapping[int, tuple[float, float]]:
        """Scales of keys and values by layer."""
        ...

    @property
    def requantized(self) -> frozenset[str]:
        """Tensors whose codes were rounded a second time, because the form has one scale for several matrices."""
        ...

    def validate(self) -> None:
        """Raise ArtifactError (`stored.*`) for names, shapes, dtypes, scales or shards that the format forbids."""
        ...

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a tensor by its Hugging Face name, float32 [n, K] or [n]."""
        ...


class Target(Protocol):
    """One way to build and run engines. Vendor libraries are imported inside methods, never on import."""

    name: str

    calibrated_caches: frozenset[str]
    """Kinds of KV cache whose scales come from calibration: one for all keys, one for all values of a layer."""

    has_stand_in: bool
    """Whether there is a `stand_in`."""

    footprint: "Footprint"
    """What its artifacts take beside their weights."""

    def probe(self) -> Support:
        """Whether the toolchain is here; never raises; says why not and the remedy."""
        ...

    def versions(self) -> dict[str, str]:
        """Installed versions of the packages this target uses, by name; empty strings for missing ones."""
        ...

    def supports(
        self,
        config: ModelConfig,
        recipe: Recipe,
        device: DeviceOptions = THIS_MACHINE,
        engine: EngineOptions = PLAIN,
        task: Task = GENERATE,
    ) -> Support:
        """native, emulated or refused, before any weight is read."""
        ...

    def complete(
        self,
        recipe: Recipe,
        unnamed: frozenset[str],
        config: ModelConfig | None = None,
        engine: EngineOptions = PLAIN,
    ) -> Recipe:
        """The recipe with this target's choice of the parts in `unnamed` (of UNNAMED): neither a recipe file nor the
        user named them. `config` is the checkpoint's."""
        ...

    def matrix_bits(self, precision: Precision, rows: int, width: int) -> int:
        """Bits of a matrix [rows, width] in the engine's file: codes, scales and zero points. Rows that only fill up a
        block of the kernels, and bytes up to the next page, are not counted."""
        ...

    def activation_rounding(self, precision: Precision) -> ActivationRounding | None:
        """How engines round what a matrix of this precision multiplies: parity simulates it. None: not at all."""
        ...

    def served_rows(self, rows: RowReader, recipe: Recipe, form: str | None = None) -> RowReader:
        """Rows as the artifact's files hold them, where that is not what a recipe makes of them (scales that must be
        positive, or are stored in 16 bits). `form`: `EngineOptions.format`."""
        ...

    def roundoff(self, recipe: Recipe) -> float:
        """Unit roundoff of the arithmetic between matrices: 2^-24 for float32, 2^-11 for float16, 2^-8 for bfloat16."""
        ...

    def devices(self) -> dict[str, str]:
        """What `DeviceOptions.device` may name, each with one sentence; empty: this machine only."""
        ...

    def check_options(self, device: DeviceOptions, engine: EngineOptions = PLAIN, limits: Limits | None = None) -> None:
        """Raise InputError for an unknown device or option, UnsupportedError for what engines cannot be built for.
        `limits`: the engine's, where they are known."""
        ...

    def capabilities(self) -> dict[str, Support]:
        """The recipe x target table, whatever the model: each precision (`int4/g32`) and `kv-cache KIND`."""
        ...

    def build(self, source: BuildSource, out_dir: Path, progress: Progress) -> BuildResult:
        """Write the engine's files into `out_dir` (an existing, private directory)."""
        ...

    def runner(self, engine_dir: Path, config: ModelConfig, limits: Limits, options: RunOptions) -> Runner:
        """Load an engine built before. Raises UnsupportedError when the runtime is missing."""
        ...

    def stand_in(self, engine_dir: Path, config: ModelConfig, limits: Limits, options: RunOptions) -> Runner | None:
        """The engine's own graph, executed on this CPU where the engine itself cannot run; None: there is none."""
        ...

    def stored_model(self, engine_dir: Path, config: ModelConfig, recipe: Recipe) -> StoredModel | None:
        """What the files of an artifact hold that is a checkpoint, not an engine; None for engines."""
        ...


UNNAMED = ("lm_head", "embedding", "kv_cache", "linear", "group_size")
"""The parts of a recipe that a target may choose where nobody named them."""


@dataclass(frozen=True)
class Footprint:
    """What an artifact takes beside its weights, and what building it holds, for forecasts.

    `copies`: how often the weights are in the files; `program_bytes`, `layer_bytes`: of graph or library and index, in
    all and for each layer; `compile_share`: memory of the compiler for each byte of weights.
    """

    copies: int = 1
    program_bytes: float = 135e3
    layer_bytes: float = 12e3
    compile_share: float = 0.0


class EngineTarget:
    """What targets have in common whose artifacts are engines that run on this CPU or not at all."""

    has_stand_in = False
    # Measured on engines of 2 and 6 layers, where the forecast is within 150 kB of the engine (tests/test_plan.py).
    footprint = Footprint()

    def served_rows(self, rows: RowReader, recipe: Recipe, form: str | None = None) -> RowReader:
        return rows

    def roundoff(self, recipe: Recipe) -> float:
        return 2.0**-24

    def stand_in(self, engine_dir: Path, config: ModelConfig, limits: Limits, options: RunOptions) -> Runner | None:
        return None

    def stored_model(self, engine_dir: Path, config: ModelConfig, recipe: Recipe) -> StoredModel | None:
        return None


def built_by(target: Target) -> str:
    """The toolchain in words, for proofs: `onnxruntime 1.31.1`."""
    return f"{target.name} {target.versions().get(target.name, '')}".strip()


def refuse_devices(target: str, options: DeviceOptions) -> None:
    """Raise UnsupportedError where any device option is given: for targets that build for this machine alone."""
    given = options.given
    if given:
        raise UnsupportedError(
            "target.device",
            f"target {target} builds for this machine alone and takes no {', '.join(given)}",
            f"leave {', '.join(given)} out, or use --target tvm",
        )


def refuse_engine_options(target: str, options: EngineOptions, taken: frozenset[str] = frozenset()) -> None:
    """Raise UnsupportedError where an option is given that the target does not take (`taken`: those it does)."""
    if given := [flag for flag in options.given if flag not in taken]:
        what = f"target {target} takes no {', '.join(given)}"
        raise UnsupportedError("target.option", what, f"leave {', '.join(given)} out")
