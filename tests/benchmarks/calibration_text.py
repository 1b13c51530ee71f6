"""Text to calibrate the example model on: documents it was trained on, never the held-out ones.

    python -m tests.benchmarks.calibration_text examples/stdlib-llama OUT.jsonl [--documents 600] [--seed 1]

One JSON object with `text` a line. The documents are those of the interpreter's own standard library, as in training.
"""

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType


def corpus_of(checkpoint: Path) -> ModuleType:
    """The example's corpus.py, which lies beside its weights and not in a package."""
    spec = importlib.util.spec_from_file_location("corpus", checkpoint / "corpus.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_text(checkpoint: Path, out: Path, documents: int = 600, seed: int = 1) -> Path:
    """Write the first `documents` of the shuffled training documents."""
    corpus = corpus_of(checkpoint)
    texts = corpus.training_documents(corpus.library_root(), seed)[:documents]
    out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    print(write_text(arguments.checkpoint, arguments.out, arguments.documents, arguments.seed))


if __name__ == "__main__":
    main()
