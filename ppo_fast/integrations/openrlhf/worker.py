"""For Ray's runtime environment: its `worker_process_setup_hook` runs in every worker before anything else does."""

from ppo_fast.integrations.patch import patch


def patch_worker() -> None:
    """Patch OpenRLHF in this process; a refusal stops the worker with its reason."""
    patch("openrlhf")
