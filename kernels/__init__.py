"""Triton kernels with their launchers, installed as `ppo_fast.kernels`: a jit kernel, then its launcher, no autograd."""
