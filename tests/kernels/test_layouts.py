"""The compiled order of every sum is a matter of the vocabulary and the dtype, never of batch, padding or strides.

Triton lays a load out by what it knows of pointers and strides, and reduces in that layout, which its interpreter
cannot show. This file is also the program that compiles: `python test_layouts.py RESULT`, in a process without the
interpreter. It needs no GPU.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

ROWS, TOKENS = 128, 1600
# Of logits: many rows, one alone, rows of a wider buffer, and logits[:, :-1].
GRIDS = {
    "many": lambda vocab: (ROWS, 0, vocab),
    "alone": lambda vocab: (1, 0, 0),
    "wider": lambda vocab: (ROWS, 0, -(-vocab // 16) * 16 + 32),
    "sliced": lambda vocab: (ROWS - 1, ROWS * vocab, vocab),
}


def row_calls(vocab: int, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    from ppo_fast.kernels import kl, logprob, policy_loss, surrogate
    from shipped import meta

    for name, strides in GRIDS.items():
        grid = strides(vocab)
        rows = 1 if name == "alone" else ROWS
        x, labels, numbers, scalar = (
            meta(rows, vocab, dtype=dtype), meta(rows, dtype=torch.int64), meta(rows), meta(),
        )  # fmt: skip
        named = dict(zip(("inner_rows", "outer_stride", "inner_stride"), grid, strict=True))
        yield f"logprob {name}", partial(logprob.logprob_forward, x, labels, scalar, **named)
        yield f"kl {name}", partial(kl.kl_forward, x, x, scalar, grid=grid, ref_grid=grid)
        for ref, beside in ((None, ""), (x, " beside a reference")):
            for inplace in (False, True):
                call = partial(
                    policy_loss.policy_rows, x, labels, numbers, numbers, numbers, scalar, ref,
                    meta(surrogate.COEFFICIENTS), grid=grid, ref_grid=grid, inplace=inplace,
                )  # fmt: skip
                yield f"policy{beside} {name}{' in place' if inplace else ''}", call


def token_calls() -> Iterator[tuple[str, str, Any]]:
    from ppo_fast.kernels import experience, surrogate, tokens, value_loss
    from shipped import meta

    coefficients, starts = meta(surrogate.COEFFICIENTS), meta(9, dtype=torch.int32)
    nothing = dict.fromkeys(experience.ExperienceInputs.__dataclass_fields__)
    for name, shape, cu in (
        ("even", (8, TOKENS), None),
        ("odd", (8, TOKENS + 1), None),
        ("packed", (8 * TOKENS,), starts),
    ):
        x, mask = meta(*shape), meta(*shape, dtype=torch.bool)
        options = {"reduction": "token-mean"}
        policy = partial(tokens.policy_forward, x, x, x, mask, coefficients, None, cu, **options)
        yield "policy loss", name, policy
        value = partial(value_loss.value_forward, x, x, x, mask, meta(), None, cu, **options)
        yield "value loss", name, value
        given = {"mask": mask, "coefficients": coefficients, "cu_seqlens": cu, "scores": meta(8)}
        shaping = {"logprobs": x, "ref_logprobs": x, "values": x}
        inputs = experience.ExperienceInputs(**nothing | given | shaping)
        call = partial(experience.experience_forward, inputs, kind="k1", mask_rule="carry", moments=True)
        yield "experience", name, call


def reductions(launch: Any) -> list[str]:
    """The layouts of the first kernel's reductions and scans of floats, in their order, for sm_90."""
    import triton
    from resources import source_of
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source_of(launch, target), target=target, options=launch.options)
    ir = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.\S.*)$", ir, re.MULTILINE))
    found = re.findall(r"^\s*\}\) (?:\{.*?\} )?: \((tensor<[^)]*)\) ->", ir, re.MULTILINE)
    return [re.sub(r"#\w+", lambda m: layouts.get(m.group(), m.group()), x) for x in found if "xf32" in x]


def program(result: Path) -> None:
    from shipped import Launch, recorded

    def of(call: Any) -> list[str]:
        with recorded() as launches:
            call()
        # Of a launcher's kernels the first that has sums over what the caller brought.
        for function, arguments, options in launches:
            found = reductions(Launch("", "", "", "", function, arguments, options))
            if found:
                return found
        raise AssertionError("no reduction")

    table: dict[str, dict[str, list[str]]] = {}
    for vocab, dtype in ((50257, torch.bfloat16), (32000, torch.bfloat16), (50257, torch.float32)):
        table[f"{vocab} {dtype}"] = {name: of(call) for name, call in row_calls(vocab, dtype)}
    for op, name, call in token_calls():
        table.setdefault(op, {})[name] = of(call)
    result.write_text(json.dumps(table))


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    folder = tmp_path_factory.mktemp("layouts")
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__, str(folder / "layouts.json")],
        env=inherited | {"PYTHONSAFEPATH": "1", "TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "layouts.json").read_text())


@pytest.mark.parametrize("rows", ["50257 torch.bfloat16", "32000 torch.bfloat16", "50257 torch.float32"])
def test_a_row_is_summed_in_one_order_in_every_kernel(
    layouts: dict[str, dict[str, list[str]]], rows: str
) -> None:
    """Kernels differ in how many sums they have, not in how one is laid out."""
    kinds = {name: set(found) for name, found in layouts[rows].items()}
    assert len(kinds) == len(GRIDS) * 6
    assert all(len(found) == 1 for found in kinds.values()), kinds
    assert len(set.union(*kinds.values())) == 1, kinds


@pytest.mark.parametrize("op", ["policy loss", "value loss", "experience"])
def test_a_sequence_is_summed_in_one_order_padded_or_packed(
    layouts: dict[str, dict[str, list[str]]], op: str
) -> None:
    found = layouts[op]
    assert found.keys() == {"even", "odd", "packed"}
    assert found["even"] == found["odd"] == found["packed"]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
    program(Path(sys.argv[1]))
