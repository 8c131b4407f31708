"""OpenRLHF 0.11.2."""

from ppo_fast.integrations.patch import Integration

INTEGRATIONS: tuple[Integration, ...] = ()
