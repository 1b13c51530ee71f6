"""What a calibration takes: memory from the architecture, the recipe and the number of tokens, before it runs."""

from calibration.transforms import CONSUMERS, point_width
from exporter.core.config import ModelConfig
from exporter.core.errors import BudgetError
from exporter.core.recipe import Recipe

BATCH_TOKENS = 2048
"""Tokens that flow through a layer at a time (at least one sequence)."""
STORE_BYTES = 768 << 20
"""Activations kept in memory where nobody says how much there is."""
PROGRAM_BYTES = 420 << 20
"""Python with torch, numpy and the checkpoint's headers."""
BLOCK_BYTES = 6 * (4 << 24)
"""What the algorithms hold of the block of rows in hand: values, errors, codes, candidates."""
HESSIAN_COPIES = {"gptq": 3, "awq": 2}
"""Matrices [K, K] that exist at the same time: the factorisation's, the search's."""


def working_bytes(config: ModelConfig, recipe: Recipe, length: int = 512) -> int:
    """The most memory that is needed beside the activations of all sequences, which may lie on disk."""
    copies = max((HESSIAN_COPIES.get(name, 0) for name in recipe.algorithms), default=0)
    widths = {point: point_width(config, point) for point in CONSUMERS}
    hessians = 4 * (copies * max(widths.values()) ** 2 + config.hidden_size**2) if copies else 0
    matrices = [rows * columns for rows, columns in config.linear_shapes.values()]
    layer = 4 * sum(matrices)
    rewritten = 2 * 4 * max(matrices) if recipe.algorithms else 0
    tokens = max(BATCH_TOKENS, length)
    flowing = 4 * tokens * (3 * config.intermediate_size + 8 * max(config.hidden_size, widths["attention_output"]))
    return PROGRAM_BYTES + layer + hessians + rewritten + max(flowing, BLOCK_BYTES if copies else 0)


def activation_bytes(config: ModelConfig, recipe: Recipe, tokens: int) -> int:
    """All activations that exist at one time, in memory or on disk."""
    streams = 2 * config.hidden_size
    stored = max(point_width(config, point) for point in CONSUMERS) if "gptq" in recipe.algorithms else 0
    return 4 * tokens * (streams + stored)


def forecast_bytes(config: ModelConfig, recipe: Recipe, tokens: int) -> int:
    """Peak resident memory of a calibration without a limit."""
    return working_bytes(config, recipe) + min(STORE_BYTES, activation_bytes(config, recipe, tokens))


def store_budget(config: ModelConfig, recipe: Recipe, length: int, max_ram: int | None) -> int:
    """Memory for activations under a limit. BudgetError (`memory.calibrate`) where the rest alone exceeds it."""
    if max_ram is None:
        return STORE_BYTES
    needed = working_bytes(config, recipe, length)
    if needed > max_ram:
        raise BudgetError(
            "memory.calibrate",
            f"calibration needs about {needed / 1e9:.2f} GB beside its activations, "
            f"--max-ram allows {max_ram / 1e9:.2f} GB",
            "allow more memory, or take a recipe without gptq or awq",
        )
    return max_ram - needed
