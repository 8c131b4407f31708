"""A reward model from preference pairs or from given scores, on a language model's trunk."""

import dataclasses
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ppo_fast.prepare.data import Row
from ppo_fast.prepare.folders import refuse_non_empty, staged
from ppo_fast.prepare.scoring import RewardLoss, features, head_of, load_scorer
from ppo_fast.prepare.tokens import opening_ids, text_ids
from ppo_fast.prepare.training import (
    check_training,
    load_tokenizer,
    pad_right,
    require,
    resolve_device,
    token_mask,
    train_and_heldout,
    trainer_arguments,
    write_card,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIR_KEYS = (("chosen", "rejected"),)
SCORE_KEYS = (("text", "score"), ("response", "score"))


@dataclass
class RewardConfig:
    """Training of a reward model: a linear head on the last real token of a decoder's trunk."""

    model: str = ""
    """Folder (or hub name) of the trunk, best the actor itself: the two then share a tokenizer. Required."""
    data: str = ""
    """Training rows, `.jsonl` or `.csv`: `chosen` and `rejected` (pairwise), or `score` with `text` or `response`
    (regression); in each an optional `prompt` that comes first. Required."""
    output: str = ""
    """Folder for the reward model; absent or empty. Required."""
    heldout: str | None = None
    """Held-out rows in the same form. By default a share of `data` is held out."""
    heldout_fraction: float = 0.05
    """Share of `data` held out when `heldout` is not given."""
    objective: Literal["pairwise", "regression"] = "pairwise"
    """`pairwise`: Bradley-Terry, -log sigmoid(r_chosen - r_rejected). `regression`: squared error to `score`."""
    num_layers: int | None = None
    """Keep only this many of the trunk's first layers: a smaller, faster reward model. All by default."""
    freeze: Literal["none", "trunk"] | int = "none"
    """What stays as it is: `none` trains all; `trunk` trains the head alone, on features computed once; a number n
    trains the top n layers and the head."""
    append_eos: Literal["half", "always", "never"] = "half"
    """Whether texts end with EOS. Half of them by default: PPO scores responses that ended by themselves and
    responses cut at the length limit, and the last token, where the score is read, is EOS in the former
    only."""
    max_length: int = 512
    """Longest prompt and text in tokens; the rest is cut off, as PPO cuts responses."""
    normalize: bool = True
    """Scale and shift the finished model so that the training texts' scores have mean 0 and standard deviation 1."""
    epochs: float = 1.0
    """Passes over the data. One for a whole model, which memorises pairs fast; 10 to 20 for a head alone."""
    batch_size: int = 32
    """Rows (pairs) of one forward and backward pass."""
    gradient_accumulation: int = 1
    """Passes per optimiser step; the effective batch is `batch_size` times this."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW: for a whole model; a head alone wants about 1e-3."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay per step, in units of the learning rate."""
    autocast: bool = False
    """Compute in bfloat16 under autocast; weights being trained stay float32."""
    device: str = "auto"
    """`auto` (CUDA where there is one), `cpu` or `cuda`."""
    seed: int = 0
    """Seed of the split, the head, the order of rows and which texts end with EOS."""


@dataclass(frozen=True)
class Texts:
    """Encoded rows: for pairs the N chosen texts followed by the N rejected, for regression the N texts."""

    ids: list[list[int]]
    """Token ids of each text."""
    targets: Tensor | None
    """Given scores [N] float32 for regression, None for pairs."""

    @property
    def count(self) -> int:
        """N, the number of rows."""
        return len(self.ids) if self.targets is not None else len(self.ids) // 2


def run_reward(config: RewardConfig) -> dict[str, float]:
    """Train a reward model and save it with its tokenizer, `metrics.json` and a model card to `config.output`.

    A text's score is `head(h) - score_bias`, with h the trunk's output at the last real token and
    `score_bias` a number in the saved `config.json`; transformers' own forward pass gives `head(h)`. With
    `config.normalize` the head and `score_bias` are set so that the scores of the training texts have mean 0
    and standard deviation 1, which fixes the unit that the KL penalty and the score's clipping range are
    measured in.

    Returns:
        `heldout_accuracy_*` and `heldout_loss_*` (pairwise), or `heldout_mse_*` and `heldout_correlation_*`
        (regression, in the units of the given scores), each `_before` and `_after` training; `train_rows`,
        `heldout_rows`; `score_mean` and `score_std` of the training texts before normalisation.

    Raises:
        FileNotFoundError: a data file does not exist. ValueError: a field is out of range, a row is broken,
        or the output folder is not empty; nothing is written.
    """
    check_training(config)
    for name, allowed in (
        ("objective", ("pairwise", "regression")),
        ("append_eos", ("half", "always", "never")),
    ):
        require(getattr(config, name) in allowed, name, getattr(config, name), " or ".join(allowed))
    output = refuse_non_empty(config.output)
    device = resolve_device(config.device)
    train_rows, heldout_rows = train_and_heldout(
        config, PAIR_KEYS if config.objective == "pairwise" else SCORE_KEYS
    )
    tokenizer = load_tokenizer(config.model)
    train, heldout = (encode(rows, tokenizer, config) for rows in (train_rows, heldout_rows))
    unit = _target_unit(train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model, stored = load_scorer(
            config.model, config.num_layers, config.freeze, tokenizer.pad_token_id, device
        )
    loss = RewardLoss(model, config.objective)
    metrics = _fit(loss, _in_unit(train, unit), _in_unit(heldout, unit), unit, stored, config)
    with staged(output) as folder:
        # The head stays float32, so that the normalisation is not rounded away; a trunk is stored as it came.
        model.base_model.to(stored)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        _write_card(folder, config, metrics)
    return metrics


def encode(rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", config: RewardConfig) -> Texts:
    """Encode the rows; which texts end with EOS is drawn for each text apart.

    Were both texts of a pair to end alike, no pair would ever compare an ended text with a cut one, and what
    EOS is worth by itself would be left to chance; drawn apart, it is worth nothing.

    Raises:
        ValueError: a text is missing or blank, or a score is not a finite number; the message names row and
        key.
    """
    numbered = list(enumerate(rows, 1))
    if config.objective == "pairwise":
        texts = [(row, number, "chosen") for number, row in numbered]
        texts += [(row, number, "rejected") for number, row in numbered]
        targets = None
    else:
        texts = [
            (row, number, "text" if row.get("text") is not None else "response") for number, row in numbered
        ]
        targets = torch.tensor([_score(row, number) for number, row in numbered])
    rng = random.Random(config.seed)
    share = {"always": 1.0, "half": 0.5, "never": 0.0}[config.append_eos]
    ids = [
        _encode_one(row, number, key, tokenizer, config.max_length, eos=rng.random() < share)
        for row, number, key in texts
    ]
    return Texts(ids, targets)


def _encode_one(
    row: Row, number: int, key: str, tokenizer: "PreTrainedTokenizerBase", max_length: int, *, eos: bool
) -> list[int]:
    prompt, text = row.get("prompt") or "", row[key]
    require(isinstance(prompt, str), f"row {number}: prompt", prompt, "text")
    require(
        isinstance(text, str) and bool(text.strip()), f"row {number}: {key}", text, "text that is not blank"
    )
    # Apart, as in PPO, where the response is generated after the prompt's tokens.
    ids = opening_ids(tokenizer) + (text_ids(tokenizer, prompt) if prompt else []) + text_ids(tokenizer, text)
    if eos:
        ids.append(tokenizer.eos_token_id)
    return ids[:max_length]


def _score(row: Row, number: int) -> float:
    try:
        value = float(row["score"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"row {number}: score: got {row['score']!r}, expected a number") from error
    require(abs(value) < float("inf"), f"row {number}: score", row["score"], "a finite number")
    return value


@dataclass(frozen=True)
class _Unit:
    """The training targets' mean and standard deviation: the model learns (target - mean) / std."""

    mean: float = 0.0
    std: float = 1.0


def _target_unit(train: Texts) -> _Unit:
    if train.targets is None:
        return _Unit()
    std = float(train.targets.std(correction=0))
    require(std > 0, "data", f"{train.count} rows with one and the same score", "scores that differ")
    return _Unit(float(train.targets.mean()), std)


def _in_unit(texts: Texts, unit: _Unit) -> Texts:
    if texts.targets is None:
        return texts
    return dataclasses.replace(texts, targets=(texts.targets - unit.mean) / unit.std)


def _fit(
    loss: RewardLoss, train: Texts, heldout: Texts, unit: _Unit, stored: torch.dtype, config: RewardConfig
) -> dict[str, float]:
    """Train between two measurements, normalise, and return all metrics."""
    trunk = loss.model.base_model
    frozen = not any(parameter.requires_grad for parameter in trunk.parameters())
    heldout_hidden = _hidden(loss, heldout, config)
    before = _measure(loss, heldout, heldout_hidden, unit)
    _report("before", before)
    train_hidden = _hidden(loss, train, config) if frozen else None
    _train(loss, train, train_hidden, config)
    if not frozen:
        # What is measured and normalised from here on is what will be stored, rounding included.
        trunk.to(stored).float()
        heldout_hidden = _hidden(loss, heldout, config)
    if train_hidden is None:
        train_hidden = _hidden(loss, train, config)
    after = _measure(loss, heldout, heldout_hidden, unit)
    _report("after", after)
    return {
        **{f"heldout_{name}_before": value for name, value in before.items()},
        **{f"heldout_{name}_after": value for name, value in after.items()},
        "train_rows": train.count,
        "heldout_rows": heldout.count,
        **_normalize(loss, train, train_hidden, unit, config),
    }


def _hidden(loss: RewardLoss, texts: Texts, config: RewardConfig) -> Tensor:
    model = loss.model
    return features(model, texts.ids, model.config.pad_token_id, 2 * config.batch_size).to(model.device)


def _measure(loss: RewardLoss, texts: Texts, hidden: Tensor, unit: _Unit) -> dict[str, float]:
    """`accuracy` and `loss` of pairs, or `mse` and `correlation` in the targets' own unit."""
    scores, value = _scores(loss, texts, hidden)
    if texts.targets is None:
        chosen, rejected = scores.chunk(2)
        # A tie is no preference: it counts as half right.
        right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
        return {"accuracy": float(right.mean()), "loss": value}
    return {"mse": value * unit.std**2, "correlation": _correlation(scores, texts.targets)}


def _scores(loss: RewardLoss, texts: Texts, hidden: Tensor) -> tuple[Tensor, float]:
    """Scores on the CPU, one for each text, and the mean loss."""
    targets = None if texts.targets is None else texts.targets.to(hidden.device)
    with torch.no_grad():
        found = loss(hidden=hidden, targets=targets)
    return found["scores"].cpu(), float(found["loss"])


def _correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's r, 0 where one of the two does not vary."""
    x, y = x - x.mean(), y - y.mean()
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm > 0 else 0.0


def _train(loss: RewardLoss, texts: Texts, hidden: Tensor | None, config: RewardConfig) -> None:
    from transformers import Trainer

    pad = loss.model.config.pad_token_id

    def collate(rows: list[int]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        if texts.targets is None:
            rows = rows + [row + texts.count for row in rows]
        else:
            batch["targets"] = texts.targets[rows]
        if hidden is not None:
            return {"hidden": hidden[rows].cpu(), **batch}
        ids = [texts.ids[row] for row in rows]
        return {"ids": pad_right(ids, pad), "mask": token_mask(ids), **batch}

    with trainer_arguments(config, loss.model.device, texts.count) as arguments:
        Trainer(model=loss, args=arguments, train_dataset=range(texts.count), data_collator=collate).train()


def _normalize(
    loss: RewardLoss, texts: Texts, hidden: Tensor, unit: _Unit, config: RewardConfig
) -> dict[str, float]:
    """Fold gain and shift into the head and `config.score_bias`: score = head(h) - score_bias.

    Returns:
        `score_mean` and `score_std` of the training texts before, in the targets' own unit for regression.
    """
    with torch.no_grad():
        scores = loss(hidden=hidden, targets=texts.targets)["scores"]
        mean, std = float(scores.mean()), float(scores.std(correction=0))
        require(
            0 < std < float("inf"), "data", f"scores with standard deviation {std}", "texts that score apart"
        )
        gain, shift = (1 / std, -mean / std) if config.normalize else (unit.std, unit.mean)
        head_of(loss.model).weight.mul_(gain)
    loss.model.config.score_bias = -(gain * loss.offset.item() + shift)
    return {"score_mean": mean * unit.std + unit.mean, "score_std": std * unit.std}


def _report(when: str, metrics: dict[str, float]) -> None:
    print(
        f"held-out {when}: " + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()), flush=True
    )


def _write_card(folder: Path, config: RewardConfig, metrics: dict[str, float]) -> None:
    names = [key.removesuffix("_after") for key in metrics if key.endswith("_after")]
    table = [f"| {n} | {metrics[f'{n}_before']:.4f} | {metrics[f'{n}_after']:.4f} |" for n in names]
    lines = [
        f"Trained with `ppo-fast reward` on {metrics['train_rows']} rows, on the trunk of `{Path(config.model).name}`.",
        "",
        "The score of a text is the logit at its last real token minus `score_bias` of `config.json`.",
        "",
        "| | before | after |",
        "|---|---|---|",
        *table,
        "",
        "Settings:",
        "",
        f"```json\n{json.dumps(dataclasses.asdict(config), indent=2)}\n```",
    ]
    write_card(folder, "Reward model", "text-classification", lines)
