"""What fine-tuning and reward modelling share: splits, padding, the device and the Trainer's settings."""

import contextlib
import math
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppo_fast.prepare.data import Row, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments


def require(condition: bool, name: str, value: object, expected: str) -> None:
    """Raise `ValueError("<name>: got <value>, expected <expected>")` unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")


def check_training(config: Any) -> None:
    """Check the fields that every training step has; the message of the ValueError names the field."""
    for name in ("model", "data", "output"):
        require(bool(getattr(config, name)), name, getattr(config, name), "a path (it is required)")
    for name in ("max_length", "batch_size", "gradient_accumulation"):
        require(getattr(config, name) >= 1, name, getattr(config, name), "at least 1")
    for name in ("epochs", "learning_rate"):
        value = getattr(config, name)
        require(math.isfinite(value) and value > 0, name, value, "a finite number above 0")
    for name in ("warmup", "heldout_fraction"):
        require(0 <= getattr(config, name) < 1, name, getattr(config, name), "a fraction in [0, 1)")
    require(
        bool(config.heldout) or config.heldout_fraction > 0,
        "heldout_fraction",
        config.heldout_fraction,
        "more than 0 when no heldout file is named",
    )


def train_and_heldout(config: Any, required: Sequence[Sequence[str]]) -> tuple[list[Row], list[Row]]:
    """Rows of `config.data`, and of `config.heldout` or a seeded share of the former; neither is empty."""
    rows = read_rows(config.data, required)
    if config.heldout:
        return rows, read_rows(config.heldout, required)
    require(len(rows) >= 2, "data", config.data, "at least 2 rows, to hold one out")
    random.Random(config.seed).shuffle(rows)
    count = min(max(1, round(config.heldout_fraction * len(rows))), len(rows) - 1)
    return rows[count:], rows[:count]


def load_tokenizer(folder: str) -> "PreTrainedTokenizerBase":
    """Load a tokenizer and require an EOS and a PAD that is not EOS.

    Raises:
        ValueError: there is no such tokenizer, no EOS, no PAD, or PAD is EOS: the end of a text would then
        look like
            padding, and its loss or score would be lost.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except OSError as error:
        raise ValueError(f"model: no tokenizer in {folder!r}: {error}") from error
    require(tokenizer.eos_token_id is not None, "model", folder, "a tokenizer with an EOS token")
    require(
        tokenizer.pad_token_id not in (None, tokenizer.eos_token_id),
        "model",
        folder,
        f"a tokenizer whose PAD token (here {tokenizer.pad_token!r}) is there and is not EOS: set "
        "tokenizer.pad_token to a special token that texts do not hold",
    )
    return tokenizer


def pad_right(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Stack B lists of ints as int64 [B, L], L the longest, with `fill` on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([list(row) + [fill] * (width - len(row)) for row in rows], dtype=torch.int64)


def token_mask(rows: Sequence[Sequence[int]]) -> Tensor:
    """int64 [B, L], 1 where `pad_right` of the same rows holds a token of theirs."""
    return pad_right([[1] * len(row) for row in rows], 0)


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; another name is taken as torch takes it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: got {name!r}, expected auto, cpu or cuda") from error
    require(device.type in ("cpu", "cuda"), "device", name, "auto, cpu or cuda")
    require(
        device.type == "cpu" or torch.cuda.is_available(), "device", name, "cpu: torch sees no CUDA device"
    )
    return device


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices natively, so that it is faster there than float32.

    On a CPU that is AVX512-BF16 or AMX; without them bfloat16 products are emulated and slower than float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@contextlib.contextmanager
def trainer_arguments(config: Any, device: torch.device, n_rows: int) -> Iterator["TrainingArguments"]:
    """Settings of a transformers `Trainer` for the fields that every training step has.

    Nothing is saved or reported by the Trainer itself; its mandatory folder is a temporary one. The learning
    rate rises over the share `config.warmup` of the steps, then falls linearly to 0.
    """
    from transformers import TrainingArguments

    steps = math.ceil(n_rows / (config.batch_size * config.gradient_accumulation)) * config.epochs
    with tempfile.TemporaryDirectory() as scratch:
        yield TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation,
            num_train_epochs=config.epochs,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            # Rounded down: a run of one step must not spend it at rate 0.
            warmup_steps=int(config.warmup * steps),
            seed=config.seed,
            bf16=config.autocast,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            logging_steps=max(1, int(steps) // 10),
        )


def write_card(folder: Path, title: str, library_task: str, lines: Sequence[str]) -> None:
    """Write a model card, `README.md` with the metadata header that model hubs read."""
    header = f"---\nlibrary_name: transformers\npipeline_tag: {library_task}\ntags:\n- ppo-fast\n---\n\n"
    (folder / "README.md").write_text(header + f"# {title}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
