"""The entry point `verl.plugins`: verl imports this in every process, Ray's workers included, when it is imported.

It patches verl there if PPO_FAST_PATCH names it: `PPO_FAST_PATCH=verl`, or with other trainers after commas.
verl swallows what a plugin raises, so a refusal is logged as an error and verl goes on with its own functions.
"""

import logging
import os

from ppo_fast.integrations.patch import PatchError, patch

if "verl" in os.environ.get("PPO_FAST_PATCH", "").replace(" ", "").split(","):
    try:
        patch("verl")
    except PatchError as error:
        logging.getLogger("ppo_fast").error("PPO_FAST_PATCH: %s", error)
        raise
