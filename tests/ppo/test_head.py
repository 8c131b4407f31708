"""Scoring and loss from hidden states: which models it is for, and that it is what their logits give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from ppo_fast.ppo.config import RolloutConfig
from ppo_fast.ppo.experience import PolicyView
from ppo_fast.ppo.head import HeadForm, head_form
from ppo_fast.records import Rollout

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
FORMS = {
    "softcap": (Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0), HeadForm(2.0, 1.0)),
    "scale": (CohereConfig(**SIZES, logit_scale=0.25), HeadForm(None, 0.25)),
    "divisor": (GraniteConfig(**SIZES, logits_scaling=8.0), HeadForm(None, 0.125)),
}


def make(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", FORMS)
def test_scale_and_softcap_of_the_config_are_those_of_the_logits(name: str) -> None:
    config, form = FORMS[name]
    model = make(config)
    assert head_form(model) == form
    rollout = Rollout(
        prompt_ids=torch.randint(40, (2, 3)),
        prompt_mask=torch.tensor([[False, True, True], [True, True, True]]),
        response_ids=torch.randint(40, (2, 4)),
        response_mask=torch.tensor([[True, True, True, False], [True, True, True, True]]),
        ended=torch.ones(2, dtype=torch.bool),
        prompts=["", ""],
        responses=["", ""],
    )
    view, rows = PolicyView(0.7, bf16=False, impl="auto"), slice(0, 2)
    logprobs, entropy = view(model, rollout, rows, None)
    logits = view.logits(model, rollout, rows)
    for a, b in zip((logprobs, entropy), view.score(logits, rollout.response_ids, None), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    numbers = (logprobs.detach() - 0.1, torch.linspace(-1, 1, 8).view(2, 4))
    everything = torch.ones_like(logits, dtype=torch.bool)  # a kept set sends the view to the logits
    for parameter in (model.get_output_embeddings().weight, model.model.norm.weight):
        gradients = [
            torch.autograd.grad(
                view.loss(model, rollout, rows, kept, *numbers, entropy_coef=0.1).loss, parameter
            )[0]
            for kept in (None, everything)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_a_config_that_says_something_else_than_the_model_does_is_found_out(world: Any) -> None:
    model = world.actor()
    model.config.logits_scaling = 2.0
    assert head_form(model) is None


def test_a_head_that_is_not_a_plain_matrix_is_asked_for_its_logits(world: Any) -> None:
    class Adapted(nn.Linear):
        """As adapters wrap a head: at first it adds nothing."""

    model = world.actor()
    assert head_form(model) == HeadForm(None, 1.0)
    wrapped = copy.deepcopy(model)
    wrapped.lm_head.__class__ = Adapted
    assert head_form(wrapped) is None
    hooked = copy.deepcopy(model)
    hooked.lm_head.register_forward_hook(lambda module, inputs, output: output * 2.0)
    assert head_form(hooked) is None


@pytest.mark.parametrize("changes", [{}, {"logits_scaling": 2.0}], ids=["hidden", "logits"])
def test_both_ways_train_alike(world: Any, changes: dict[str, float]) -> None:
    """`logits_scaling`, which a Llama does not heed, sends it to its logits."""
    actor = world.actor()
    for name, value in changes.items():
        setattr(actor.config, name, value)
    trainer, plain = world.trainer(actor=actor), world.trainer(actor=world.actor())
    assert (head_form(trainer.actor.model) is None) == bool(changes)
    for one in (trainer, plain):
        torch.manual_seed(3)
        one.metrics = [one.step() for _ in range(2)]
    for mine, theirs in zip(trainer.metrics, plain.metrics, strict=True):
        for name in ("loss/policy", "objective/scores", "policy/entropy", "optim/actor_grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), name


def test_five_updates_agree_with_eager_torch(world: Any) -> None:
    """Hidden states and native code, against the reference's whole logits: losses and rewards, step by step."""
    runs = []
    for impl in ("auto", "reference"):
        config = world.config(
            impl=impl,
            objective={"entropy_coef": 0.01, "dual_clip": 3.0},
            rollout=RolloutConfig(batch_size=8, max_new_tokens=6, temperature=0.9),
        )
        trainer = world.trainer(config)
        torch.manual_seed(5)
        runs.append([trainer.step() for _ in range(5)])
    for mine, theirs in zip(*runs, strict=True):
        for name in (
            "loss/policy",
            "loss/value",
            "objective/scores",
            "objective/rlhf_reward",
            "objective/kl",
        ):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=2e-5), name


def test_the_trainer_asks_for_whole_logits_only_where_the_sampler_truncates(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    logits = PolicyView.logits

    def noted(self: PolicyView, *args: Any) -> torch.Tensor:
        asked.append(args[0])
        return logits(self, *args)

    monkeypatch.setattr(PolicyView, "logits", noted)
    world.trainer().step()
    assert asked == []
    truncated = RolloutConfig(batch_size=8, max_new_tokens=6, top_p=0.8)
    trainer = world.trainer(world.config(rollout=truncated))
    trainer.step()
    assert {id(model) for model in asked} == {id(trainer.actor.model), id(trainer.reference)}
