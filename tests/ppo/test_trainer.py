"""The loop: what the first minibatch sees, who learns, what a step reports."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from ppo_fast.ppo.config import OptimizerConfig, RolloutConfig
from ppo_fast.report import GLOSSARY


@pytest.mark.parametrize(
    "rollout",
    [
        RolloutConfig(batch_size=8, max_new_tokens=6),
        RolloutConfig(batch_size=8, max_new_tokens=6, temperature=0.7),
        RolloutConfig(batch_size=8, max_new_tokens=6, top_p=0.8),
        RolloutConfig(batch_size=8, max_new_tokens=6, temperature=1.3, top_k=5, top_p=0.9),
    ],
    ids=["plain", "temperature", "top_p", "top_k and top_p"],
)
@pytest.mark.parametrize("bf16", [False, True])
def test_first_ratio_is_exactly_one(world: Any, rollout: RolloutConfig, bf16: bool) -> None:
    config = world.config(rollout=rollout, objective={"micro_batch_size": 3})
    config.models.autocast = bf16
    trainer = world.trainer(config)
    scored = trainer.score(trainer.sample(world.prompts))
    experience = trainer.experience(scored)
    first = next(iter(trainer.minibatches(0)))
    stats = trainer.updater.minibatch(scored, experience, first)
    assert float(stats.means["policy/approx_kl"]) == 0.0
    assert float(stats.means["policy/ratio_mean"]) == 1.0
    assert float(stats.ratio_max) == 1.0
    assert float(stats.means["policy/clip_fraction"]) == 0.0
    again = trainer.updater.minibatch(scored, experience, first)
    assert float(again.means["policy/approx_kl"]) > 0.0  # the step did move the policy


@pytest.mark.parametrize(("minibatches", "micro"), [(1, 8), (2, 3), (4, 8), (1, 3), (8, 2)])
def test_the_first_pass_trains_in_the_company_that_was_scored(
    world: Any, monkeypatch: pytest.MonkeyPatch, minibatches: int, micro: int
) -> None:
    """The same rows in the same forward passes: on other hardware a row's last bits may depend on its neighbours."""
    from ppo_fast.ppo.experience import PolicyView

    seen: list[Any] = []
    from_hidden = PolicyView._from_hidden

    def noted(self: PolicyView, model: Any, form: Any, rollout: Any, rows: Any) -> Any:
        if model is trainer.actor.model:
            seen.append(rows)
        return from_hidden(self, model, form, rollout, rows)

    monkeypatch.setattr(PolicyView, "_from_hidden", noted)
    trainer = world.trainer(world.config(objective={"minibatches": minibatches, "micro_batch_size": micro}))
    scored = trainer.score(trainer.sample(world.prompts))
    scoring, seen[:] = list(seen), []
    experience = trainer.experience(scored)
    for rows in trainer.minibatches(0):
        trainer.updater.minibatch(scored, experience, rows)
    assert seen == scoring
    assert [row for rows in seen for row in range(rows.start, rows.stop)] == list(range(8))


def test_dropout_stays_off(world: Any) -> None:
    """With dropout in the config the first ratio would be noise if a model were ever in train mode."""
    actor = world.actor(attention_dropout=0.5)
    trainer = world.trainer(actor=actor)
    scored = trainer.score(trainer.sample(world.prompts))
    stats = trainer.updater.minibatch(scored, trainer.experience(scored), slice(0, 8))
    assert float(stats.means["policy/approx_kl"]) == 0.0
    assert not any(module.training for module in actor.modules())


def test_actor_and_critic_learn_and_the_other_two_are_frozen(world: Any) -> None:
    reward_model = world.classifier().requires_grad_(False)
    from ppo_fast.ppo.models import critic_from_classifier
    from ppo_fast.ppo.rewards import TokenReward

    trainer = world.trainer(
        critic=critic_from_classifier(reward_model), reward=TokenReward("reward", reward_model, 4)
    )
    models = {
        "actor": trainer.actor.model,
        "critic": trainer.critic.model,
        "reference": trainer.reference,
        "reward": reward_model,
    }
    before = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    trainer.step()
    changed = {
        name: any(not torch.equal(before[name][key], value) for key, value in model.state_dict().items())
        for name, model in models.items()
    }
    assert changed == {"actor": True, "critic": True, "reference": False, "reward": False}
    assert all(
        parameter.grad is None for name in ("reference", "reward") for parameter in models[name].parameters()
    )


