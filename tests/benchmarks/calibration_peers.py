"""What other calibration tools make of a checkpoint. Runs in their environment (peer_setup.quantizers), not in ours.

    python -m tests.benchmarks.calibration_peers CHECKPOINT TOKENS.npz OUT.jsonl [--methods NAME ...]

TOKENS.npz holds the ids every tool sees: `calibration` int64 [n, S], and `heldout` int64 [m, S] to measure on. Each
method quantizes the decoder layers' matrices of the fp32 model, as the tool itself simulates them, and leaves embedding
and head alone. One JSON object a method is appended to OUT.jsonl; methods that stand there already are not repeated.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.quality import Scorer, compare, eager

SCALE_BITS = 16
# Sequences at a time: modelopt quantizes the weights anew for every batch and every candidate.
ROWS = 16
# As many tokens of each sequence as with one at a time.
CLIP: dict[str, dict[str, int]] = {"awq_lite": {}, "awq_full": {"max_tokens_per_batch": 64 * ROWS}}
Quantize = Callable[[Any, np.ndarray], Any]
"""(eager fp32 model, calibration ids [n, S]) -> the model as the tool simulates it."""


@dataclass(frozen=True)
class Method:
    """One row of the table. `bits` per weight of the decoder's matrices, scales and zero points included."""

    tool: str
    bits: float
    quantize: Quantize


def int4_bits(group: int, symmetric: bool = True) -> float:
    return 4 + (SCALE_BITS + (0 if symmetric else 4)) / group


def modelopt(preset: str, algorithm: Any = None, group: int | None = None, kv_cache: str | None = None) -> Quantize:
    """mtq.quantize with a preset, another algorithm or block size, and a preset of the KV cache added."""

    def quantize(model: Any, ids: np.ndarray) -> Any:
        import modelopt.torch.quantization as mtq
        import torch

        config = copy.deepcopy(getattr(mtq, preset))
        if kv_cache:
            config["quant_cfg"] += getattr(mtq, kv_cache)["quant_cfg"]
        if algorithm:
            config["algorithm"] = algorithm
        for entry in config["quant_cfg"]:
            if group and "block_sizes" in (entry.get("cfg") or {}):
                entry["cfg"]["block_sizes"][-1] = group

        def forward(calibrated: Any) -> None:
            for start in range(0, len(ids), ROWS):
                calibrated(torch.from_numpy(ids[start : start + ROWS]))

        with torch.no_grad():
            return mtq.quantize(model, config, forward)

    return quantize


def llm_compressor(recipe: Callable[[], list[Any]]) -> Quantize:
    """oneshot with its own sequential pipeline; `recipe` makes the modifiers."""

    def quantize(model: Any, ids: np.ndarray) -> Any:
        import torch
        from llmcompressor import oneshot

        rows = [{"input_ids": torch.from_numpy(row), "attention_mask": torch.ones(len(row))} for row in ids]
        loader = torch.utils.data.DataLoader(rows, batch_size=ROWS)  # type: ignore[arg-type]
        return oneshot(model=model, dataset=loader, recipe=recipe(), num_calibration_samples=len(ids))

    return quantize


