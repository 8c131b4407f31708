"""Every kernel compiles, without a GPU, for every GPU that it is written for, and spills no register."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own, since this one holds Triton's interpreter. Prints {"<kernel> <target> <dtype>": spilled}.
COMPILE = r"""
import json, os, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ppo_fast.kernels import launch, logprob

TARGETS = [GPUTarget("cuda", sm, 32) for sm in (80, 90, 100)] + [GPUTarget("hip", "gfx942", 64)]
TYPES = {"labels_ptr": "*i64", "temperature_stride": "i32", "vocab": "i32", "inner_rows": "i32",
         "outer_stride": "i64", "inner_stride": "i32", "BLOCK": "constexpr"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

def spilled(asm):
    if "amdgcn" in asm:
        counts = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", asm["amdgcn"])
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"])
            file.flush()
            usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
        counts = re.findall(r"(?:STACK|LOCAL):(\d+)", usage.stdout)
    assert len(counts) == 2, counts
    return sum(map(int, counts))

report = {}
for kernel in (logprob.logprob_forward_kernel, logprob.logprob_backward_kernel):
    for dtype in ("bf16", "fp32"):
        logits = {"logits_ptr": f"*{dtype}", "grad_logits_ptr": f"*{dtype}"}
        signature = {name: {**TYPES, **logits}.get(name, "*fp32") for name in kernel.arg_names}
        options = launch.row_options(151936)
        source = ASTSource(fn=kernel, signature=signature, constexprs={"BLOCK": options.pop("BLOCK")})
        for target in TARGETS:
            compiled = triton.compile(source, target=target, options=options)
            report[f"{kernel.__name__} {target.arch} {dtype}"] = spilled(compiled.asm)
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def spills(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    cache = tmp_path_factory.mktemp("triton")
    script = cache / "compile_all.py"  # a file, since Triton reads its kernels' source
    script.write_text(COMPILE)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(cache),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_target_compiles(spills: dict[str, int]) -> None:
    assert len(spills) == 2 * 2 * 4  # kernels, dtypes, targets


def test_nothing_spills(spills: dict[str, int]) -> None:
    assert {name: bytes_ for name, bytes_ in spills.items() if bytes_} == {}
