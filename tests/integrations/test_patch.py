"""The patch machinery, on a trainer made on the spot: every way of holding a function, refusals, exact restoring."""

import importlib
import itertools
import pickle
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ppo_fast
from ppo_fast.integrations import Integration, PatchError, Replacement, contract

# By its name in sys.modules: in the package, `patch` is the function.
machinery = sys.modules["ppo_fast.integrations.patch"]

SOURCE = {
    "toytrainer/__init__.py": "",
    "toytrainer/maths.py": """
        import torch
        from functools import wraps

        REGISTRY = {}

        def mean(x, mask, axis=None):
            return "their mean"

        def loss(x, *, mode="sum"):
            return "their loss"

        REGISTRY["plain"] = loss
        REGISTRY["also"] = loss

        def doubled(function):
            @wraps(function)
            def wrapper(*args):
                return 2 * function(*args)
            return wrapper

        @doubled
        def twice(x):
            return x

        @torch.compile
        def compiled(x):
            return x + 1

        class Loss(torch.nn.Module):
            def forward(self, x, weight=1.0):
                return x * weight

            @staticmethod
            def helper(x):
                return "their helper"

        class Base:
            def inherited(self, x):
                return "their method"

        class Child(Base):
            pass

        class Head(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, scale=1.0):
                return x * scale

            @staticmethod
            def backward(ctx, d):
                return d, None

        head = Head.apply
    """,
    "toytrainer/early.py": "from toytrainer.maths import Loss, mean, loss as renamed, head\n",
    "toytrainer/late.py": "from toytrainer.maths import mean, twice, head\n",
    "toytrainer/plugged.py": """
        import ppo_fast

        def mean(x, mask, axis=None):
            return "their mean"

        ppo_fast.patch("toytrainer")
    """,
    "toytrainer-1.4.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: toytrainer\nVersion: 1.4.2\n",
}


def mean(x: object, mask: object, axis: int | None = None) -> str:
    return "our mean"


def loss(x: object, *, mode: str = "sum") -> str:
    return "our loss"


def twice(x: int) -> int:
    return 20 * x


def compiled(x: torch.Tensor) -> torch.Tensor:
    return x + 10


def forward(self: torch.nn.Module, x: float, weight: float = 1.0) -> float:
    return 10 * x * weight


def helper(x: object) -> str:
    return "our helper"


def inherited(self: object, x: object) -> str:
    return "our method"


