"""The architecture as rules on the source: what may import what, and what is heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sepress"
# fmt: off
LAYERS = [
    "errors", "defaults", "types", "schemas", "console", "files", "lock", "device", "safe_yaml",
    "constraints", "schedule", "modes", "outputs", "digests", "models", "data", "coupling",
    "gates", "moments", "baselines", "calibrate", "reconstruct", "criteria", "plan", "train", "recover",
    "measure", "timing", "runtime", "parity", "bundle", "simplify", "export", "precision", "imagefile",
    "example", "report", "bench", "costs", "profile", "pruning", "folding", "search", "steps",
    "inspection", "conversion", "compare", "recipe", "basis", "runfolder", "job", "cutting", "variants",
    "summary", "stages", "benchmark", "cli",
]
HEAVY = {
    "torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime", "scipy", "numpy", "PIL", "mlxtend",
    "matplotlib",
}
LIGHT = [
    "errors", "defaults", "types", "console", "files", "lock", "device", "safe_yaml", "constraints",
    "schedule", "recipe", "cli", "__init__", "__main__",
]
# fmt: on
FILES = sorted(PACKAGE.rglob("*.py"))


def unit(file: Path) -> str:
    """The name in the list of layers: a module, or a package as a whole."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, *, top_only: bool = False) -> Iterator[str]:
    """Dotted names imported when the code runs: not what stands under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imports(node, top_only=top_only)


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def test_every_module_has_its_place_in_the_list_of_layers() -> None:
    found = {unit(file) for file in FILES} - {"__init__", "__main__"}
    assert found == set(LAYERS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_up_the_list_of_layers_only(file: Path) -> None:
    here = unit(file)
    if here in ("__init__", "__main__"):
        return  # the public names, and the way in
    for name in imports(parse(file)):
        parts = name.split(".")
        if parts[0] != "sepress" or parts[1] == here or parts[1] == "__version__":
            continue
        assert parts[1] in LAYERS[: LAYERS.index(here)], f"{here} imports {parts[1]}"


def test_only_baselines_imports_torch_pruning() -> None:
    users = {unit(f) for f in FILES if any(n.split(".")[0] == "torch_pruning" for n in imports(parse(f)))}
    assert users == {"baselines"}


@pytest.mark.parametrize("name", [*LIGHT, "report"])
def test_light_modules_import_nothing_heavy_at_the_top(name: str) -> None:
    for file in (f for f in FILES if unit(f) == name):
        heavy = {n.split(".")[0] for n in imports(parse(file), top_only=True)} & HEAVY
        assert not heavy, f"{file.name} imports {heavy}"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("sepress", "torch numpy pydantic yaml rich typer"),
        ("sepress.cli", "torch numpy pydantic yaml timm onnx rich.markdown sepress.recipe"),
        ("sepress.recipe", "torch numpy timm onnx scipy"),
        ("sepress.report", "torch numpy pydantic yaml"),
    ],
)
def test_importing_leaves_heavy_modules_out(module: str, absent: str) -> None:
    code = f"import sys, {module}; print([m for m in {absent.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_torch_load_always_says_weights_only() -> None:
    """Its default can be flipped by an environment variable."""
    for file in FILES:
        for node in ast.walk(parse(file)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only" in {keyword.arg for keyword in node.keywords}, file


def test_functions_fit_on_a_screen() -> None:
    for file in FILES:
        for node in ast.walk(parse(file)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 80, f"{file.name}: {node.name}"
