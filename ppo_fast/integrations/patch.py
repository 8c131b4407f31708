"""Put our functions in the place of a trainer's, everywhere it holds them, and take them out again.

Everything is checked before anything is replaced. A function is known by identity: every module, and every registry
that was declared, that holds the original gets ours, under whatever name it has there.
"""

import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ppo_fast.integrations.contract import set_strict
from ppo_fast.ops.dispatch import available_impls

TRAINERS = ("deepspeed_chat", "openrlhf", "trl", "trlx", "verl")


class PatchError(RuntimeError):
    """The installed trainer is not what the replacements were made for; nothing has been replaced."""


@dataclass(frozen=True)
class Replacement:
    """One name of a trainer and the function of ours that takes its place.

    Attributes:
        path: "package.module:name", or "package.module:Class.method".
        ours: a function with the original's parameters: names, kinds and defaults.
        ops: the public ops of ppo_fast that it runs; empty for plain torch.
        signature_of: the path whose signature is compared, where that of `path` says nothing (`apply` of an
            autograd.Function has its parameters at `forward`, after `ctx`).
        registries: "package.module:DICT" each; an entry that holds the original gets ours.
        static: ours goes on the class without `self`.
    """

    path: str
    ours: Callable[..., Any]
    ops: tuple[str, ...] = ()
    signature_of: str | None = None
    registries: tuple[str, ...] = ()
    static: bool = False


@dataclass(frozen=True)
class Integration:
    """The replacements for some versions of a trainer.

    Attributes:
        trainer: the name that `patch` takes.
        distribution: the installed distribution whose version counts, or None for a source tree.
        versions: those that are known, each whole or its first numbers ("1.16").
        replacements: what is replaced, all or nothing.
    """

    trainer: str
    distribution: str | None
    versions: tuple[str, ...]
    replacements: tuple[Replacement, ...]

    def knows(self, version: str) -> bool:
        """Whether `version` is one of `versions`, or starts with one."""
        numbers = version.split("+")[0]
        return any(numbers == known or numbers.startswith(f"{known}.") for known in self.versions)


@dataclass
class Replaced:
    """One replacement in force."""

    name: str
    before: str
    after: str
    impl: str
    calls: int = 0
    places: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Patch:
    """What `patch` replaced; prints as a table."""

    replaced: tuple[Replaced, ...]

    @property
    def calls(self) -> dict[str, int]:
        """How often each replacement has been called since the patch; calls inside a compiled graph do not show."""
        return {one.name: one.calls for one in self.replaced}

    def __str__(self) -> str:
        rows = [("name", "before", "after", "impl")]
        rows += [(one.name, one.before, one.after, one.impl) for one in self.replaced]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)


@dataclass(frozen=True)
class _Site:
    """A verified replacement: where the original is defined, what it is, and the declaration."""

    declared: Replacement
    owner: Any  # the module or class that defines the name
    attribute: str
    original: Any  # as getattr gives it
    raw: Any  # as the owner's __dict__ holds it: for a method maybe a staticmethod; _INHERITED where it holds none
    version: str


_INHERITED = object()


@dataclass(frozen=True)
class _InForce:
    site: _Site
    stand_in: Any
    record: Replaced


_patched: dict[str, list[_InForce]] = {}


def patch(*trainers: str, strict: bool = True) -> Patch:
    """Replace the ops of installed trainers by the fused ones, everywhere they are held.

    Modules that were imported before have their from-imported names rebound; modules that are imported later find
    ours. The modules that define the originals are imported by this call. Patching a trainer a second time changes
    nothing and returns the same counters.

    Args:
        trainers: one or more of deepspeed_chat, openrlhf, trl, trlx, verl.
        strict: give NaN wherever the original does; False gives the better answer of our ops in the cases that
            README.md of this folder lists, of every trainer that is patched, and saves looking for them.

    Returns:
        A record that prints as a table of name, before, after and impl; `calls` counts the calls of each.

    Raises:
        ValueError: a name is not one of the trainers.
        PatchError: a trainer is not installed, its version is not known, or the signature of an original is not the
            one that our function has; names every such difference, and nothing is replaced.
    """
    unknown = [name for name in trainers if name not in TRAINERS]
    if unknown or not trainers:
        got = ", ".join(map(repr, unknown)) or "no name"
        raise ValueError(f"patch: `trainers` has {got}, expected some of {', '.join(TRAINERS)}")
    problems: list[str] = []
    sites = {
        name: list(_verified(name, problems)) for name in dict.fromkeys(trainers) if name not in _patched
    }
    if problems:
        raise PatchError("patch: nothing was replaced, because\n  " + "\n  ".join(problems))
    # Importing a trainer can patch it: verl loads our plugin.
    _apply_all({name: found for name, found in sites.items() if name not in _patched})
    set_strict(strict)
    return Patch(tuple(one.record for name in dict.fromkeys(trainers) for one in _patched[name]))


def unpatch(*trainers: str) -> None:
    """Give every name that `patch` replaced its original back, in modules imported since then too.

    Args:
        trainers: which ones; none means all that are patched. One that is not patched is left as it is.

    Warns:
        RuntimeWarning: someone else has replaced a name after us; theirs stays.
    """
    unknown = [name for name in trainers if name not in TRAINERS]
    if unknown:
        got = ", ".join(map(repr, unknown))
        raise ValueError(f"unpatch: `trainers` has {got}, expected some of {', '.join(TRAINERS)}")
    for name in trainers or tuple(_patched):
        for one in reversed(_patched.pop(name, [])):
            _restore(one)
    if not _patched:
        set_strict(True)


