"""What a build is told about calibration: parameters from a file, or text to find them on; never both."""

from dataclasses import dataclass
from pathlib import Path

from exporter.core.errors import InputError
from exporter.core.recipe import Recipe


@dataclass(frozen=True)
class CalibrationRequest:
    """Options of `build` and `plan` on calibration.

    `qparams`: a file of `enginesmith calibrate`. `text`: calibrate on this file within the build, on `tokens` of it
    (None: the default) sampled by `seed`. `target_bits`, `target_bytes`, `max_kl`: the goal of recipe `auto`. `rotate`
    adds a rotation to an integer recipe. `work_dir` holds what does not fit in memory, and what a resumed calibration
    starts from.
    """

    qparams: Path | None = None
    text: Path | None = None
    tokens: int | None = None
    seed: int = 0
    target_bits: float | None = None
    target_bytes: int | None = None
    max_kl: float | None = None
    rotate: bool = False
    work_dir: Path | None = None

    def __post_init__(self) -> None:
        if self.qparams is not None and (given := self._given_beside_qparams()):
            what = f"--qparams with {', '.join(given)}: the file says what it was calibrated on"
            raise InputError("usage.qparams", what, f"leave {', '.join(given)} out, or --qparams")
        if self.tokens is not None and self.text is None:
            raise InputError("usage.calibration", "--calibration-tokens without --calibration", "give the text too")
        if self.tokens is not None and self.tokens < 1:
            raise InputError("usage.calibration", f"--calibration-tokens is {self.tokens}", "give 1 or more")
        for name, goal in self.goals.items():
            if not 0 < goal < float("inf"):
                raise InputError("usage.goal", f"{name} is {goal:g}", "give a positive number")
        if len(self.goals) > 1:
            raise InputError("usage.goal", f"{' and '.join(self.goals)} contradict each other", "give one of them")

    @property
    def goals(self) -> dict[str, float]:
        """The goals of recipe `auto` that were given, by option."""
        named = {
            "--target-bits": self.target_bits,
            "--target-bytes": self.target_bytes,
            "--max-kl": self.max_kl,
        }
        return {name: float(value) for name, value in named.items() if value is not None}

    def _given_beside_qparams(self) -> list[str]:
        flags = {"--calibration": self.text, "--calibration-tokens": self.tokens, "--rotate": self.rotate or None}
        return [name for name, value in {**flags, **self.goals}.items() if value is not None]

    def check(self, recipe: Recipe, calibrated_caches: frozenset[str]) -> None:
        """Raise InputError where the options do not go with the recipe, or are not enough for it. `calibrated_caches`:
        the target's."""
        self.check_recipe(recipe, calibrated_caches)
        if error := self.missing_data(recipe, calibrated_caches):
            raise error

    def check_recipe(self, recipe: Recipe, calibrated_caches: frozenset[str] = frozenset({"int8"})) -> None:
        """Raise InputError where the options contradict the recipe."""
        if self.goals and recipe.name != "auto":
            given = ", ".join(self.goals)
            what = f"{given} with recipe {recipe.name}"
            raise InputError("usage.goal", what, f"use --recipe auto, or leave {given} out")
        if recipe.name == "auto" and not self.goals and self.qparams is None:
            what = "recipe auto needs a goal"
            raise InputError("usage.goal", what, "give --target-bits, --target-bytes or --max-kl")
        if self.text is not None and not _data_uses(recipe, calibrated_caches):
            what = f"recipe {recipe.name} takes nothing from calibration text"
            raise InputError("usage.calibration", what, "leave --calibration out, or choose another recipe")

    def missing_data(self, recipe: Recipe, calibrated_caches: frozenset[str]) -> InputError | None:
        """The error (`recipe.needs_data`) of a recipe that needs text where nothing of that kind was given."""
        uses = _data_uses(recipe, calibrated_caches)
        if not uses or self.qparams is not None or self.text is not None:
            return None
        return InputError(
            "recipe.needs_data",
            f"recipe {recipe.name} finds numbers on text ({', '.join(uses)}), and none was given",
            "give --calibration FILE (plain text, or JSONL with text or messages), or --qparams FILE of "
            "`enginesmith calibrate`",
        )

    def calibrates(self, recipe: Recipe) -> bool:
        """Whether the build has to calibrate by itself."""
        return self.qparams is None and (recipe.calibrated or self.text is not None)


def _data_uses(recipe: Recipe, calibrated_caches: frozenset[str]) -> list[str]:
    """What of a recipe comes from text; `auto` measures its layers on it."""
    static = sorted({p.activations for p in recipe.precisions if p.activations.endswith("/tensor")})
    calibrated = recipe.kv_cache == "fp8" or recipe.kv_cache in calibrated_caches
    return [
        *(name for name in recipe.algorithms if name != "rotate"),
        *(f"{name} activations" for name in static),
        *([f"a KV cache in {recipe.kv_cache}"] if calibrated else []),
    ]


NO_CALIBRATION = CalibrationRequest()
