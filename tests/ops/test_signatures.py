"""Every op exists three times under one name: public, oracle, and in the table of names."""

import inspect

import ppo_fast
from ppo_fast import reference
from ppo_fast.ops.dispatch import Impl


def test_the_examples_cover_every_op(calls) -> None:
    assert sorted(calls.examples()) == sorted(reference.__all__)


def test_public_signature_is_the_oracles_with_impl_last(op: str) -> None:
    public = list(inspect.signature(getattr(ppo_fast, op)).parameters.values())
    oracle = list(inspect.signature(getattr(reference, op)).parameters.values())
    assert public[:-1] == oracle
    impl = public[-1]
    assert (impl.name, impl.default, impl.kind) == ("impl", "auto", inspect.Parameter.KEYWORD_ONLY)
    assert impl.annotation == Impl


def test_public_docstrings_say_what_an_op_takes_gives_and_raises(op: str) -> None:
    public, oracle = inspect.getdoc(getattr(ppo_fast, op)), inspect.getdoc(getattr(reference, op))
    assert public is not None
    assert oracle is not None
    for part in ("Args:", "Returns:", "Raises:", "Source:", "impl:"):
        assert part in public, part
    for name in list(inspect.signature(getattr(ppo_fast, op)).parameters):
        assert name in public, name
    for part in ("Args:", "Returns:", "Source:"):
        assert part in oracle, part


def test_all_lists_what_is_there() -> None:
    assert ppo_fast.__all__ == sorted(ppo_fast.__all__)
    assert all(hasattr(ppo_fast, name) for name in ppo_fast.__all__)
    assert set(reference.__all__) <= set(ppo_fast.__all__)
    assert ppo_fast.__version__.count(".") == 2
