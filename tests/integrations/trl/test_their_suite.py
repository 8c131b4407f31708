"""TRL's own tests of its ops, with ours in their place, and a count of how often ours were called.

Neither its wheel nor its source distribution has the tests. They run from a checkout of the version's tag:

    git clone --branch v1.12.0 https://github.com/huggingface/trl trl-1.12.0
    make integration TRL_1_12=trl-1.12.0 TRL_1_16=trl-1.16.0
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACKAGES = Path(sys.prefix)
# One test looks into TRL's implementation: it counts the calls that TRL makes of torch.mm, at a tile size of TRL's.
SUITES = {
    "1.12.0": ("tests/test_utils.py", "SelectiveLogSoftmax or EntropyFromLogits"),
    "1.16.0": ("tests/test_kernels.py", "not (TestChunkedLogProbFunction and test_forward)"),
}


@pytest.mark.parametrize("version", SUITES)
def test_their_suite(version: str) -> None:
    variable = f"TRL_{version[:4].replace('.', '_')}"
    if not os.environ.get(variable):
        pytest.skip(
            f"TRL's tests are not on PyPI: `make integration {variable}=<checkout of v{version}>` runs them"
        )
    checkout, packages = Path(os.environ[variable]).resolve(), PACKAGES / f"trl-{version}"
    file, chosen = SUITES[version]
    path = [str(HERE / "inside"), str(packages), str(PACKAGES / "datasets"), os.environ.get("PYTHONPATH", "")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "patched",
        "-p",
        "no:cacheprovider",
        file,
        "-k",
        chosen,
    ]
    done = subprocess.run(
        command,
        cwd=checkout,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed, calls = (int(re.search(p, done.stdout)[1]) for p in (r"(\d+) passed", r"calls of our ops: (\d+)"))
    print(f"TRL {version}: {passed} passed, {calls} calls")
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout[-2000:]
    assert passed >= 30
    assert calls >= 30
