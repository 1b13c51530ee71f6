"""The lists behind `enginesmith targets` and `enginesmith recipes`."""

from collections.abc import Callable
from typing import Any

from calibration.presets import PARTS, PRESETS, load_recipe
from exporter.core.config import ModelConfig, RopeConfig
from exporter.core.recipe import KV_CACHES, Recipe
from targets.base import Target
from targets.registry import TARGETS, get_target

# A plain Llama shape that every kernel takes: what a target says of it is what it says of the recipe.
TYPICAL = ModelConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope=RopeConfig(),
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_ids=(),
    pad_token_id=None,
    raw={},
)


def list_targets() -> list[dict[str, Any]]:
    """Each target: usable here or why not, versions, its support level per recipe and KV cache, and its devices.

    `default_kv_cache` and `precisions` say what each recipe becomes where nothing else is asked for.
    """
    entries = []
    for name in TARGETS:
        target = get_target(name)
        probe = target.probe()
        recipes = {recipe: load_recipe(recipe, complete=_completing(target)) for recipe in PRESETS}
        capabilities = target.capabilities()
        levels = {name: target.supports(TYPICAL, recipe).level for name, recipe in recipes.items()}
        entries.append(
            {
                "name": name,
                "usable": probe.usable,
                "why": probe.why,
                "remedy": probe.remedy,
                "versions": target.versions(),
                "recipes": levels,
                "kv_caches": {kind: capabilities[f"kv-cache {kind}"].level for kind in KV_CACHES},
                "default_kv_cache": {name: recipe.kv_cache for name, recipe in recipes.items()},
                "precisions": {name: _precisions(recipe) for name, recipe in recipes.items()},
                "devices": [{"name": device, "summary": summary} for device, summary in target.devices().items()],
            }
        )
    return entries


def _completing(target: Target) -> Callable[[Recipe, frozenset[str]], Recipe]:
    return lambda recipe, unnamed: target.complete(recipe, unnamed, TYPICAL)


def list_recipes() -> list[dict[str, Any]]:
    """Each preset with the precision of its parts, its algorithms, and what it costs and needs."""
    return [
        {
            "name": name,
            "summary": listed.summary,
            **_precisions(listed.recipe),
            "algorithms": list(listed.recipe.algorithms),
            "costs": listed.costs,
            "needs": listed.needs,
        }
        for name, listed in PRESETS.items()
    ]


def _precisions(recipe: Recipe) -> dict[str, str]:
    return {part: getattr(recipe, part).describe() for part in PARTS}
