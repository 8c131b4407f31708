"""What PPO needs before it starts: supervised fine-tuning, a reward model, and the reading of data files."""
