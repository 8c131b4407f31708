"""Public ops: checks, docstring, and the choice of who computes; the formulas are in `ppo_fast.reference`."""
