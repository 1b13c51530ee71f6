"""What llama-quantize makes of a checkpoint, with an importance matrix of the same text, in the eager model.

Two ways: the decoder layers' matrices alone, embedding and head in fp32 as for the other tools, and the whole file.
What llama.cpp loses by rounding activations is not counted against it.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
KINDS = {
    "Q4_0": ("Q4_0", False),
    "Q4_0 imatrix": ("Q4_0", True),
    "Q4_K_S imatrix": ("Q4_K_S", True),
    "Q4_K_M imatrix": ("Q4_K_M", True),
    "IQ4_XS imatrix": ("IQ4_XS", True),
    "IQ4_NL imatrix": ("IQ4_NL", True),
}
"""Label -> the type asked of llama-quantize, and whether it gets the importance matrix."""


@dataclass(frozen=True)
class LlamaFiles:
    """The files of one checkpoint: made where they are missing, in `work`, by the programs in `programs`."""

    checkpoint: Path
    work: Path
    programs: Path
    label: str

    def exact(self) -> Path:
        out = self.work / f"{self.label}-f32.gguf"
        if not out.exists():
            _run([sys.executable, str(HERE / "gguf_checkpoint.py"), str(self.checkpoint), str(out), "--exact"])
        return out

    def importance(self, ids: np.ndarray) -> Path:
        """llama-imatrix over the text of the sequences, cut into as many tokens at a time."""
        out = self.work / f"{self.label}.imatrix.gguf"
        if not out.exists():
            text = self.work / "imatrix.txt"
            text.write_text(_text(self.checkpoint, ids), encoding="utf-8")
            command = [str(self.programs / "llama-imatrix"), "-m", str(self.exact()), "-f", str(text), "-o", str(out)]
            _run([*command, "-c", str(ids.shape[1]), "-b", str(ids.shape[1]), "--parse-special", "--no-ppl"])
        return out

    def quantized(self, label: str, ids: np.ndarray) -> Path:
        kind, informed = KINDS[label]
        out = self.work / f"{self.label}-{label.replace(' ', '-')}.gguf"
        if not out.exists():
            options = ["--imatrix", str(self.importance(ids))] if informed else []
            _run([str(self.programs / "llama-quantize"), *options, str(self.exact()), str(out), kind])
        return out


def _text(checkpoint: Path, ids: np.ndarray) -> str:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    text: str = tokenizer.decode(ids.reshape(-1).tolist(), skip_special_tokens=False)
    return text


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout[-2000:]}")


def bits(path: Path) -> dict[str, Any]:
    """Bits per weight of the decoder layers' matrices and of embedding and head, and the types in use."""
    from gguf import GGUFReader

    tensors = [tensor for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1]
    parts = {"layers": [t for t in tensors if t.name.startswith("blk.")]}
    parts["table"] = [t for t in tensors if not t.name.startswith("blk.")]
    found: dict[str, Any] = {
        part: 8 * sum(int(t.n_bytes) for t in members) / sum(int(t.n_elements) for t in members)
        for part, members in parts.items()
    }
    found["types"] = "+".join(sorted({t.tensor_type.name for t in parts["layers"]}))
    return found
