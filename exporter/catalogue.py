"""The lists behind `enginesmith targets` and `enginesmith recipes`."""

from typing import Any

from calibration.presets import PRESETS, preset
from exporter.core.config import ModelConfig, RopeConfig
from exporter.core.recipe import KV_CACHES
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

    `default_kv_cache` names, for each recipe, the cache it gets where none is asked for.
    """
    entries = []
    for name in TARGETS:
        target = get_target(name)
        probe = target.probe()
        levels = {recipe: target.supports(TYPICAL, preset(recipe)).level for recipe in PRESETS}
        entries.append(
            {
                "name": name,
                "usable": probe.usable,
                "why": probe.why,
                "remedy": probe.remedy,
                "versions": target.versions(),
                "recipes": levels,
                "kv_caches": {kind: target.capabilities()[f"kv-cache {kind}"].level for kind in KV_CACHES},
                "default_kv_cache": {recipe: target.default_kv_cache(preset(recipe)) for recipe in PRESETS},
                "devices": [{"name": device, "summary": summary} for device, summary in target.devices().items()],
            }
        )
    return entries


def list_recipes() -> list[dict[str, Any]]:
    """Each preset with the precision of its parts."""
    entries = []
    for name, listed in PRESETS.items():
        recipe = listed.recipe
        parts = {part: getattr(recipe, part).describe() for part in ("linear", "lm_head", "embedding")}
        entries.append({"name": name, "summary": listed.summary, **parts})
    return entries
