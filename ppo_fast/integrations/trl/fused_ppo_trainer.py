"""TRL 1.12's PPO trainer on fused ops, for those who would rather name a class than patch one."""

from trl.experimental.ppo import PPOTrainer

from ppo_fast.integrations.trl import ppo_training


class FusedPPOTrainer(PPOTrainer):
    """`trl.experimental.ppo.PPOTrainer` of TRL 1.12 with the same arguments, whose `train` uses the fused ops."""

    train = ppo_training.train
