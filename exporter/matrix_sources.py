"""What a target makes of each matrix of a file of quantization parameters: `plan --qparams`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from calibration.coverage import Coverage
from calibration.qparams import QParams
from calibration.served import served
from exporter.core.config import ModelConfig
from exporter.core.recipe import Recipe
from targets.base import Target


@dataclass(frozen=True)
class MatrixSource:
    """Where the codes of one matrix come from: `stored` in the file, `derived` from the weights after its transforms,
    or `unquantized`; why; and how the target takes its precision (native, emulated, refused)."""

    name: str
    source: str
    why: str
    support: str


def matrix_sources(
    target: Target, covered: Coverage, recipe: Recipe, config: ModelConfig, parameters: QParams | None
) -> tuple[MatrixSource, ...]:
    """Every matrix of the model under the recipe as the target completed it; nothing without a file."""
    if parameters is None:
        return ()
    levels = target.capabilities()
    actual = {tensor.name: tensor.actual.describe() for tensor in covered.tensors}
    return tuple(
        MatrixSource(found.tensor, found.how, found.why, levels[actual[found.tensor]].level)
        for found in served(parameters, recipe, config)
    )


def grouped(matrices: Sequence[MatrixSource]) -> list[str]:
    """The same in a few lines for people: how many matrices there are of each kind."""
    counts = Counter((matrix.source, matrix.support, matrix.why) for matrix in matrices)
    return [f"{count} matrices {source}, {support}: {why}" for (source, support, why), count in counts.items()]
