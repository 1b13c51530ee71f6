"""Directories that look like built engines, without a plan: a graph of contract_graph.py and its engine.json."""

from dataclasses import dataclass
from pathlib import Path

from exporter.core.checkpoint import Checkpoint
from targets.base import Limits, RunOptions
from targets.tensorrt.engine_index import EngineIndex, StepProfile
from targets.tensorrt.file_names import MODEL
from targets.tensorrt.stand_in import StandIn, open_stand_in
from tests.targets.tensorrt.contract_graph import write_contract_graph

LIMITS = Limits(3, 40)
CACHE_LENGTH = 48
LONGEST = 16


@dataclass(frozen=True)
class ContractEngine:
    """An engine's directory and the checkpoint that it came from."""

    folder: Path
    checkpoint: Checkpoint
    limits: Limits = LIMITS

    @property
    def index(self) -> EngineIndex:
        return EngineIndex.read(self.folder)

    def stand_in(self, batch: int = 1, positions: int | None = None, hidden: bool = False) -> StandIn:
        options = RunOptions(1, batch, positions, hidden)
        return open_stand_in(self.folder, self.checkpoint.config, self.limits, options)


def contract_engine(
    checkpoint: Path, folder: Path, arithmetic: str = "fp16", labels: tuple[int, ...] = ()
) -> ContractEngine:
    opened = Checkpoint.open(checkpoint)
    write_contract_graph(opened, folder / MODEL, CACHE_LENGTH, arithmetic, labels)
    contract_index(opened, arithmetic, labels).write(folder)
    return ContractEngine(folder, opened)


def contract_index(checkpoint: Checkpoint, arithmetic: str = "fp16", labels: tuple[int, ...] = ()) -> EngineIndex:
    config = checkpoint.config
    decode = StepProfile("decode", (1, 1, LIMITS.max_batch), (1, 1, 1))
    prefill = StepProfile("prefill", (1, 1, LIMITS.max_batch), (1, LONGEST, LIMITS.max_seq_len if labels else LONGEST))
    return EngineIndex(
        toolkit="tensorrt_rtx",
        version="1.7.1.116",
        compute_capabilities=("8.9",),
        arithmetic=arithmetic,
        cache_type=arithmetic,
        cache_length=0 if labels else CACHE_LENGTH,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        outputs=len(labels) or config.vocab_size,
        task="classify" if labels else "generate",
        profiles=(prefill,) if labels else (decode, prefill),
    )
