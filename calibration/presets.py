"""The recipes by name, and how a recipe is asked for: a name or a file, and overrides."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from calibration.coverage import AUTO, plain_matrix_bits
from calibration.precision_text import DEFAULT_GROUP_SIZE as DEFAULT_GROUP_SIZE
from calibration.precision_text import parse_precision as parse_precision
from calibration.recipe_file import PARTS as PARTS
from calibration.recipe_file import RecipeFile, read_recipe_file
from calibration.recipe_file import checked_kv_cache as checked_kv_cache
from calibration.recipe_rules import checked, rotated
from exporter.core.errors import InputError
from exporter.core.recipe import CHANNEL, FIXED_GROUPS, TENSOR, Override, Precision, Recipe

Complete = Callable[[Recipe, frozenset[str]], Recipe]
"""A target's choice for parts that nobody named."""
HALVES = ("bf16", "fp16")
TYPICAL_SHAPE = (4096, 4096)
"""A matrix for whose size bits a weight are told: scales of a row or a matrix weigh next to nothing in it."""


@dataclass(frozen=True)
class Preset:
    """A recipe that has a name, with one sentence for people."""

    recipe: Recipe
    summary: str

    @property
    def costs(self) -> str:
        """Bits a weight with a float32 for each scale that the format does not fix."""
        linear, head, embedding = (f"{_bits(getattr(self.recipe, part)):.4g}" for part in PARTS)
        if linear == head == embedding:
            return f"{linear} bits a weight"
        others = "".join(f"{each.pattern} {_bits(each.precision):.4g}, " for each in self.recipe.overrides)
        return f"{linear} bits a weight, {others}lm_head {head}, embedding {embedding}"

    @property
    def needs(self) -> str:
        """What must be given beside the checkpoint."""
        return "calibration text" if self.recipe.needs_data else "nothing"


def _bits(precision: Precision) -> float:
    rows, width = TYPICAL_SHAPE
    return plain_matrix_bits(precision, rows, width) / (rows * width)


def _uniform(name: str, precision: Precision) -> Recipe:
    return Recipe(name, precision, precision, precision)


_FP32, _BF16, _FP16 = Precision("fp32"), Precision("bf16"), Precision("fp16")
_INT8, _INT4, _NF4 = Precision("int8", DEFAULT_GROUP_SIZE), Precision("int4", DEFAULT_GROUP_SIZE), Precision("nf4", 64)
_INT4_ASYMMETRIC = Precision("int4", DEFAULT_GROUP_SIZE, symmetric=False)
_W8A8 = Precision("int8", CHANNEL, activations="int8/token")
_W4A8 = Precision("int4", DEFAULT_GROUP_SIZE, activations="int8/token")
_FP8_TENSOR = Precision("fp8", TENSOR, activations="fp8/tensor")
_FP8_CHANNEL = Precision("fp8", CHANNEL, activations="fp8/token")
_FIRST_LAYER = "layers.0.*"

PRESETS: dict[str, Preset] = {
    preset.recipe.name: preset
    for preset in (
        Preset(_uniform("fp32", _FP32), "Every weight in float32: lossless."),
        Preset(_uniform("bf16", _BF16), "Weights in bfloat16: lossless for a bfloat16 checkpoint."),
        Preset(_uniform("fp16", _FP16), "Weights in float16."),
        Preset(_uniform("int8-weight", _INT8), "8-bit weights, a scale per 32."),
        Preset(
            Recipe("int8-smoothquant", _W8A8, _INT8, _INT8, algorithms=("smoothquant",)),
            "8-bit weights, a scale a row, times 8-bit activations, a scale a token; outliers of activations are moved "
            "into the weights (SmoothQuant).",
        ),
        Preset(
            Recipe("int4-rtn", _INT4, _INT4, _INT8),
            "4-bit weights rounded to nearest with error-minimising scales, a scale per 32; 8-bit embedding. "
            "Target tvm: head and embedding in 6 bits.",
        ),
        Preset(
            Recipe("int4-rtn-asym", _INT4_ASYMMETRIC, _INT4_ASYMMETRIC, _INT8),
            "The same with a zero point per group: smaller error, slower to build.",
        ),
        Preset(
            Recipe("int4-awq", _INT4, _INT4, _INT8, algorithms=("awq",)),
            "As int4-rtn, with channels that carry large activations scaled up before rounding (AWQ).",
        ),
        Preset(
            Recipe("int4-gptq", _INT4, _INT4, _INT8, algorithms=("gptq",)),
            "As int4-rtn, each code chosen so that it makes up for the errors of those before it (GPTQ): the best "
            "4-bit quality.",
        ),
        Preset(
            Recipe("nf4", _NF4, _NF4, _INT8),
            "4-bit codes of QLoRA's 16 levels, which fit normally distributed weights; a scale per 64.",
        ),
        Preset(
            Recipe("w4a8", _W4A8, _INT4, _INT8, algorithms=("smoothquant", "gptq")),
            "4-bit weights by GPTQ times 8-bit activations, a scale a token; outliers of activations are moved into "
            "the weights first (SmoothQuant).",
        ),
        Preset(
            # The first layer carries over half of what E4M3 costs, whatever rounds it (docs/benchmarks.md); Llama 3's
            # own FP8 leaves it as it is, and the last one (arXiv:2407.21783, section 6.2).
            Recipe("fp8", _FP8_TENSOR, _BF16, _BF16, overrides=(Override(_FIRST_LAYER, _BF16),)),
            "E4M3 weights and activations, a scale a matrix and one from calibration for its input; the first layer "
            "stays in 16 bits.",
        ),
        Preset(
            Recipe("fp8-channel", _FP8_CHANNEL, _BF16, _BF16),
            "E4M3 weights and activations, a scale a row and one a token.",
        ),
        Preset(
            Recipe("nvfp4", Precision("nvfp4", 16), _BF16, _BF16),
            "E2M1 weights with an E4M3 scale per 16 and a float for the matrix, as NVIDIA Blackwell has them.",
        ),
        Preset(
            Recipe("mxfp4", Precision("mxfp4", 32), _BF16, _BF16),
            "E2M1 weights with a power of two per 32, as the OCP standard has them.",
        ),
        Preset(
            Recipe("auto", Precision("int4", 128), _INT4, _INT8, algorithms=("awq", "gptq")),
            "Measures each layer's sensitivity and gives it 4, 6 or 8 bits, under --target-bits, --target-bytes or "
            "--max-kl.",
        ),
    )
}


