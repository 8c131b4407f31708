"""Patched without a line of code in the trainer: verl by its plugins, OpenRLHF by Ray's hook, in workers too."""

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from .conftest import required

HERE = Path(__file__).parent
IN_VERL = """
import sys
sys.path.insert(0, sys.argv[1])
from stand_ins import VERL, stand_ins
{before}
with stand_ins(**VERL):
    import verl
    from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn
    from verl.workers.utils.losses import agg_loss as again
assert again is agg_loss
print("ours" if hasattr(agg_loss, "__wrapped__") else "theirs", get_policy_loss_fn("vanilla").__code__.co_filename)
"""
IN_RAY = """
import os, sys
import ray

sys.path.insert(0, sys.argv[1])

def hook():
    import sys
    sys.path.insert(0, {here!r})
    from stand_ins import OPENRLHF, stand_ins
    from ppo_fast.integrations.openrlhf import patch_worker
    with stand_ins(**OPENRLHF):
        patch_worker()

@ray.remote
class Worker:
    def module_of(self, module, name):
        import importlib
        function = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        return getattr(function, "__wrapped__", function).__module__

asked = {{
    "verl": ("verl.workers.utils.losses", "agg_loss"),
    "openrlhf": ("openrlhf.trainer.ppo_utils.experience_maker", "compute_approx_kl"),
}}[sys.argv[2]]
environment = {{
    "verl": {{"env_vars": {{"PPO_FAST_PATCH": "verl"}}}},
    "openrlhf": {{"worker_process_setup_hook": hook}},
}}[sys.argv[2]]
ray.init(num_cpus=1, include_dashboard=False, runtime_env=environment)
print(ray.get(Worker.remote().module_of.remote(*asked)))
"""


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PPO_FAST_PATCH"}
    return subprocess.run(
        [sys.executable, "-P", "-c", code, str(HERE), *arguments],
        capture_output=True,
        text=True,
        env=inherited | environment,
        timeout=300,
    )


def test_the_entry_point_is_there() -> None:
    assert [point.value for point in entry_points(group="verl.plugins", name="ppo_fast")] == [
        "ppo_fast.integrations.verl.plugin"
    ]


@pytest.mark.parametrize("setting", ["verl", "trl, verl", None, "openrlhf"])
def test_one_setting_patches_verl_where_it_is_imported(setting: str | None) -> None:
    required("verl")
    done = python(IN_VERL.format(before=""), **({} if setting is None else {"PPO_FAST_PATCH": setting}))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == ("ours" if setting and "verl" in setting else "theirs")


def test_a_refusal_is_an_error_in_the_log_and_verl_goes_on(tmp_path: Path) -> None:
    """verl swallows what a plugin raises."""
    required("verl")
    before = """
import importlib.metadata
version = importlib.metadata.version
importlib.metadata.version = lambda name: "0.10.0" if name == "verl" else version(name)
"""
    done = python(IN_VERL.format(before=before), PPO_FAST_PATCH="verl")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "theirs"
    assert "verl is 0.10.0; the versions that it is made for are 0.9.1" in done.stderr


@pytest.mark.parametrize("trainer", ["verl", "openrlhf"])
def test_ray_workers_are_patched(trainer: str) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: `make integration` brings it")
    required(trainer)
    done = python(IN_RAY.format(here=str(HERE)), trainer)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1].startswith(f"ppo_fast.integrations.{trainer}")
