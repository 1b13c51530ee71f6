"""Documentation that can be wrong: links, commands, options, kinds of errors."""

import ast
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("examples/*/*.md"))]
# Servers that pages tell how to start; they are not installed here.
SERVERS = ("sglang",)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
FENCED = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
KIND = re.compile(r"(?:checkpoint|architecture)\.[a-z_]+")


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    assert not [link for link in targets if not (page.parent / link).exists()]


def test_every_page_is_in_the_index() -> None:
    linked = set(LINK.findall((DOCS / "README.md").read_text(encoding="utf-8")))
    assert linked == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} - {"README.md"}


def documented_commands(program: str) -> list[tuple[str, list[str]]]:
    """(page, words) of every line in a code block that starts with a program, continued lines joined."""
    found = []
    for page in PAGES:
        for block in FENCED.findall(page.read_text(encoding="utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith(program):
                    found.append((page_id(page), shlex.split(line.split(" # ")[0].split("   #")[0])))
    return found


def test_documented_commands_and_options_exist() -> None:
    from typer.main import get_command

    import exporter.cli.build
    import exporter.cli.calibrate
    import exporter.cli.engines
    import exporter.cli.lists  # noqa: F401  each module adds its commands
    from exporter.cli.app import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    seen = documented_commands("enginesmith ")
    assert seen
    for page, (_, name, *words) in seen:
        assert name in commands, f"{page}: no command {name}"
        known = {option for parameter in commands[name].params for option in parameter.opts}
        unknown = [word for word in words if word.startswith("--") and word.split("=")[0] not in known]
        assert not unknown, f"{page}: {name} has no {unknown}"


def test_documented_modules_and_make_targets_exist() -> None:
    for page, words in documented_commands("python -m "):
        assert words[2].split(".")[0] in SERVERS or find_spec(words[2]), f"{page}: {words[2]}"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page, words in documented_commands("make "):
        for goal in (word for word in words[1:] if "=" not in word):
            assert re.search(rf"^{goal}:", makefile, re.MULTILINE), f"{page}: make {goal}"


def test_every_refusal_of_a_checkpoint_is_documented() -> None:
    """The kinds that the code can raise while reading a checkpoint, and those of the page, are the same."""
    raised = set()
    for name in ("config", "checkpoint", "safetensors_file"):
        tree = ast.parse((ROOT / "exporter" / "core" / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                words = [a.value for a in node.args[:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                prefix = "checkpoint." if node.func.id == "_damaged" else ""
                raised |= {prefix + word for word in words if KIND.fullmatch(prefix + word)}
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    assert raised == set(re.findall(rf"^\| `({KIND.pattern})`", page, re.MULTILINE))
