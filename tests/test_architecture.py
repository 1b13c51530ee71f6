"""The direction of imports, the homes of vendor libraries, and the size of things, read from the sources."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("exporter", "calibration", "targets")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60

# Rank of a room: a module imports only rooms of lower rank, or its own.
CORE, CALIBRATION, TARGETS, EXPORTER = range(4)
# These see core alone, although they stand at the top.
CORE_ONLY = ("exporter.trace", "exporter.passes")

# A vendor library and the modules that wrap it; everything else may not import it, not even inside functions.
HOMES = {
    "torch": ("exporter.trace", "exporter.passes", "exporter.parity", "calibration"),
    "transformers": ("exporter.trace", "exporter.passes", "exporter.parity"),
    "onnxruntime": ("targets.onnxruntime", "targets.tensorrt"),
    "onnxruntime_genai": ("targets.onnxruntime",),
    "tvm": ("targets.tvm",),
    "tvm_ffi": ("targets.tvm",),
    "tensorrt": ("targets.tensorrt",),
    "tensorrt_rtx": ("targets.tensorrt",),
    "polygraphy": ("exporter.parity",),
    "tensorrt_llm": ("targets.tensorrt_llm",),
    "modelopt": ("calibration",),
}
# Imported at module top only where the module itself is imported lazily by everyone else.
HEAVY = (
    "torch",
    "transformers",
    "onnxscript",
    "onnxruntime",
    "onnxruntime_genai",
    "tvm",
    "tvm_ffi",
    "tensorrt",
    "tensorrt_rtx",
    "polygraphy",
    "modelopt",
)
HEAVY_AT_TOP = (
    "exporter.trace",
    "exporter.passes",
    "exporter.parity",
    "calibration.accumulate",
    "calibration.algorithms",
    "calibration.decoder",
    "calibration.divergence",
    "calibration.layer_run",
    "calibration.head_run",
    "calibration.sensitivity",
    "targets.tvm.kernels",
    "targets.tvm.lower",
)


@dataclass(frozen=True)
class Import:
    """One import statement: the module it stands in, what it names, its line, and whether it runs on import."""

    importer: str
    imported: str
    line: int
    at_top: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def rank(module: str) -> int:
    if within(module, "exporter.core"):
        return CORE
    return {"calibration": CALIBRATION, "targets": TARGETS}.get(module.split(".")[0], EXPORTER)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> list[Path]:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [*files, ROOT / "enginesmith" / "__init__.py"]


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _walk(node: ast.AST, at_top: bool) -> Iterator[tuple[ast.stmt, bool]]:
    """Every import below a node, with whether it runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, at_top
        inner = at_top and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _walk(child, inner and not _is_type_checking(child))


def imports_of(source: str, module: str, is_package: bool = False) -> list[Import]:
    found = []
    for node, at_top in _walk(ast.parse(source), True):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert isinstance(node, ast.ImportFrom)
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                kept = len(parts) - node.level + (1 if is_package else 0)
                base = ".".join([*parts[:kept], *([node.module] if node.module else [])])
            # `from exporter import core` names a module as well as `from exporter.core import x` does.
            names = [f"{base}.{alias.name}" for alias in node.names]
        found += [Import(module, name, node.lineno, at_top) for name in names]
    return found


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return [
        found
        for path in source_files()
        for found in imports_of(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py")
    ]


def direction_violations(imports: list[Import]) -> list[str]:
    bad = []
    for found in imports:
        ours = found.imported.split(".")[0] in PACKAGES
        if ours and rank(found.imported) > rank(found.importer):
            bad.append(str(found))
        room = next((room for room in CORE_ONLY if within(found.importer, room)), None)
        if ours and room and not (within(found.imported, room) or within(found.imported, "exporter.core")):
            bad.append(f"{found} ({room} sees only exporter.core)")
    return bad


def test_imports_point_one_way(imports: list[Import]) -> None:
    assert not direction_violations(imports)


def test_vendor_libraries_stay_in_their_rooms(imports: list[Import]) -> None:
    bad = [
        str(found)
        for found in imports
        for library, homes in HOMES.items()
        if within(found.imported, library) and not any(within(found.importer, home) for home in homes)
    ]
    assert not bad


def test_heavy_libraries_are_not_imported_at_module_top(imports: list[Import]) -> None:
    bad = [
        str(found)
        for found in imports
        if found.at_top
        and any(within(found.imported, library) for library in HEAVY)
        and not any(within(found.importer, room) for room in HEAVY_AT_TOP)
    ]
    assert not bad


@pytest.mark.parametrize(
    ("importer", "statement"),
    [
        ("exporter.core.weights", "from targets import base"),
        ("exporter.core.weights", "def late():\n    import exporter.passes.fuse"),
        ("calibration.rtn", "from targets.base import Target"),
        ("targets.base", "from exporter.pipeline import build"),
        ("exporter.trace.embedding", "from calibration import rtn"),
        ("exporter.passes.fuse", "from exporter.trace import layer"),
        ("exporter.core.weights", "from .. import pipeline"),
    ],
)
def test_the_direction_check_sees_violations(importer: str, statement: str) -> None:
    assert direction_violations(imports_of(statement, importer))


@pytest.mark.parametrize(
    "command",
    [
        "import enginesmith",
        "import enginesmith; enginesmith.InputError, enginesmith.Recipe",
        "import targets.registry; targets.registry.get_target('onnxruntime')",
        "import exporter.runtime, exporter.artifact, exporter.core.checkpoint, exporter.core.weights",
        "import sys; sys.argv = ['enginesmith', '--help']; import exporter.cli\n"
        "try:\n    exporter.cli.main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code",
    ],
    ids=["import", "errors and recipes", "registry", "runtime rooms", "--help"],
)
def test_light_entry_points_load_no_heavy_library(command: str) -> None:
    heavy = ["torch", "transformers", "onnxruntime", "onnxscript", "onnx", "onnx_ir"]
    if command.startswith(("import enginesmith", "import sys")):
        heavy.append("numpy")
    check = f"import sys as s\nloaded = [m for m in {heavy!r} if m in s.modules]\nassert not loaded, loaded"
    done = subprocess.run([sys.executable, "-c", f"{command}\n{check}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.count("\n") <= MAX_FILE_LINES
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert not long


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_tracked_file_names_a_machine() -> None:
    # Absolute paths of one machine mean nothing on another. Spelled so that this file does not match itself.
    pattern = re.compile(rb"(?<![\w.$}/])/(?:work|root|tmp|home)/[\w.]")
    bad = []
    for path in tracked_files():
        if path.suffix in (".safetensors", ".png"):
            continue
        bad += [
            f"{path.relative_to(ROOT)}:{number}: {line[:100]!r}"
            for number, line in enumerate(path.read_bytes().splitlines(), 1)
            if pattern.search(line)
        ]
    assert not bad