def test_micro_batches_do_not_change_the_gradient(world: Any) -> None:
    """Ragged responses, so that a mean of micro-batch means would differ from the minibatch's mean."""
    norms = []
    for size in (1, 3, 8):
        trainer = world.trainer(world.config(objective={"micro_batch_size": size, "entropy_coef": 0.1}))
        torch.manual_seed(5)
        scored = trainer.score(trainer.sample(world.prompts))
        assert len(set(scored.rollout.response_mask.sum(1).tolist())) > 1
        stats = trainer.updater.minibatch(scored, trainer.experience(scored), slice(0, 8))
        norms.append([float(stats.means[f"optim/{name}_grad_norm"]) for name in ("actor", "critic")])
    assert norms[0] == pytest.approx(norms[2], rel=1e-4)
    assert norms[1] == pytest.approx(norms[2], rel=1e-4)


def test_entropy_bonus_enters_the_gradient(world: Any) -> None:
    norms = []
    for coefficient in (0.0, 5.0):
        trainer = world.trainer(world.config(objective={"entropy_coef": coefficient}))
        scored = trainer.score(trainer.sample(world.prompts))
        stats = trainer.updater.minibatch(scored, trainer.experience(scored), slice(0, 8))
        norms.append(float(stats.means["optim/actor_grad_norm"]))
    assert norms[0] != pytest.approx(norms[1], rel=1e-2)


def test_first_pass_keeps_the_order_and_later_passes_shuffle(world: Any) -> None:
    trainer = world.trainer()
    assert list(trainer.minibatches(0)) == [slice(0, 4), slice(4, 8)]
    later = torch.cat(list(trainer.minibatches(1)))
    assert sorted(later.tolist()) == list(range(8))
    assert torch.cat(list(trainer.minibatches(2))).tolist() != later.tolist()
    assert torch.equal(torch.cat(list(trainer.minibatches(1))), later)  # on every process the same
    trainer.step()
    assert torch.cat(list(trainer.minibatches(1))).tolist() != later.tolist()


def test_a_step_reports_every_metric_of_the_glossary_and_nothing_else(world: Any) -> None:
    metrics = world.trainer().step()
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())
    documented = {name for name in GLOSSARY if "/" in name and not name.startswith("eval/")}
    assert set(metrics) == documented


def test_reported_reward_is_score_plus_penalty(world: Any) -> None:
    trainer = world.trainer(world.config(objective={"kl_coef": 0.2}))
    trainer.step()
    metrics = trainer.step()
    assert metrics["objective/kl"] != 0.0
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.2 * metrics["objective/kl"], abs=1e-6)
    total = metrics["objective/scores"] + metrics["objective/non_score_reward"]
    assert metrics["objective/rlhf_reward"] == pytest.approx(total, abs=1e-5)


def test_reward_rises(world: Any) -> None:
    """Thirty steps towards even-numbered words: from what chance gives to nearly nothing else."""
    trainer = world.trainer(world.config(steps=30, objective={"epochs": 4, "kl_coef": 0.0}, seed=1))
    scores = [trainer.step()["objective/scores"] for _ in range(30)]
    assert sum(scores[:3]) / 3 < 0.55
    assert sum(scores[-3:]) / 3 > 0.8


