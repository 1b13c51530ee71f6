"""Quality of int4 engines against the eager model: ours, and onnxruntime-genai's own int4 of the same checkpoint.

    python -m tests.benchmarks.quality examples/stdlib-llama --work DIR [--window 512] [--windows 16]
                                       [--recipe int4-rtn] [--target onnxruntime] [--embedding int4]
                                       [--gguf FILE.gguf ...]

The text is CHECKPOINT/heldout.txt, cut into windows of equal length; every engine sees the same tokens.
Ours runs through its own runner, token by token; genai's model.onnx through plain ONNX Runtime, a window
at once (its generator only shows the last position's logits). A GGUF file's weights are read back with the
package gguf and run in float32: what llama.cpp loses by rounding activations is not counted against it.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.commands import build_genai, build_ours, built, directory_bytes
from tests.benchmarks.report import show

Scorer = Callable[[np.ndarray], np.ndarray]
"""ids int64 [S] -> logits float32 [S, V]."""


def windows(checkpoint: Path, length: int, count: int) -> list[np.ndarray]:
    """`count` windows of the held-out text, spread evenly over it; each starts with the BOS token, if there is one."""
    from tokenizers import Tokenizer

    from exporter.core.config import ModelConfig

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    text = (checkpoint / "heldout.txt").read_text(encoding="utf-8")
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
    bos = ModelConfig.from_directory(checkpoint).bos_token_id
    head = np.array([] if bos is None else [bos], np.int64)
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return [np.concatenate([head, ids[start : start + length - len(head)]]) for start in starts]


def eager_model(checkpoint: Path) -> Any:
    """transformers' model in fp32 with eager attention."""
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()


def scorer(model: Any) -> Scorer:
    import torch

    def score(ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits: np.ndarray = model(torch.from_numpy(ids)[None]).logits[0].numpy()
        return logits

    return score


def eager(checkpoint: Path) -> Scorer:
    return scorer(eager_model(checkpoint))


def our_engine(path: Path) -> Scorer:
    from exporter.runtime.engine import load

    engine = load(path).__enter__()

    def score(ids: np.ndarray) -> np.ndarray:
        engine.runner.reset()
        logits = [engine.runner.prefill(ids[None, :1], np.array([1])).copy()]
        active = np.array([True])
        logits += [engine.runner.decode(ids[i : i + 1], active).copy() for i in range(1, len(ids))]
        return np.concatenate(logits)

    return score


def genai_model(path: Path) -> Scorer:
    import onnxruntime

    decoder = json.loads((path / "genai_config.json").read_text())["model"]["decoder"]
    past = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
    session = onnxruntime.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    inputs = [value.name for value in session.get_inputs()]

    def score(ids: np.ndarray) -> np.ndarray:
        feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64)}
        if "position_ids" in inputs:
            feeds["position_ids"] = np.arange(len(ids), dtype=np.int64)[None]
        feeds |= {name: past for name in inputs if name.startswith("past_key_values")}
        logits: np.ndarray = session.run(["logits"], feeds)[0][0]
        assert len(logits) == len(ids), "this model shows only its last position"
        return logits.astype(np.float32)

    return score


def gguf_weights(checkpoint: Path, path: Path, *, whole: bool = True) -> Scorer:
    """The eager model with the weights of a GGUF file written by gguf_checkpoint.py and llama-quantize; without `whole`
    only those of the decoder layers' matrices."""
    import torch
    from gguf import GGUFReader, dequantize

    from tests.benchmarks.gguf_checkpoint import gguf_name, halves

    model = eager_model(checkpoint)
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not whole and "_proj" not in name:
                continue
            tensor = stored[gguf_name(name)]
            values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).reshape(parameter.shape)
            for part, count in heads.items():
                values = halves(values, count) if part in name else values
            parameter.copy_(values)
    return scorer(model)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def compare(reference: Scorer, engine: Scorer, rows: list[np.ndarray]) -> dict[str, float]:
    """Means over all predicted positions: KL(reference || engine), perplexities, agreement of the best token."""
    divergence, likelihood, reference_likelihood, agree = (
        np.concatenate(part) for part in zip(*_positions(reference, engine, rows), strict=True)
    )
    perplexity, reference_perplexity = np.exp(-likelihood.mean()), np.exp(-reference_likelihood.mean())
    return {
        "mean KL": float(divergence.mean()),
        "max KL": float(divergence.max()),
        "perplexity": float(perplexity),
        "eager perplexity": float(reference_perplexity),
        "ratio": float(perplexity / reference_perplexity),
        "top-1 agreement": float(agree.mean()),
    }


def _positions(reference: Scorer, engine: Scorer, rows: list[np.ndarray]) -> Iterator[tuple[np.ndarray, ...]]:
    for ids in rows:
        expected, found = log_softmax(reference(ids)[:-1]), log_softmax(engine(ids)[:-1])
        assert np.isfinite(found).all()
        at = np.arange(len(ids) - 1), ids[1:]
        divergence = (np.exp(expected) * (expected - found)).sum(axis=-1)
        yield divergence, found[at], expected[at], expected.argmax(-1) == found.argmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--recipe", default="int4-rtn")
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--embedding")
    parser.add_argument("--gguf", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    name = "-".join(filter(None, ["enginesmith", arguments.target, arguments.recipe, arguments.embedding]))
    ours, peer = arguments.work / name, arguments.work / "genai-int4"
    command = build_ours(arguments.checkpoint, ours, recipe=arguments.recipe, target=arguments.target)
    built([*command, *(["--embedding", arguments.embedding] if arguments.embedding else [])], ours)
    built(build_genai(arguments.checkpoint, peer), peer)
    rows = windows(arguments.checkpoint, arguments.window, arguments.windows)
    reference = eager(arguments.checkpoint)
    engines = {name: (our_engine(ours), ours), "onnxruntime-genai": (genai_model(peer), peer)}
    engines |= {path.stem: (gguf_weights(arguments.checkpoint, path), path) for path in arguments.gguf}
    table: list[dict[str, Any]] = []
    for label, (engine, out) in engines.items():
        size = directory_bytes(out) if out.is_dir() else out.stat().st_size
        table.append({"engine": label, **compare(reference, engine, rows), "MB": size / 1e6})
    show(f"Quality, {arguments.recipe}: {sum(len(ids) - 1 for ids in rows)} positions of held-out text", table)


if __name__ == "__main__":
    main()
