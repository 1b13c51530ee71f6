"""The recipe that a calibration works with: as it was asked, or what `auto` chose, kept in the work directory."""

import json

from calibration import auto
from calibration.auto import AutoBudget
from calibration.coverage import AUTO
from calibration.data import CalibrationData
from calibration.progress_parts import PartOfStage
from calibration.recipe_json import recipe_from_json, recipe_to_json
from calibration.work_directory import WorkDirectory
from exporter.core.checkpoint import Checkpoint
from exporter.core.disk import output_errors
from exporter.core.errors import InputError
from exporter.core.progress import Progress
from exporter.core.recipe import Recipe
from exporter.core.strict_json import parse_json

AUTO_SHARE = 0.3
"""Of the stage: what choosing takes."""
Report = dict[str, object]


def resolved(
    checkpoint: Checkpoint,
    recipe: Recipe,
    data: CalibrationData,
    budget: AutoBudget,
    work: WorkDirectory,
    progress: Progress,
) -> tuple[Recipe, Report, Progress]:
    """The recipe, what `auto` found (empty for other recipes), and the progress that is left for the layers.

    `checkpoint` is the source with its rotations. A choice is made once: a resumed run takes that of the first.
    """
    if recipe.name != AUTO:
        return recipe, {}, progress
    if not work.chosen.is_file():
        choice = auto.resolve(checkpoint, recipe, data, budget, PartOfStage(progress, 0.0, AUTO_SHARE))
        kept = {"recipe": recipe_to_json(choice.recipe), "report": choice.to_json()}
        with output_errors(work.chosen):
            part = work.chosen.with_suffix(".part")
            part.write_text(json.dumps(kept), encoding="utf-8")
            part.replace(work.chosen)
    try:
        kept = parse_json(work.chosen.read_bytes())
        found, report = recipe_from_json(kept["recipe"]), dict(kept["report"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{work.chosen.name} in {work.path} is not what was written"
        raise InputError("work_dir.damaged", why, "remove the work directory and start again") from error
    return found, report, PartOfStage(progress, AUTO_SHARE, 1.0)
