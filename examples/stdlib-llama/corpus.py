"""The training and held-out text of the example model: the Python standard library's own sources."""

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Held out whole, so that evaluation never sees a line the model was trained on.
HELD_OUT = (
    "bisect.py",
    "colorsys.py",
    "csv.py",
    "graphlib.py",
    "heapq.py",
    "json/decoder.py",
    "queue.py",
    "sched.py",
    "shlex.py",
    "string.py",
    "textwrap.py",
    "wsgiref/headers.py",
)
SKIPPED_FOLDERS = {"site-packages", "encodings", "pydoc_data", "test", "tests", "idle_test", "__pycache__"}
CHAT_PREFIX = "<|user|>\n{user}<|end|>\n<|assistant|>\n{assistant}<|end|>\n"


def library_root() -> Path:
    """The standard library of the interpreter that runs this script."""
    return Path(sysconfig.get_path("stdlib"))


def training_files(root: Path) -> Iterator[Path]:
    """Every library source, less tests, generated tables and the held-out files, in a fixed order."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not SKIPPED_FOLDERS.intersection(parts) and "/".join(parts) not in HELD_OUT:
            yield path


def read_source(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def held_out_text(root: Path) -> str:
    """The evaluation text: the held-out files, one after the other, separated by a form feed."""
    return "\f".join(read_source(root / name) for name in HELD_OUT)


def chat_examples(source: str) -> Iterator[str]:
    """Documented functions as chats: the docstring asks, the definition answers."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
            definition = ast.get_source_segment(source, node) or ""
            if 80 < len(definition) < 1600:
                question = f"Write the function {node.name}: {doc.split(chr(10) * 2)[0]}"
                yield CHAT_PREFIX.format(user=question, assistant=definition)


def training_documents(root: Path, seed: int) -> list[str]:
    """All training documents in shuffled order: whole files and chats."""
    documents = []
    for path in training_files(root):
        source = read_source(path)
        documents.append(source)
        documents.extend(chat_examples(source))
    random.Random(seed).shuffle(documents)
    return documents
