"""verl 0.9.1."""

from ppo_fast.integrations.patch import Integration

INTEGRATIONS: tuple[Integration, ...] = ()
