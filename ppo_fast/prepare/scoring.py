"""A language model's trunk with a linear head that scores a text: loading, freezing, reading, and the two losses."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid, mse_loss

from ppo_fast.prepare.training import has_fast_bfloat16, pad_right, require, token_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pairwise_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Bradley-Terry: mean of -log sigmoid(r_chosen - r_rejected).

    Args:
        chosen: scores [B] of the preferred texts.
        rejected: scores [B] of the others.

    Returns:
        0-d loss; log 2 where the scores are equal (Ouyang et al. 2022, equation 1, one pair a prompt).
    """
    return -logsigmoid(chosen - rejected).mean()


def load_scorer(
    folder: str, num_layers: int | None, freeze: str | int, pad: int, device: torch.device
) -> tuple["PreTrainedModel", torch.dtype]:
    """Load a trunk as a one-label sequence classifier with a fresh head, and say which type its folder had.

    The head starts as N(0, 1/sqrt(D + 1)) without bias (lm-human-preferences), and is float32 throughout. A
    trunk that trains is float32; a frozen one stays in bfloat16 if it is stored so and the hardware is fast
    at it.

    Args:
        folder: a causal language model (its output head is dropped) or a classifier.
        num_layers: keep this many of the first layers; None keeps all.
        freeze: `none`, `trunk`, or the number of top layers that train.
        pad: PAD's id.
        device: where the model goes.

    Raises:
        ValueError: no such model, or `num_layers` or `freeze` does not fit it, or its head is not one linear
        layer.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        config = AutoConfig.from_pretrained(folder)
        config.num_labels, config.pad_token_id = 1, pad
        _keep_layers(config, num_layers)
        model = AutoModelForSequenceClassification.from_pretrained(folder, config=config, dtype="auto")
    except OSError as error:
        raise ValueError(f"model: no model in {folder!r}: {error}") from error
    stored = model.dtype
    _freeze(model, freeze)
    frozen = not any(parameter.requires_grad for parameter in model.base_model.parameters())
    if not (frozen and stored == torch.bfloat16 and has_fast_bfloat16(device)):
        model.float()
    head = head_of(model).float().requires_grad_(True)
    nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features + 1))
    return model.to(device), stored


def head_of(model: "PreTrainedModel") -> nn.Linear:
    """The head `score`, linear without bias, as transformers' decoders have it."""
    head = getattr(model, "score", None)
    fits = isinstance(head, nn.Linear) and head.out_features == 1 and head.bias is None
    require(
        fits,
        "model",
        type(model).__name__,
        "a decoder whose classifier has a linear head `score` without bias",
    )
    assert isinstance(head, nn.Linear)
    return head


def _keep_layers(config: object, num_layers: int | None) -> None:
    if num_layers is None:
        return
    depth: int = config.num_hidden_layers  # type: ignore[attr-defined]
    require(1 <= num_layers <= depth, "num_layers", num_layers, f"1 to {depth}, the layers of the model")
    config.num_hidden_layers = num_layers  # type: ignore[attr-defined]
    # Models with several kinds of layers list the kind of each.
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]  # type: ignore[attr-defined]


def _freeze(model: "PreTrainedModel", freeze: str | int) -> None:
    if freeze == "none":
        return
    model.base_model.requires_grad_(False)
    if freeze == "trunk":
        return
    depth: int = model.config.num_hidden_layers
    fits = isinstance(freeze, int) and not isinstance(freeze, bool) and 1 <= freeze <= depth
    require(fits, "freeze", freeze, f"none, trunk, or 1 to {depth}, how many top layers train")
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    require(
        bool(lists), "freeze", freeze, f"none or trunk: no list of layers found in {type(model).__name__}"
    )
    for layer in lists[0][-int(freeze) :]:
        layer.requires_grad_(True)


def last_hidden(model: "PreTrainedModel", ids: Tensor, mask: Tensor) -> Tensor:
    """The trunk's output at the last real token of each row, whichever side is padded.

    Args:
        model: a sequence classifier.
        ids: token ids, int64 [B, L].
        mask: [B, L], nonzero on real tokens.

    Returns:
        [B, D] in the trunk's type.
    """
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    hidden = model.base_model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(-1)
    return hidden[torch.arange(len(ids), device=ids.device), last]


def features(model: "PreTrainedModel", rows: Sequence[list[int]], pad: int, batch_size: int) -> Tensor:
    """`last_hidden` of N rows of token ids, in batches of like length: [N, D] on the CPU, no gradient."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    found: Tensor | None = None
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            chunk = order[start : start + batch_size]
            batch = [rows[index] for index in chunk]
            hidden = last_hidden(
                model, pad_right(batch, pad).to(model.device), token_mask(batch).to(model.device)
            ).cpu()
            if found is None:
                found = hidden.new_empty(len(rows), hidden.shape[-1])
            found[chunk] = hidden
    assert found is not None
    return found


class RewardLoss(nn.Module):
    """Scores and their loss, in the form that a transformers `Trainer` calls.

    A pairwise batch holds the B chosen rows, then the B rejected ones. `offset` is a trained constant under
    the scores for regression; a difference of two scores does not feel it.
    """

    def __init__(self, model: "PreTrainedModel", objective: str) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.offset = nn.Parameter(
            torch.zeros((), device=model.device), requires_grad=objective == "regression"
        )

    def forward(
        self,
        hidden: Tensor | None = None,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss (0-d) and scores (one for each row) from features, or from tokens where the trunk trains too."""
        if hidden is None:
            assert ids is not None
            assert mask is not None
            hidden = last_hidden(self.model, ids, mask)
        # In float32 also under autocast: a bfloat16 score has two to three digits.
        with torch.autocast(hidden.device.type, enabled=False):
            scores = linear(hidden.float(), head_of(self.model).weight.float()).squeeze(-1) + self.offset
        return {"loss": self.loss(scores, targets), "scores": scores}

    def loss(self, scores: Tensor, targets: Tensor | None) -> Tensor:
        """`pairwise_loss` of the two halves, or the mean squared error against `targets`."""
        if self.objective == "regression":
            assert targets is not None
            return mse_loss(scores, targets)
        chosen, rejected = scores.chunk(2)
        return pairwise_loss(chosen, rejected)