@pytest.mark.parametrize("poisoned", ["advantages", "returns"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_update_that_is_not_finite_is_skipped_by_both_models(
    world: Any, poisoned: str, value: float
) -> None:
    """Bad advantages reach the actor alone, bad returns the critic alone; neither may step without the other."""
    trainer = world.trainer()
    scored = trainer.score(trainer.sample(world.prompts))
    experience = trainer.experience(scored)
    before = [copy.deepcopy(model.model.state_dict()) for model in trainer.updater.learners]
    bad = experience._replace(**{poisoned: torch.full_like(experience.advantages, value)})
    assert trainer.updater.minibatch(scored, bad, slice(0, 8)).skipped
    for learner, state in zip(trainer.updater.learners, before, strict=True):
        assert all(torch.equal(state[key], value) for key, value in learner.model.state_dict().items())
        assert all(parameter.grad is None for parameter in learner.model.parameters())
        assert learner.scheduler.last_epoch == 0
    assert trainer.updater.skipped_in_a_row == 1
    assert not trainer.updater.minibatch(scored, experience, slice(0, 8)).skipped
    assert trainer.updater.skipped_in_a_row == 0


def test_too_many_skipped_updates_in_a_row_stop_the_run(world: Any) -> None:
    trainer = world.trainer(world.config(optimizer=OptimizerConfig(1e-3, 1e-3, max_skipped_updates=2)))
    scored = trainer.score(trainer.sample(world.prompts))
    experience = trainer.experience(scored)
    bad = experience._replace(advantages=torch.full_like(experience.advantages, math.nan))
    for rows in (bad, bad, experience, bad, bad):  # one good update in between starts the count anew
        trainer.updater.minibatch(scored, rows, slice(0, 8))
    with pytest.raises(
        FloatingPointError, match=r"3 update.s. in a row .* optimizer.max_skipped_updates=2 .*nan"
    ):
        trainer.updater.minibatch(scored, bad, slice(0, 8))


def test_skipped_updates_are_counted_and_leave_the_means_alone(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = world.trainer()
    minibatch, calls = type(trainer.updater).minibatch, []

    def poisoned(self: Any, scored: Any, experience: Any, rows: Any) -> Any:
        calls.append(rows)
        if len(calls) in bad:
            experience = experience._replace(returns=torch.full_like(experience.returns, math.inf))
        return minibatch(self, scored, experience, rows)

    monkeypatch.setattr(type(trainer.updater), "minibatch", poisoned)
    bad = {2, 3}
    metrics = trainer.step()
    assert metrics["optim/skipped_updates"] == 2.0
    assert all(math.isfinite(value) for value in metrics.values())
    bad = {5, 6, 7, 8}
    metrics = trainer.step()
    assert metrics["optim/skipped_updates"] == 4.0
    assert math.isnan(metrics["loss/value"])
    assert math.isfinite(metrics["objective/kl"])


def test_the_value_clip_of_the_config_is_the_one_applied(world: Any) -> None:
    """Old values one away from the new, returns at the new: unclipped the loss is 0, clipped (1 - c)^2 / 2."""
    losses = []
    for clip in (None, 0.2, 0.5):
        trainer = world.trainer(world.config(objective={"value_clip": clip}))  # a critic that says 0
        scored = trainer.score(trainer.sample(world.prompts))
        shifted = replace(scored, values=torch.ones_like(scored.values))
        experience = trainer.experience(scored)._replace(returns=torch.zeros_like(scored.values))
        counted = scored.rollout.response_mask.sum().float()
        losses.append(
            float(trainer.updater.value_loss(shifted, experience, slice(0, 8), counted).loss.detach())
        )
    assert losses == pytest.approx([0.0, 0.32, 0.125])  # 0.8^2 / 2, 0.5^2 / 2


def test_learning_rates_anneal_to_zero_apart(world: Any) -> None:
    optimizer = OptimizerConfig(actor_lr=1e-3, critic_lr=4e-3, schedule="linear")
    trainer = world.trainer(world.config(steps=2, optimizer=optimizer))
    assert (trainer.actor.learning_rate, trainer.critic.learning_rate) == (1e-3, 4e-3)
    trainer.step()
    assert trainer.actor.learning_rate == pytest.approx(0.5e-3)
    trainer.step()
    assert (trainer.actor.learning_rate, trainer.critic.learning_rate) == (0.0, 0.0)


def test_vocabularies_that_differ_are_refused(world: Any) -> None:
    with pytest.raises(
        ValueError, match="models.reference has a vocabulary of 50 tokens and models.actor one of 40"
    ):
        world.trainer(reference=world.actor(vocab_size=50))


def test_no_prompts_are_refused(world: Any) -> None:
    with pytest.raises(ValueError, match="prompts is empty"):
        world.trainer(prompts=[])
