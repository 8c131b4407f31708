"""Drop-in ops for trainers of others: `patch` an installed trainer, or import one function of a trainer's module.

A trainer's module, `ppo_fast.integrations.<trainer>`, imports without the trainer. It holds one public function for
each name that it replaces, and a tuple INTEGRATIONS that declares them, one `Integration` for each family of versions
with the same seams. `patch` takes the first one that knows the installed version:

    INTEGRATIONS = (
        Integration(
            trainer="verl",
            distribution="verl",  # as its metadata names it; None for a source tree, where only signatures are checked
            versions=("0.9.1",),  # each a version, or the start of one: "1.16" knows 1.16.0 and 1.16.2
            replacements=(
                Replacement(
                    "verl.utils.torch_functional:logprobs_from_logits",  # module:name, or module:Class.method
                    logprobs_from_logits,  # ours: the same parameters, defaults and kinds, `self` included
                    ops=("logprobs_from_logits",),  # which of our ops compute it
                ),
            ),
        ),
    )

That is all: the signature to expect of the original is that of ours. Further fields of `Replacement`: `registries`,
dicts that hold the original as a value; `signature_of`, for a name whose own signature says nothing, like `apply` of an
autograd.Function; `static`, to put a function without `self` on a class. Add the trainer's name to TRAINERS in
patch.py. A replacement keeps the contract of its original to the letter: dtype, what masked slots hold, NaN, errors;
README.md in this folder says where our own op would give something better. `patch(..., strict=False)` asks for that:
a replacement that works to give the original's NaN asks `contract.strict()` first.
"""

from ppo_fast.integrations.patch import Integration, Patch, PatchError, Replacement, patch, unpatch

__all__ = ["Integration", "Patch", "PatchError", "Replacement", "patch", "unpatch"]
