"""The arrows of the design: who may import whom, and who brings the heavy libraries."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgewright
from edgewright.build import STAGES

ROOT = Path(edgewright.__file__).parent
STAGE_MODULES = {needs.module or name for name, needs in STAGES.items()}
STAGE_MODULES |= {"inspection", "pool"}
# From the bottom up: what stands lower may not import what stands higher.
LAYERS = [
    {"errors", "files", "process", "schema", "sidecars", ""},
    {"decision", "zeros"},
    {"settings", "cache"},
    {"codebooks", "cuts"},
    {"recipe", "target"},
    {"calibration", "data", "model", "runtime", "stage", "metric", "keys"},
    {"admit", "external", "soundness", "parity", "passes", "scaffold", "taps", "mixers", "shelf"},
    {"work"},
    {"lint"},
    {"prune"},
    {"recover"},
    {"cutting", "softening"},
    STAGE_MODULES,
    {"device", "report"},
    {"baseline", "deploy", "delta", "signing", "signatures", "oms", "explain", "registry"},
    {"build"},
    {"console", "rebuild", "release", "pooling"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# The bundle's format is what a device reads, so `device` and `bundle` know each other's half.


def modules() -> list[Path]:
    return sorted(p for p in ROOT.rglob("*.py") if "__pycache__" not in p.parts)


def part(path: Path) -> str:
    """The top-level name below the package that a file belongs to."""
    name = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Dotted names a file imports, and whether only when a function runs."""
    tree = ast.parse(path.read_text("utf-8"))
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        lazy = id(node) not in top
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, lazy
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", lazy


def own(name: str) -> str | None:
    """The part of this package that a dotted name lies in, None for other packages."""
    words = name.split(".")
    if words[0] != "edgewright":
        return None
    return words[1] if len(words) > 1 and words[1] in LEVEL else ""


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_down(path):
    here = part(path)
    assert here in LEVEL, f"say in LAYERS where '{here}' stands"
    for name, _ in imports(path):
        there = own(name)
        if there is None or there == here:
            continue
        assert LEVEL[there] <= LEVEL[here], f"{here} imports {there}, which stands above it"
        assert not {here, there} <= STAGE_MODULES, f"stage {here} imports stage {there}"


def test_onnxruntime_is_imported_below_runtime_only():
    allowed = {"runtime", "quantize"}
    for path in modules():
        for name, _ in imports(path):
            if name.split(".")[0] == "onnxruntime":
                assert part(path) in allowed, path
                if part(path) == "quantize":
                    assert name.startswith("onnxruntime.quantization"), path


def test_torch_is_imported_lazily_by_export_and_by_training_only():
    training = {p for p in modules() if part(p) == "recover" and p.name != "__init__.py"}
    training |= set((ROOT / "recover" / "ops").glob("*.py"))
    for path in modules():
        for name, lazy in imports(path):
            if name.split(".")[0] in ("torch", "torchvision"):
                # Who trains imports torch as it likes, and is imported when a function runs.
                assert path in training or (lazy and path.name == "export.py"), path


def loaded_by(code: str) -> set[str]:
    """The top-level packages in memory after some code ran in a fresh interpreter."""
    tail = "; import sys; print(' '.join({n.split('.')[0] for n in sys.modules}))"
    words = [sys.executable, "-c", code + tail]
    return set(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())


def test_the_command_line_starts_without_the_heavy_libraries():
    heavy = {"numpy", "onnx", "onnxruntime", "torch", "matplotlib", "scipy", "rich", "sympy"}
    assert not loaded_by("import edgewright.cli") & heavy


def test_quantizing_an_onnx_file_needs_no_torch():
    names = sorted(STAGE_MODULES)
    code = "import " + ", ".join(f"edgewright.{name}" for name in names)
    assert "torch" not in loaded_by(code)