def preset(name: str) -> Recipe:
    """The recipe of a name. InputError for unknown ones."""
    if name in PRESETS:
        return PRESETS[name].recipe
    remedy = f"available: {', '.join(PRESETS)}; or the path of a TOML file"
    raise InputError("recipe.unknown", f"recipe {name!r} is unknown", remedy)


def load_recipe(
    source: str | Path,
    *,
    group_size: int | None = None,
    lm_head: str | None = None,
    embedding: str | None = None,
    kv_cache: str | None = None,
    rotate: bool = False,
    complete: Complete | None = None,
) -> Recipe:
    """A preset's name or a TOML file, with the command line's overrides applied in the order of the parameters.

    `lm_head` and `embedding` are PRECISION strings, see `parse_precision`; `rotate` puts a rotation before all
    algorithms. `complete`, a target's, chooses head, embedding and cache where neither a parameter nor the file names
    them, and may change the linear layers and groups of a preset. Raises InputError for what contradicts itself.
    """
    path = Path(source)
    found = _from_file(path) if path.suffix == ".toml" else RecipeFile(preset(str(source)), frozenset(), frozenset())
    recipe = found.recipe
    options = {"--group-size": group_size, "--lm-head": lm_head, "--embedding": embedding}
    if recipe.name == AUTO and (named := [option for option, value in options.items() if value is not None]):
        what = f"{' and '.join(named)} with recipe auto, which chooses the precision of every matrix"
        raise InputError("usage.auto", what, "leave them out, or calibrate with another recipe")
    if group_size is not None:
        recipe = _regroup(recipe, group_size)
    recipe = with_parts(recipe, group_size, lm_head, embedding, kv_cache)
    recipe = checked(rotated(recipe) if rotate else recipe, found.named_options)
    given: dict[str, object] = {"lm_head": lm_head, "embedding": embedding, "kv_cache": kv_cache}
    if path.suffix != ".toml":
        given |= {"linear": None, "group_size": group_size}
    unnamed = frozenset(part for part, value in given.items() if value is None) - found.named
    return completed(recipe, unnamed, complete) if complete else recipe


def completed(recipe: Recipe, unnamed: frozenset[str], complete: Complete) -> Recipe:
    """What a target's `complete` makes of a recipe. Layers that a preset leaves in 16 bits follow head and embedding:
    they are in the type that the target chooses for those, and say nothing of it themselves."""
    if recipe.name not in PRESETS or not recipe.overrides or not all(map(_is_half, recipe.overrides)):
        return complete(recipe, unnamed)
    done = complete(replace(recipe, overrides=()), unnamed)
    half = next((each for each in (done.lm_head, done.embedding) if each.kind in HALVES), _BF16)
    return replace(done, overrides=tuple(replace(each, precision=half) for each in recipe.overrides))


def _is_half(override: Override) -> bool:
    return override.precision.kind in HALVES


def with_parts(
    recipe: Recipe, group_size: int | None, lm_head: str | None, embedding: str | None, kv_cache: str | None
) -> Recipe:
    """The recipe with the parts that are named; a precision without a group takes `group_size`, or the recipe's."""
    inherited = group_size or max(recipe.linear.group_size or 0, 0) or DEFAULT_GROUP_SIZE
    if lm_head is not None:
        recipe = replace(recipe, lm_head=parse_precision(lm_head, inherited))
    if embedding is not None:
        recipe = replace(recipe, embedding=parse_precision(embedding, inherited))
    if kv_cache is not None:
        recipe = replace(recipe, kv_cache=checked_kv_cache(kv_cache))
    return recipe


def read_recipe(path: Path) -> Recipe:
    """A recipe from a TOML file; what it leaves out comes from its `base`. Raises InputError naming the entry."""
    return _from_file(path).recipe


def _from_file(path: Path) -> RecipeFile:
    found = read_recipe_file(path, preset)
    if (name := found.recipe.name) in PRESETS:
        what = f"{path.name}: the recipe is called {name!r}, as a preset is, which may mean something else"
        raise InputError("recipe.file", what, 'give it a name of its own: name = "..." in the file')
    return found


def _regroup(recipe: Recipe, group_size: int) -> Recipe:
    changed = recipe.with_group_size(group_size)
    if not any((p.group_size or 0) > 0 and p.kind not in FIXED_GROUPS for p in recipe.precisions):
        raise InputError("recipe.group_size", f"recipe {recipe.name!r} has no groups", "leave --group-size out")
    return changed
