"""The house rules that no other test sees: who imports whom, and that promises in the documents hold."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lmdserve

ROOT = Path(__file__).parents[1]
FOLDERS = ("server", "engine", "kernels", "tools", "clients", "demo")
MAY_IMPORT = {
    "server": {"server", "tools", "engine"},
    "engine": {"engine", "kernels"},
    "kernels": {"kernels"},
    "tools": {"tools"},
    "clients": {"clients"},
    "demo": {"demo", "server", "tools", "engine", "clients"},
}
WIRES_ALL = "server/cli.py"
MAY_BUILD_AN_ENGINE = {
    WIRES_ALL,
    "server/pipeline.py",
    "server/loading.py",
    "server/job_worker.py",
    "server/quantize_command.py",
    "server/convert_command.py",
    "server/evaluate_command.py",
}
# What all other files of server/ may know of the engine.
ENGINE_CONTRACT = {
    "engine.api",
    "engine.config",
    "engine.quantize.options",
    "engine.quantize.quality",
    "engine.quantize.report",
}


def imported_modules(path: Path) -> set[str]:
    """Every module that the file imports absolutely, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return found


def source_files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_house(path: Path) -> None:
    name = path.relative_to(ROOT)
    folder = name.parts[0]
    ours = {module for module in imported_modules(path) if module.startswith("lmdserve.")}
    allowed = MAY_IMPORT[folder] | ({"clients"} if str(name) == WIRES_ALL else set())
    assert {module.split(".")[1] for module in ours} <= allowed - {folder}
    if folder == "server" and str(name) not in MAY_BUILD_AN_ENGINE:
        engine = {module for module in ours if module.startswith("lmdserve.engine")}
        assert engine <= {f"lmdserve.{module}" for module in ENGINE_CONTRACT}


def test_the_http_layer_works_without_torch() -> None:
    program = "import sys; sys.modules['torch'] = None; import lmdserve.server.app"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_changelog_opens_with_this_version() -> None:
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert versions[0] == lmdserve.__version__


def test_the_readme_shows_every_option() -> None:
    """The README's option table is the output of `lmdserve --help`, so neither can drift."""
    shown = subprocess.run([sys.executable, "-m", "lmdserve", "--help"], capture_output=True, text=True, timeout=60)
    assert shown.stdout.strip() in (ROOT / "README.md").read_text("utf-8")


def test_ci_runs_the_readmes_test_command() -> None:
    readme, ci = ((ROOT / name).read_text("utf-8") for name in ("README.md", ".ci/run"))
    assert re.search(r"^make test$", readme, re.MULTILINE)
    assert re.search(r"^make test$", ci, re.MULTILINE)


def test_the_architecture_has_one_line_for_every_source_file() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    missing = [str(path.relative_to(ROOT)) for path in source_files() if path.name not in text]
    assert [name for name in missing if not name.endswith("__init__.py")] == []
