"""Triton kernels and their launchers, installed as `ppo_fast.kernels`; the autograd lives in `ppo_fast.ops`."""
