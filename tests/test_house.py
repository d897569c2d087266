"""The rules of the house: who may import whom, what may be imported at start-up, how long a file may grow."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"surgery", "surgery.errors", "surgery.registry", "surgery.formula", "surgery.checkpoint", "surgery.anatomy"},
    {"surgery.models", "surgery.zoo", "surgery.tasks", "surgery.interop", "surgery.decoding"},
    {"surgery.weights", "surgery.activations", "surgery.logits"},
    {"surgery.tuning"},
    {"surgery.training"},
    {"surgery.sae"},
    {"analysis"},
    {"surgery.cli"},
]
"""From the ground up: a file imports only from its own part and from floors below. Spaces don't import each other."""
LAZY = {"transformers", "matplotlib", "pandas", "huggingface_hub", "peft", "optuna", "datasets"}
"""Never imported at module level in `surgery`."""
TORCH_FREE = ["surgery.errors", "surgery.registry", "surgery.formula", "surgery.anatomy", "surgery.checkpoint",
              "surgery.weights.recipe", "surgery.weights.plan", "surgery.cli", "surgery.zoo"]  # fmt: skip
FILES = sorted([*(ROOT / "surgery").rglob("*.py"), *(ROOT / "analysis").rglob("*.py")])


def module_of(path: Path) -> str:
    """`surgery/weights/merge.py` is surgery.weights.merge."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The part of the house a module belongs to: surgery.weights, surgery.errors, analysis."""
    names = module.split(".")
    return "analysis" if names[0] == "analysis" else ".".join(names[:2])


def floor_of(part: str) -> int:
    """The floor of a part; a part that no floor names fails the test that asks."""
    return next(i for i, floor in enumerate(FLOORS) if part in floor)


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Modules that a file imports: everywhere, or at the top level only (type checking aside)."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree)
    if top_level:
        nodes = iter([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)])
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module in ("surgery", "analysis") else {str(node.module)}
    return found


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_come_from_floors_below(path):
    mine = part_of(module_of(path))
    for name in imports(path):
        if name.split(".")[0] not in ("surgery", "analysis") or name == "surgery.__version__":
            continue
        other = part_of(name)
        if other != mine:
            assert (
                mine == "surgery"
                or other == "surgery"
                or floor_of(other) < floor_of(mine)
                or (floor_of(mine) == floor_of(other) < 2)
            ), f"{module_of(path)} imports {name}"


@pytest.mark.parametrize("path", [p for p in FILES if "surgery" in p.parts], ids=module_of)
def test_surgery_never_imports_analysis_but_for_the_command_line(path):
    if part_of(module_of(path)) != "surgery.cli":
        assert not [n for n in imports(path) if n.split(".")[0] == "analysis"]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_heavy_libraries_are_imported_where_they_are_used(path):
    if module_of(path).startswith("surgery"):
        assert not {n.split(".")[0] for n in imports(path, top_level=True)} & LAZY


def test_torch_free_modules_import_without_torch():
    code = "import sys; " + "; ".join(f"import {m}" for m in TORCH_FREE)
    code += "; sys.exit(', '.join({'torch', 'transformers', 'matplotlib', 'pandas'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_can_be_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 420


def test_every_test_file_has_a_name_of_its_own():
    """Folders of tests are no packages: two files of one name can't be collected together."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert sorted(names) == sorted(set(names))


def test_no_cycles_between_modules():
    graph = {module_of(p): imports(p, top_level=True) for p in FILES}
    names = set(graph)
    graph = {m: {n for n in found if n in names and n != m} for m, found in graph.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in graph[module]:
                if other not in ("surgery", "analysis") and not module.startswith(other + "."):
                    visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())