def weights_of(group: int, symmetric: bool = True) -> dict[str, Any]:
    """llm-compressor's scheme of int4 weights in groups for all Linear modules but the head."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group, "symmetric": symmetric}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"config_groups": groups, "ignore": ["lm_head"]}


def gptq(group: int, order: str, symmetric: bool = True) -> Quantize:
    def recipe() -> list[Any]:
        from llmcompressor.modifiers.gptq import GPTQModifier

        return [GPTQModifier(actorder=order, **weights_of(group, symmetric))]

    return llm_compressor(recipe)


def awq(group: int, symmetric: bool) -> Quantize:
    def recipe() -> list[Any]:
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier

        return [AWQModifier(duo_scaling="both"), QuantizationModifier(**weights_of(group, symmetric))]

    return llm_compressor(recipe)


def w8a8(strength: float | None) -> Quantize:
    """int8 weights per channel, activations per token as they come; with SmoothQuant of a strength."""

    def recipe() -> list[Any]:
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        rounding = QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])
        return [rounding] if strength is None else [SmoothQuantModifier(smoothing_strength=strength), rounding]

    return llm_compressor(recipe)


def methods() -> dict[str, Method]:
    found = {}
    for group in (32, 128):
        for algorithm in ("awq_lite", "awq_full"):
            quantize = modelopt("INT4_AWQ_CFG", {"method": algorithm, "alpha_step": 0.1, **CLIP[algorithm]}, group)
            found[f"modelopt int4 {algorithm} g{group}"] = Method("modelopt", int4_bits(group), quantize)
        quantize = modelopt("INT4_AWQ_CFG", "max", group)
        found[f"modelopt int4 max g{group}"] = Method("modelopt", int4_bits(group), quantize)
        for order in ("static", "group"):
            name = f"llm-compressor GPTQ g{group} actorder {order}"
            found[name] = Method("llm-compressor", int4_bits(group), gptq(group, order))
        for symmetric in (True, False):
            name = f"llm-compressor AWQ g{group}{'' if symmetric else ' asym'}"
            found[name] = Method("llm-compressor", int4_bits(group, symmetric), awq(group, symmetric))
    for label, config in {"plain": None, "SmoothQuant 0.5": 0.5, "SmoothQuant 0.8": 0.8}.items():
        found[f"llm-compressor W8A8 {label}"] = Method("llm-compressor", 8.0, w8a8(config))
    smooth = {"method": "smoothquant", "alpha": 0.5}
    found["modelopt W8A8 plain"] = Method("modelopt", 8.0, modelopt("INT8_DEFAULT_CFG"))
    found["modelopt W8A8 SmoothQuant 1.0"] = Method("modelopt", 8.0, modelopt("INT8_SMOOTHQUANT_CFG"))
    found["modelopt W8A8 SmoothQuant 0.5"] = Method("modelopt", 8.0, modelopt("INT8_SMOOTHQUANT_CFG", smooth))
    found["modelopt FP8"] = Method("modelopt", 8.0, modelopt("FP8_DEFAULT_CFG"))
    found["modelopt FP8 + KV"] = Method("modelopt", 8.0, modelopt("FP8_DEFAULT_CFG", kv_cache="FP8_KV_CFG"))
    found["modelopt FP8 channel/token"] = Method("modelopt", 8.0, modelopt("FP8_PER_CHANNEL_PER_TOKEN_CFG"))
    return found


def load(checkpoint: Path) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()


def scorer(model: Any) -> Scorer:
    import torch

    def score(ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits: np.ndarray = model(torch.from_numpy(ids)[None]).logits[0].float().numpy()
        return logits

    return score


def remembered(score: Scorer) -> Scorer:
    """The same, computing the logits of each row of ids once."""
    known: dict[bytes, np.ndarray] = {}

    def scored(ids: np.ndarray) -> np.ndarray:
        key = ids.tobytes()
        if key not in known:
            known[key] = score(ids)
        return known[key]

    return scored


def dump_amax(model: Any, out: Path) -> None:
    """max|x| of every modelopt quantizer that holds one, by its name, as JSON."""
    found = {
        name: quantizer.amax.flatten().tolist()
        for name, quantizer in model.named_modules()
        if name.endswith("_quantizer") and getattr(quantizer, "amax", None) is not None
    }
    out.write_text(json.dumps(found))


def measure(checkpoint: Path, tokens: Path, out: Path, chosen: dict[str, Method]) -> None:
    ids = np.load(tokens)
    reference = remembered(eager(checkpoint))
    done = {json.loads(line)["method"] for line in out.read_text().splitlines()} if out.exists() else set()
    for name, method in chosen.items():
        if name in done:
            continue
        start = time.perf_counter()
        model = method.quantize(load(checkpoint), ids["calibration"])
        seconds = time.perf_counter() - start
        if name.startswith("modelopt FP8"):
            dump_amax(model, out.with_name(f"{out.stem}-{name.replace(' ', '_').replace('/', '_')}-amax.json"))
        figures = compare(reference, scorer(model), list(ids["heldout"]))
        row = {"method": name, "tool": method.tool, "bits": method.bits, "seconds": seconds, **figures}
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", nargs="*")
    arguments = parser.parse_args()
    known = methods()
    chosen = {name: known[name] for name in arguments.methods} if arguments.methods else known
    measure(arguments.checkpoint, arguments.tokens, arguments.out, chosen)


if __name__ == "__main__":
    main()
