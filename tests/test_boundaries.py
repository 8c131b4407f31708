"""Who may import whom, what `import ppo_fast` may load, how long a function and a file may grow."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each room and the rooms of ppo_fast it may import from, besides itself. Imports run one way:
# kernels <- ops <- ppo <- cli; the reference and the kernels know nothing of each other.
MAY_IMPORT = {
    "kernels": set(),
    "records": set(),
    "build": set(),
    "reference": {"records"},
    "ops": {"kernels", "reference", "records", "build"},
    "prepare": {"ops", "records", "reference"},
    "report": {"records"},
    "ppo": {"ops", "prepare", "records", "reference", "report"},
    "demo": {"prepare", "ppo"},
    "integrations": {"ops", "records", "reference"},
    "doctor": {"build", "ops", "reference"},
    "cli": {"build", "demo", "doctor", "ppo", "prepare", "report"},
}
PUBLIC_NAMES = {"__init__", "ppo_fast"}  # the package itself, which re-exports; any room above ops may use it
ABOVE_OPS = {"prepare", "ppo", "demo", "integrations", "cli"}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


def imported_rooms(tree: ast.AST) -> Iterator[str]:
    """The rooms of ppo_fast that a module imports from, at its top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "ppo_fast":
                room = rest.split(".")[0]
                yield room if room in MAY_IMPORT else "ppo_fast"


@pytest.mark.parametrize("path", sources("ppo_fast", "kernels"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    assert room in MAY_IMPORT, f"{room} is a new room: say here what it may import"
    allowed = MAY_IMPORT[room] | {room} | ({"ppo_fast"} if room in ABOVE_OPS else set())
    assert set(imported_rooms(ast.parse(path.read_text()))) <= allowed


def test_no_folder_is_imported_as_kernels() -> None:
    for path in sources("ppo_fast", "kernels", "tests", "bench"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "kernels"], path


COLD = """
import json, sys
import torch
before = set(sys.modules)
import ppo_fast
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""


def test_import_needs_torch_alone() -> None:
    """Beyond what torch itself loads, `import ppo_fast` may load the standard library and nothing more."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COLD],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONSAFEPATH": "1"},
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert {name for name in loaded if name not in sys.stdlib_module_names and not name.startswith("__")} == {
        "ppo_fast"
    }


def test_reference_runs_without_triton_and_the_extension(tmp_path: Path) -> None:
    """With both blocked, the reference runs and a backend asked for by name says what is missing."""
    code = """
import sys
sys.modules["triton"] = None
sys.modules["ppo_fast._C"] = None
import torch, ppo_fast
logits, labels = torch.zeros(1, 2), torch.tensor([0])
assert abs(ppo_fast.logprobs_from_logits(logits, labels).item() + 0.6931472) < 1e-6
try:
    ppo_fast.logprobs_from_logits(logits, labels, impl="cpu")
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "the native extension is not built" in done.stdout


def test_deepspeed_is_imported_where_an_engine_is_made() -> None:
    """A run without engines needs none: every import of it stands within a function."""
    for path in sources("ppo_fast", "kernels"):
        tree = ast.parse(path.read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {
            node: {alias.name for alias in node.names} | {str(getattr(node, "module", ""))}
            for node in imports
        }
        ours = [node for node in imports if any(name.split(".")[0] == "deepspeed" for name in names[node])]
        assert not set(map(id, ours)) & set(map(id, tree.body)), path


def test_native_code_sees_no_torch() -> None:
    for path in (ROOT / "csrc").rglob("*.[ch]*"):
        assert not re.search(r'#\s*include\s*[<"](torch|ATen|c10)/', path.read_text()), path


def lines_of(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring: formula, shapes and errors may take what they need."""
    first, last = function.lineno, function.end_lineno or function.lineno
    documented = ast.get_docstring(function) is not None
    docstring = function.body[0]
    return last - first + 1 - (documented and (docstring.end_lineno or 0) - docstring.lineno + 1)


@pytest.mark.parametrize("path", sources("ppo_fast", "kernels"), ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            # A Triton kernel names every pointer and stride on a line of its own.
            decorators = map(ast.unparse, node.decorator_list)
            most = 110 if any(name.startswith("triton.jit") for name in decorators) else 80
            assert lines_of(node) <= most, f"{node.name} has {lines_of(node)} lines"


def test_no_blanket_except() -> None:
    for path in sources("ppo_fast", "kernels"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type is not None else "everything"
                assert caught not in ("everything", "Exception", "BaseException"), f"{path}:{node.lineno}"