def head(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    return 10 * scale * x


REPLACEMENTS = (
    Replacement("toytrainer.maths:mean", mean, ops=("masked_mean",)),
    Replacement("toytrainer.maths:loss", loss, registries=("toytrainer.maths:REGISTRY",)),
    Replacement("toytrainer.maths:twice", twice),
    Replacement("toytrainer.maths:compiled", compiled),
    Replacement("toytrainer.maths:Loss.forward", forward),
    Replacement("toytrainer.maths:Loss.helper", helper),
    Replacement("toytrainer.maths:Child.inherited", inherited),
    Replacement("toytrainer.maths:head", head, signature_of="toytrainer.maths:Head.forward"),
    Replacement(
        "toytrainer.maths:Head.apply", head, signature_of="toytrainer.maths:Head.forward", static=True
    ),
)


@pytest.fixture
def toytrainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """An installed distribution of the name, and its integration; what was imported of it is forgotten afterwards."""
    for name, text in SOURCE.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    declare(monkeypatch, REPLACEMENTS)
    yield importlib.import_module("toytrainer.maths")
    ppo_fast.unpatch()
    for name in [name for name in sys.modules if name.split(".")[0] == "toytrainer"]:
        del sys.modules[name]


def declare(
    monkeypatch: pytest.MonkeyPatch,
    replacements: tuple[Replacement, ...],
    versions: tuple[str, ...] = ("1.3", "1.4"),
    distribution: str | None = "toytrainer",
) -> None:
    module = types.ModuleType("ppo_fast.integrations.toytrainer")
    module.INTEGRATIONS = (Integration("toytrainer", distribution, versions, replacements),)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(machinery, "TRAINERS", (*machinery.TRAINERS, "toytrainer"))


def state_of(*modules: types.ModuleType) -> list[object]:
    """What every name of the modules and of their classes holds, by identity."""
    names = {(m.__name__, name): id(value) for m in modules for name, value in vars(m).items()}
    classes = {
        (name, attribute): id(inner)
        for m in modules
        for name, value in vars(m).items()
        if isinstance(value, type)
        for attribute, inner in vars(value).items()
    }
    return [names, classes, [dict(m.REGISTRY) for m in modules if hasattr(m, "REGISTRY")]]


def test_every_way_of_holding_a_function_is_reached(toytrainer: types.ModuleType) -> None:
    early = importlib.import_module("toytrainer.early")
    layer = toytrainer.Loss()
    ppo_fast.patch("toytrainer")
    late = importlib.import_module("toytrainer.late")
    assert toytrainer.mean(0, 0) == early.mean(0, 0) == late.mean(0, 0) == "our mean"
    assert early.renamed(0) == toytrainer.REGISTRY["plain"](0) == toytrainer.REGISTRY["also"](0) == "our loss"
    assert late.twice(1) == 20
    assert layer(1.0, weight=2.0) == early.Loss()(2.0) == 20.0
    assert toytrainer.Loss.helper(0) == layer.helper(0) == "our helper"
    assert toytrainer.Child().inherited(0) == "our method"
    assert toytrainer.Base().inherited(0) == "their method"
    one = torch.ones(1)
    assert toytrainer.head(one) == early.head(one) == late.head(one) == toytrainer.Head.apply(one) == 10
    assert toytrainer.compiled(one) == 11


def test_unpatch_restores_every_name(toytrainer: types.ModuleType) -> None:
    early = importlib.import_module("toytrainer.early")
    before = state_of(toytrainer, early)
    ppo_fast.patch("toytrainer")
    late = importlib.import_module("toytrainer.late")
    late.kept_under_another_name = toytrainer.mean
    assert state_of(toytrainer, early) != before
    ppo_fast.unpatch("toytrainer")
    assert state_of(toytrainer, early) == before
    assert late.mean is late.kept_under_another_name is toytrainer.mean
    assert late.mean(0, 0) == "their mean"
    assert "inherited" not in vars(toytrainer.Child)
    assert isinstance(vars(toytrainer.Loss)["helper"], staticmethod)
    ppo_fast.unpatch("toytrainer")  # not patched: nothing to do


def test_patching_twice_changes_nothing(toytrainer: types.ModuleType) -> None:
    before = state_of(toytrainer)
    record = ppo_fast.patch("toytrainer", "toytrainer")
    patched = state_of(toytrainer)
    toytrainer.mean(0, 0)
    again = ppo_fast.patch("toytrainer")
    assert state_of(toytrainer) == patched
    assert again.calls == record.calls
    assert record.calls["toytrainer.maths.mean"] == 1
    ppo_fast.unpatch()
    assert state_of(toytrainer) == before


def test_a_trainer_that_patches_itself_when_imported(
    toytrainer: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As verl does by its plugins, in the middle of the call that imports it."""
    declare(monkeypatch, (Replacement("toytrainer.plugged:mean", mean),))
    ppo_fast.patch("toytrainer")
    plugged = sys.modules["toytrainer.plugged"]
    assert plugged.mean(0, 0) == "our mean"
    ppo_fast.unpatch()
    assert plugged.mean(0, 0) == "their mean"


def test_the_record_counts_calls_and_prints_as_a_table(toytrainer: types.ModuleType) -> None:
    record = ppo_fast.patch("toytrainer")
    toytrainer.mean(0, 0)
    toytrainer.REGISTRY["also"](0)
    toytrainer.loss(0, mode="x")
    toytrainer.Loss()(1.0)
    calls = {name.removeprefix("toytrainer.maths."): count for name, count in record.calls.items() if count}
    assert calls == {"mean": 1, "loss": 2, "Loss.forward": 1}
    header, first, *rest = str(record).splitlines()
    assert header.split() == ["name", "before", "after", "impl"]
    op = f"masked_mean ({ppo_fast.available_impls('masked_mean')[0]}"
    assert first.startswith("toytrainer.maths.mean")
    for cell in ("1.4.2, maths.py:7", op, f"{__name__}.mean"):
        assert cell in first
    assert len(rest) == len(REPLACEMENTS) - 1
    assert rest[0].endswith("torch")


def test_a_replacement_pickles_under_the_originals_name(toytrainer: types.ModuleType) -> None:
    """A worker that unpickles it finds what its own process has under that name."""
    ppo_fast.patch("toytrainer")
    sent = pickle.dumps(toytrainer.mean)
    assert pickle.loads(sent)(0, 0) == "our mean"
    ppo_fast.unpatch()
    assert pickle.loads(sent)(0, 0) == "their mean"


def test_a_compiled_caller_traces_through_without_recompiling(toytrainer: types.ModuleType) -> None:
    record = ppo_fast.patch("toytrainer")
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    caller = torch.compile(lambda x: toytrainer.compiled(x) * 2, backend=backend, fullgraph=True)
    for _ in range(3):
        assert caller(torch.ones(2)).tolist() == [22.0, 22.0]
    assert len(graphs) == 1
    assert record.calls["toytrainer.maths.compiled"] == 0  # inside of a compiled graph a call does not show


def test_a_later_replacement_by_someone_else_stays(toytrainer: types.ModuleType) -> None:
    ppo_fast.patch("toytrainer")
    toytrainer.mean = theirs = lambda x, mask, axis=None: "third"
    with pytest.warns(RuntimeWarning, match="toytrainer.maths.mean has been replaced .* it stays"):
        ppo_fast.unpatch("toytrainer")
    assert toytrainer.mean is theirs
    assert toytrainer.loss(0) == "their loss"


def other_default(x: object, mask: object, axis: int = 0) -> None: ...
def one_more(x: object, mask: object, axis: int | None = None, eps: float = 0.0) -> None: ...
def other_kind(x: object, mask: object, *, axis: int | None = None) -> None: ...
def other_name(x: object, where: object, axis: int | None = None) -> None: ...


@pytest.mark.parametrize("ours", [other_default, one_more, other_kind, other_name])
def test_another_signature_is_refused_as_a_whole(
    toytrainer: types.ModuleType, monkeypatch: pytest.MonkeyPatch, ours: object
) -> None:
    declare(
        monkeypatch, (Replacement("toytrainer.maths:loss", loss), Replacement("toytrainer.maths:mean", ours))
    )
    before = state_of(toytrainer)
    with pytest.raises(PatchError, match=r"maths:mean: its signature is \(x, mask, axis=None\), expected \("):
        ppo_fast.patch("toytrainer")
    assert state_of(toytrainer) == before
    assert toytrainer.loss(0) == "their loss"


def test_every_difference_is_named(toytrainer: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = (
        Replacement("toytrainer.maths:absent", mean),
        Replacement("toytrainer.nowhere:mean", mean),
        Replacement("toytrainer.maths:Loss.forward", mean),
        Replacement("toytrainer.maths:mean", mean, registries=("toytrainer.maths:REGISTRY",)),
    )
    declare(monkeypatch, wrong)
    with pytest.raises(PatchError) as error:
        ppo_fast.patch("toytrainer")
    message = str(error.value)
    assert message.startswith("patch: nothing was replaced, because")
    for reason in ("no attribute 'absent'", "No module named 'toytrainer.nowhere'", "(self, x, weight=1.0)"):
        assert reason in message
    assert "toytrainer.maths:REGISTRY does not hold it" in message


def test_an_unknown_version_is_refused(toytrainer: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, REPLACEMENTS, versions=("1.4.1", "1.42", "2"))
    before = state_of(toytrainer)
    with pytest.raises(PatchError, match="toytrainer is 1.4.2; .* made for are 1.4.1, 1.42, 2"):
        ppo_fast.patch("toytrainer")
    assert state_of(toytrainer) == before


def test_an_absent_trainer_is_refused(toytrainer: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, REPLACEMENTS, distribution="toytrainer-of-another-name")
    with pytest.raises(PatchError, match="toytrainer is not installed; .* made for are 1.3, 1.4"):
        ppo_fast.patch("toytrainer")


def test_a_source_tree_has_no_version_to_check(
    toytrainer: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare(monkeypatch, REPLACEMENTS, versions=(), distribution=None)
    assert "source, maths.py:7" in str(ppo_fast.patch("toytrainer"))


def test_one_refusal_leaves_the_other_trainers_alone(
    toytrainer: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = types.ModuleType("ppo_fast.integrations.othertrainer")
    other.INTEGRATIONS = (Integration("othertrainer", "othertrainer", ("1",), ()),)
    monkeypatch.setitem(sys.modules, other.__name__, other)
    monkeypatch.setattr(machinery, "TRAINERS", (*machinery.TRAINERS, "othertrainer"))
    before = state_of(toytrainer)
    with pytest.raises(PatchError, match="othertrainer is not installed"):
        ppo_fast.patch("toytrainer", "othertrainer")
    assert state_of(toytrainer) == before


def test_an_interrupt_leaves_nothing_replaced(
    toytrainer: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    early, rebind, calls = importlib.import_module("toytrainer.early"), machinery._rebind, itertools.count()

    def interrupted(old: object, new: object) -> list[str]:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return rebind(old, new)

    before = state_of(toytrainer, early)
    monkeypatch.setattr(machinery, "_rebind", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ppo_fast.patch("toytrainer", strict=False)
    assert state_of(toytrainer, early) == before
    assert contract.strict()
    ppo_fast.patch("toytrainer")
    assert early.mean(0, 0) == "our mean"


@pytest.mark.parametrize("names", [("nonesuch",), ()])
def test_a_name_that_is_no_trainer(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"patch: `trainers` has .*, expected some of .*verl"):
        ppo_fast.patch(*names)
    if names:
        with pytest.raises(ValueError, match="unpatch: `trainers` has 'nonesuch'"):
            ppo_fast.unpatch(*names)


def test_the_integrations_import_without_the_trainers() -> None:
    """The functions are public one by one, also where no trainer is installed."""
    code = """
import importlib, sys
from ppo_fast.integrations import patch
names = sys.modules["ppo_fast.integrations.patch"].TRAINERS
for name in names:
    importlib.import_module(f"ppo_fast.integrations.{name}")
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"verl", "openrlhf", "trl", "trlx", "dschat", "ray", "transformers", "triton"}, loaded
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)
