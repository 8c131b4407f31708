"""Scores, values, critics and the reward sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ppo_fast.ppo.config import ModelsConfig, RewardSource, RolloutConfig
from ppo_fast.ppo.experience import kept_tokens, paid_scores, response_values
from ppo_fast.ppo.models import critic_from_actor, critic_from_classifier, last_token_scores, token_scores
from ppo_fast.ppo.rewards import (
    FunctionReward,
    RewardError,
    TokenReward,
    WeightedReward,
    load_function,
    load_reward,
)


def test_critic_from_the_actor_starts_at_zero_on_the_actors_trunk(world: Any) -> None:
    actor = world.actor()
    critic = critic_from_actor(actor)
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4)
    assert torch.equal(token_scores(critic, ids, mask, bf16=False), torch.zeros(1, 4))
    hidden = [model.base_model(ids).last_hidden_state for model in (actor, critic)]
    assert torch.equal(hidden[0], hidden[1])
    assert all(parameter.requires_grad for parameter in critic.parameters())


def test_critic_from_the_reward_model_starts_as_the_reward(world: Any) -> None:
    reward_model = world.classifier().requires_grad_(False)
    reward_model.config.score_bias = 0.25
    critic = critic_from_classifier(reward_model)
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4)
    scores = last_token_scores(reward_model, ids, mask, bf16=False)
    values = token_scores(critic, ids, mask, bf16=False)
    assert torch.equal(values[:, -1], scores)
    raw = reward_model(ids).logits.squeeze(-1)
    torch.testing.assert_close(scores, raw - 0.25)
    assert all(parameter.requires_grad for parameter in critic.parameters())
    assert not any(parameter.requires_grad for parameter in reward_model.parameters())


def test_score_is_read_at_the_last_real_token(world: Any) -> None:
    """Whatever the padding: right, left, both, or a pad id in the middle of the text."""
    model = world.classifier()
    alone = last_token_scores(model, torch.tensor([[5, 0, 7]]), torch.ones(1, 3), bf16=False)
    padded = torch.tensor([[0, 0, 5, 0, 7, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 0]])
    torch.testing.assert_close(
        last_token_scores(model, padded, mask, bf16=False), alone, rtol=1e-4, atol=1e-5
    )


def test_values_stand_before_their_tokens(world: Any) -> None:
    """values[:, 0] comes from the prompt alone; no value sees its own token."""
    trainer = world.trainer(critic=world.classifier())
    rollout = trainer.sample(world.prompts)
    values = response_values(trainer.critic.model, rollout, slice(0, 8), bf16=False)
    ids, mask = rollout.sequences
    width = rollout.prompt_ids.shape[1]
    prompt_only = token_scores(trainer.critic.model, ids[:, :width], mask[:, :width], bf16=False)[:, -1]
    torch.testing.assert_close(values[:, 0], prompt_only, rtol=1e-4, atol=1e-5)
    other = replace(rollout, response_ids=(rollout.response_ids + 1) % 40)
    changed = response_values(trainer.critic.model, other, slice(0, 8), bf16=False)
    torch.testing.assert_close(changed[:, 0], values[:, 0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed[:, 1], values[:, 1], atol=1e-3)


def test_masked_slots_hold_zero(world: Any) -> None:
    trainer = world.trainer(critic=world.classifier())
    scored = trainer.score(trainer.sample(world.prompts))
    hidden = ~scored.rollout.response_mask
    assert hidden.any()
    for name in ("logprobs", "ref_logprobs", "values", "entropy"):
        assert (getattr(scored, name)[hidden] == 0).all(), name


def test_kept_tokens_by_hand() -> None:
    # Probabilities 0.5, 0.3, 0.15, 0.05: a nucleus of 0.75 needs the first two; the sampled token is added.
    logits = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]]).log()
    kept = kept_tokens(logits, torch.tensor([[0]]), RolloutConfig(top_p=0.75))
    assert kept is not None
    assert kept.tolist() == [[[True, True, False, False]]]
    kept = kept_tokens(logits, torch.tensor([[3]]), RolloutConfig(top_p=0.75))
    assert kept is not None
    assert kept.tolist() == [[[True, True, False, True]]]
    kept = kept_tokens(logits, torch.tensor([[0]]), RolloutConfig(top_k=1))
    assert kept is not None
    assert kept.tolist() == [[[True, False, False, False]]]
    assert kept_tokens(logits, torch.tensor([[0]]), RolloutConfig()) is None


def test_truncated_responses_pay_the_penalty(world: Any) -> None:
    rollout = world.trainer().sample(world.prompts)
    rollout = replace(rollout, ended=torch.tensor([True, False] * 4))
    scores = paid_scores(torch.ones(8), rollout, RolloutConfig(missing_eos_penalty=0.75))
    assert scores.tolist() == [1.0, 0.25] * 4
    assert torch.equal(paid_scores(torch.ones(8), rollout, RolloutConfig()), torch.ones(8))


def test_sources_add_up_by_weight(world: Any) -> None:
    rollout = world.trainer().sample(world.prompts)
    two = FunctionReward("two", lambda prompts, responses: [2.0] * len(prompts))
    half = FunctionReward("half", lambda prompts, responses: [0.5] * len(prompts))
    assert WeightedReward((two, half), (1.0, -2.0))(rollout).tolist() == [1.0] * 8  # 2 - 2 * 0.5


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda p, r: [1.0], "returned 1 scores for 8 prompts"),
        (lambda p, r: 3.0, "returned float, expected a list of floats"),
        (lambda p, r: [0.0] * 7 + [float("nan")], "returned nan, expected a finite number, for sample 7"),
        (lambda p, r: [float("inf")] + [0.0] * 7, "returned inf, expected a finite number, for sample 0"),
        (lambda p, r: ["x"] * 8, "returned 'x', expected a float, for sample 0"),
        (lambda p, r: 1 / 0, "raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_reward_function_that_fails_is_named(world: Any, function: Any, message: str) -> None:
    rollout = world.trainer().sample(world.prompts)
    with pytest.raises(RewardError, match="reward function mine " + message):
        FunctionReward("mine", function)(rollout)


def test_a_reward_model_that_scores_nan_names_the_sample(world: Any) -> None:
    model = world.classifier()
    nn.init.constant_(model.score.weight, float("nan"))
    with pytest.raises(RewardError, match="reward model rm gave nan, expected a finite number, for sample 0"):
        TokenReward("rm", model, 4)(world.trainer().sample(world.prompts))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nonsense", "expected `package.module:name` or `path/to/file.py:name`"),
        ("no.such.module:f", "importing 'no.such.module' raised ModuleNotFoundError"),
        ("math:no_such", "'math' has no function 'no_such'"),
        ("missing/file.py:f", "there is no file 'missing/file.py'"),
    ],
)
def test_a_function_that_cannot_be_found(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"rewards\.function.*" + message):
        load_function(spec, "rewards.function")


@pytest.mark.parametrize(
    "line", ["raise RuntimeError('at import')", "import sys; sys.exit(0)", "undefined", "def f(:"]
)
def test_a_file_that_fails_at_import_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "broken.py").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"rewards.function: importing '.*broken.py' raised"):
        load_function(f"{tmp_path / 'broken.py'}:score", "rewards.function")


def test_a_function_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def score(prompts, responses):\n    return [len(r) for r in responses]\n"
    )
    function = load_function(f"{tmp_path / 'mine.py'}:score", "rewards.function")
    assert function(["a"], ["bcd"]) == [3]


def test_another_tokenizer_is_refused_unless_the_reward_reads_text(
    world: Any, saved: Callable[..., str]
) -> None:
    vocabulary = world.tokenizer.get_vocab()
    swapped = {**vocabulary, "good": vocabulary["bad"], "bad": vocabulary["good"]}
    folder = saved(world.classifier(), "reward", world.other_tokenizer(swapped))
    models = ModelsConfig(device="cpu")
    with pytest.raises(
        ValueError, match=r"another tokenizer than models.actor \(4 entries differ\).*`input: text`"
    ):
        load_reward([RewardSource(model=folder)], world.tokenizer, models, 4)
    as_text = load_reward([RewardSource(model=folder, input="text")], world.tokenizer, models, 4)
    rollout = world.trainer().sample(world.prompts)
    assert as_text(rollout).shape == (8,)


def test_text_and_token_readings_agree_for_one_tokenizer(world: Any, saved: Callable[..., str]) -> None:
    """Decoding and encoding again gives the same tokens here, so both paths must give the same score."""
    model = world.classifier()
    model.config.score_bias = 0.5
    folder = saved(model, "reward")
    models = ModelsConfig(device="cpu")
    rollout = world.trainer().sample(world.prompts)
    # The tiny tokenizer joins words without the space between prompt and response, and drops special tokens.
    rollout = replace(rollout, prompts=[text + " " for text in rollout.prompts])
    plain = ~torch.isin(rollout.response_ids, torch.tensor([0, 1, 2])).any(1)
    both = [
        load_reward([RewardSource(model=folder, input=kind)], world.tokenizer, models, 3)(rollout)
        for kind in ("tokens", "text")
    ]
    assert plain.any()
    torch.testing.assert_close(both[0][plain], both[1][plain], rtol=1e-4, atol=1e-5)


def test_a_classifier_of_several_labels_is_refused(world: Any, saved: Callable[..., str]) -> None:
    torch.manual_seed(0)
    folder = saved(
        world.classifier().__class__(
            world.actor().config.__class__(
                **{**world.classifier().config.to_dict(), "num_labels": 3, "id2label": None, "label2id": None}
            )
        ),
        "three",
    )
    with pytest.raises(ValueError, match="has 3 labels, expected a model with num_labels=1"):
        load_reward([RewardSource(model=folder)], world.tokenizer, ModelsConfig(device="cpu"), 4)


def test_a_source_is_a_model_or_a_function() -> None:
    for wrong in ({}, {"model": "a", "function": "b:c"}):
        with pytest.raises(ValueError, match="exactly one of `model` and `function`"):
            RewardSource(**wrong)
