"""What `pip install .` installs, and that no name of ours shadows another package. In fresh processes."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ppo_fast import build

ROOT = Path(__file__).resolve().parents[1]
STRANGER = (
    "0.0.1"  # a distribution named `kernels`, as PyPI has one; its version is older than transformers takes
)


def fresh(code: str, cwd: Path, *path: Path) -> str:
    """Run `code` in a new interpreter that has `path` on PYTHONPATH and keeps the working folder off sys.path."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")
    }
    environment |= {
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(map(str, path)),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=cwd, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(f'__version__ = "{STRANGER}"\n')
    info = site / f"kernels-{STRANGER}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {STRANGER}\n")
    return site


FIND = """
import importlib.util
def find():
    spec = importlib.util.find_spec("kernels")
    return spec and spec.origin
before = find()
import ppo_fast, ppo_fast.kernels
assert ppo_fast.kernels.__file__.endswith("__init__.py"), ppo_fast.kernels
assert find() == before
print(before)
"""


@pytest.mark.parametrize("at_root", [True, False], ids=["from the root", "from elsewhere"])
@pytest.mark.parametrize("installed", [True, False], ids=["with a package kernels", "without"])
def test_kernels_is_never_ours(at_root: bool, installed: bool, tmp_path: Path, stranger: Path) -> None:
    found = fresh(FIND, ROOT if at_root else tmp_path, *([stranger] if installed else []))
    if installed:
        assert found == str(stranger / "kernels" / "__init__.py")
    else:
        assert str(ROOT / "kernels") not in found
        assert "ppo_fast" not in found


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("at_root", [True, False], ids=["from the root", "from elsewhere"])
@pytest.mark.parametrize("installed", [True, False], ids=["with a package kernels", "without"])
def test_transformers_works_beside_us(at_root: bool, installed: bool, tmp_path: Path, stranger: Path) -> None:
    code = "import ppo_fast.kernels; from transformers import AutoModelForCausalLM, LlamaForCausalLM"
    fresh(code, ROOT if at_root else tmp_path, *([stranger] if installed else []))


def test_the_suite_itself_cannot_import_the_folder() -> None:
    assert str(ROOT) not in [str(Path(entry or ".").resolve()) for entry in sys.path]
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not spec.origin.startswith(str(ROOT))


def test_kernels_init_is_a_docstring_only() -> None:
    """An import there would run for whoever only looks the package up."""
    import ast

    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert [type(node) for node in body] == [ast.Expr]


SOURCES = """
import runpy, setuptools
setuptools.setup = lambda ext_modules, **_: print(*ext_modules[0].sources)
made = runpy.run_path("setup.py")["CUDA"]
print(made if isinstance(made, str) else made.name)
"""


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"PPO_FAST_CUDA": "0"}, "PPO_FAST_CUDA=0"),
        ({"PATH": "/nowhere", "CUDA_HOME": "/nowhere"}, "no nvcc on PATH or in CUDA_HOME"),
    ],
)
def test_a_build_without_nvcc_leaves_the_cuda_kernels_out(
    variables: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    sources, said = fresh(SOURCES, ROOT).splitlines()
    assert said == reason
    assert "csrc/bindings.cpp" in sources
    assert "cuda" not in sources


def test_a_compiler_of_a_few_targets_and_its_runtime_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link to an older nvcc, as /usr/local/bin may hold: its runtime lies beside what it calls its own folder."""
    toolkit = tmp_path / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "lib64").mkdir()
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\ncase $1 in\n--version) echo 'Cuda compilation tools, release 12.4, V12.4.99' ;;\n"
        f"--list-gpu-code) echo sm_80 sm_90 ;;\n--dryrun) echo '#$ TOP={toolkit}/bin/..' >&2 ;;\nesac\n"
    )
    nvcc.chmod(0o755)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "nvcc").symlink_to(nvcc)
    monkeypatch.setenv("PATH", f"{tmp_path / 'links'}:/usr/bin:/bin")
    found = SOURCES.replace("made.name", "made.targets")
    assert "libcudart_static.a" in fresh(found, ROOT).splitlines()[1]
    (toolkit / "lib64" / "libcudart_static.a").touch()
    sources, targets = fresh(found, ROOT).splitlines()
    assert targets == "['sm_80', 'sm_90a']"
    assert "csrc/cuda/logits_cluster.cu" in sources


WITHOUT_TORCH = """
import array, importlib.util, sys
spec = importlib.util.spec_from_file_location("ppo_fast._C", sys.argv[1])
C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(C)
logits, labels, temperature = array.array("f", [1.0, 1.0]), array.array("q", [0]), array.array("d", [1.0])
logprobs, stats = array.array("f", [0.0]), array.array("d", [0.0] * 3)
at = lambda x: x.buffer_info()[0]
grid = C.RowGrid(logits=at(logits), dtype=0, rows=1, vocab=2, inner_rows=1, outer_stride=2, inner_stride=2,
                 labels=at(labels), temperature=at(temperature), temperature_stride=0)
C.logprob_forward(grid, logprobs=at(logprobs), entropy=0, stats=at(stats), threads=2, isa=C.supported_isas()[0])
assert "torch" not in sys.modules
assert "libtorch" not in open("/proc/self/maps").read()
print(logprobs[0])
"""


@pytest.mark.skipif(build.MISSING_REASON is not None, reason="the native extension is not built")
def test_the_extension_needs_nothing_of_torch(tmp_path: Path) -> None:
    """So one wheel serves every version of it: here it loads and computes log(1/2) without any."""
    code = WITHOUT_TORCH.replace("sys.argv[1]", repr(build.extension().__file__))
    assert float(fresh(code, tmp_path)) == pytest.approx(-0.6931472, abs=1e-7)


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Build the wheel from a copy of the sources, with a `torch` on the path that raises when imported."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    leave_out = shutil.ignore_patterns("*.so", "__pycache__", "build")
    for name in ("ppo_fast", "kernels", "csrc", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=leave_out)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    (folder / "poison").mkdir()
    (folder / "poison" / "torch.py").write_text("raise ImportError('the build must not need torch')\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(source),
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(folder / "poison"), "PYTHONSAFEPATH": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_wheel_holds_the_package(wheel_files: list[str]) -> None:
    kernels = [f"ppo_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")]
    modules = [str(path.relative_to(ROOT)) for path in (ROOT / "ppo_fast").rglob("*.py")]
    assert set(kernels + modules + ["ppo_fast/py.typed"]) <= set(wheel_files)
    assert any(name.startswith("ppo_fast/_C.") and name.endswith(".so") for name in wheel_files)


def test_wheel_holds_nothing_else(wheel_files: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ppo_fast"}
    assert not [name for name in wheel_files if name.endswith((".cpp", ".h", ".cu", ".cuh"))]