def _verified(trainer: str, problems: list[str]) -> Iterator[_Site]:
    """Resolve every replacement for the installed version; what does not fit is added to `problems`."""
    family = importlib.import_module(f"ppo_fast.integrations.{trainer}").INTEGRATIONS
    integration, version = _for_installed(trainer, family, problems)
    if integration is None:
        return
    for declared in integration.replacements:
        try:
            yield _site(declared, version)
        except (ImportError, AttributeError, TypeError) as error:
            problems.append(f"{trainer} {version}: {declared.path}: {error}")


def _for_installed(
    trainer: str, family: Iterable[Integration], problems: list[str]
) -> tuple[Integration | None, str]:
    found = "not installed"
    for integration in family:
        if integration.distribution is None:
            return integration, "source"
        try:
            found = metadata.version(integration.distribution)
        except metadata.PackageNotFoundError:
            continue
        if integration.knows(found):
            return integration, found
    known = ", ".join(version for integration in family for version in integration.versions)
    problems.append(f"{trainer} is {found}; the versions that it is made for are {known}")
    return None, found


def _site(declared: Replacement, version: str) -> _Site:
    owner, attribute = _owner(declared.path)
    original = getattr(owner, attribute)
    expected, got = _signature(declared.ours), _signature(_resolved(declared.signature_of or declared.path))
    if expected != got:
        raise TypeError(f"its signature is {_shown(got)}, expected {_shown(expected)}")
    for path in declared.registries:
        if not any(value is original for value in _resolved(path).values()):
            raise TypeError(f"{path} does not hold it")
    return _Site(declared, owner, attribute, original, vars(owner).get(attribute, _INHERITED), version)


def _owner(path: str) -> tuple[Any, str]:
    """The module or class that has the last name of `path`, and that name."""
    module, _, names = path.partition(":")
    *outer, last = names.split(".")
    return functools.reduce(getattr, outer, importlib.import_module(module)), last


def _resolved(path: str) -> Any:
    return getattr(*_owner(path))


def _signature(function: Any) -> list[inspect.Parameter]:
    """Parameters without annotations, and without the `ctx` of an autograd.Function."""
    parameters = inspect.signature(function).parameters.values()
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    return bare[1:] if bare and bare[0].name == "ctx" else bare


def _shown(parameters: list[inspect.Parameter]) -> str:
    return str(inspect.Signature(parameters))


def _apply_all(sites: dict[str, list[_Site]]) -> None:
    """All of them, or after an error or an interrupt none."""
    whole = False
    try:
        for name, found in sites.items():
            _patched[name] = []
            for site in found:
                _patched[name].append(_stand_in(site))
                _apply(_patched[name][-1])
        whole = True
    finally:
        if not whole:
            unpatch(*sites)


def _stand_in(site: _Site) -> _InForce:
    record = Replaced(
        name=site.declared.path.replace(":", "."),
        before=f"{site.version}, {_place(site.original)}",
        after=f"{site.declared.ours.__module__}.{site.declared.ours.__qualname__}",
        impl=_impl(site.declared.ops),
    )
    return _InForce(site, _counting(site, record), record)


def _apply(one: _InForce) -> None:
    site, stand_in, record = one.site, one.stand_in, one.record
    static = site.declared.static or isinstance(site.raw, staticmethod)
    setattr(site.owner, site.attribute, staticmethod(stand_in) if static else stand_in)
    for path in site.declared.registries:
        registry = _resolved(path)
        for key in [key for key, value in registry.items() if value is site.original]:
            registry[key] = stand_in
            record.places.append(f"{path}[{key!r}]")
    record.places += _rebind(site.original, stand_in)


def _counting(site: _Site, record: Replaced) -> Callable[..., Any]:
    """Ours with a counter, under the original's name: so it pickles by reference, and a worker finds its own."""
    ours = site.declared.ours

    @functools.wraps(ours)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        # A counter that a compiled graph guards on would have it compiled anew at every call.
        if not torch.compiler.is_compiling():
            record.calls += 1
        return ours(*args, **kwargs)

    # Not by functools.wraps: a compiled original carries marks that would have the compiler run it instead.
    module, _, name = site.declared.path.partition(":")
    stand_in.__module__, stand_in.__qualname__ = module, name
    stand_in.__name__ = site.attribute
    return stand_in


def _rebind(old: Any, new: Any) -> list[str]:
    """Every module global that is `old` becomes `new`; returns their names."""
    places = []
    for module_name, module in list(sys.modules.items()):
        held = getattr(module, "__dict__", {})
        for name in [name for name, value in list(held.items()) if value is old]:
            held[name] = new
            places.append(f"{module_name}.{name}")
    return places


def _restore(one: _InForce) -> None:
    site, raw = one.site, one.site.raw
    current = vars(site.owner).get(site.attribute, _INHERITED)
    if getattr(current, "__func__", current) is one.stand_in:
        if raw is _INHERITED:
            delattr(site.owner, site.attribute)
        else:
            setattr(site.owner, site.attribute, raw)
    elif current is not raw:
        message = f"unpatch: {one.record.name} has been replaced by {current!r} since; it stays"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    for path in site.declared.registries:
        registry = _resolved(path)
        for key in [key for key, value in registry.items() if value is one.stand_in]:
            registry[key] = site.original
    _rebind(one.stand_in, site.original)


def _place(original: Any) -> str:
    """File and line of a function, for the record."""
    code = getattr(inspect.unwrap(original), "__code__", None)
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}" if code else repr(original)


def _impl(ops: tuple[str, ...]) -> str:
    """Which implementation each op takes on this machine: on the CPU, and on a GPU where there is one."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    shown = [f"{op} ({'; '.join(available_impls(op, device)[0] for device in devices)})" for op in ops]
    return ", ".join(shown) or "torch"
