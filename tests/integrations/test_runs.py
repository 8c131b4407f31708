"""A few steps of PPO by the trainers' own functions, with and without the patch: the same losses within 1e-4.

A table of logits is the policy and a table of numbers the critic, on the same tokens throughout.
"""

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import ppo_fast

from .stand_ins import OPENRLHF, VERL, stand_ins

ROWS, TOKENS, VOCABULARY, STEPS = 4, 12, 50, 6


def setting() -> dict[str, Tensor]:
    """Logits and values that learn, the reference's logits, the sampled tokens, a score each, a mask with a hole."""
    torch.manual_seed(0)
    logits = torch.randn(ROWS, TOKENS, VOCABULARY)
    mask = (torch.arange(TOKENS) < torch.tensor([[12], [7], [10], [3]])).long()
    mask[0, 4:6] = 0
    return {
        "logits": logits.clone().requires_grad_(),
        "values": (0.1 * torch.randn(ROWS, TOKENS)).requires_grad_(),
        "ref": logits + 0.1 * torch.randn_like(logits),
        "tokens": torch.randint(VOCABULARY, (ROWS, TOKENS)),
        "scores": torch.randn(ROWS),
        "mask": mask,
    }


def verl_run() -> list[float]:
    """Rewards, GAE and losses as verl's trainer calls them: by attribute, by registry, through its worker's losses."""
    tensordict = importlib.import_module("tensordict")
    functional = importlib.import_module("verl.utils.torch_functional")
    algos = importlib.import_module("verl.trainer.ppo.core_algos")
    losses = importlib.import_module("verl.workers.utils.losses")
    config = importlib.import_module("verl.workers.config").ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, use_kl_loss=True, entropy_coeff=0.01
    )
    s = setting()
    optimizer = torch.optim.Adam([s["logits"], s["values"]], lr=0.05)
    history = []
    for _ in range(STEPS):
        with torch.no_grad():
            old = functional.logprobs_from_logits(s["logits"], s["tokens"])
            ref = functional.logprobs_from_logits(s["ref"], s["tokens"])
            rewards = -0.1 * algos.kl_penalty(old, ref, "kl") * s["mask"]
            rewards[torch.arange(ROWS), s["mask"].sum(1) - 1] += s["scores"]
            held = s["values"].detach().clone()
        advantages, returns = algos.compute_gae_advantage_return(rewards, held, s["mask"], 0.99, 0.95)
        fields = {
            "response_mask": s["mask"],
            "old_log_probs": old,
            "advantages": advantages,
            "ref_log_prob": ref,
            "values": held,
            "returns": returns,
        }
        totals = {"dp_size": 1, "batch_num_tokens": int(s["mask"].sum()), "global_batch_size": ROWS}
        data = tensordict.TensorDict(fields, batch_size=[ROWS])
        for name, value in totals.items():
            data.set_non_tensor(name, value)
        for _ in range(2):
            output = {
                "log_probs": functional.logprobs_from_logits(s["logits"], s["tokens"]),
                "entropy": functional.entropy_from_logits(s["logits"]),
                "values": s["values"],
            }
            policy, _ = losses.ppo_loss(config, output, data)
            critic, _ = losses.value_loss(
                SimpleNamespace(loss_scale_factor=None, cliprange_value=0.5, loss_agg_mode="token-mean"),
                output,
                data,
            )
            optimizer.zero_grad()
            (policy + critic).backward()
            optimizer.step()
            history += [policy.item(), critic.item()]
    return history


def test_verl_by_its_registry(verl: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_ins(**VERL):
        losses = importlib.import_module("verl.workers.utils.losses")
    monkeypatch.setattr(losses, "no_padding_2_padding", lambda padded, data: padded)  # as they are already
    without = verl_run()
    record = ppo_fast.patch("verl")
    patched = verl_run()
    assert patched == pytest.approx(without, rel=1e-4, abs=1e-5)
    assert len(set(without)) == len(without)  # it learns
    called = {name.rsplit(".", 1)[1]: calls for name, calls in record.calls.items()}
    assert called["compute_policy_loss_vanilla"] == called["compute_value_loss"] == 2 * STEPS
    assert called["compute_gae_advantage_return"] == STEPS
    assert called["logprobs_from_logits"] == called["agg_loss"] == 4 * STEPS
    assert called["kl_penalty"] == 3 * STEPS


def openrlhf_run(estimator: str) -> list[float]:
    """Advantages by the experience maker's own method, losses by the modules of its actor and critic."""
    utils = importlib.import_module("openrlhf.models.utils")
    loss = importlib.import_module("openrlhf.models.loss")
    maker_module = importlib.import_module("openrlhf.trainer.ppo_utils.experience_maker")
    advantage = SimpleNamespace(estimator=estimator, gamma=0.99, lambd=0.95, no_std_norm=False)
    maker = object.__new__(maker_module.RemoteExperienceMaker)
    maker.strategy = SimpleNamespace(
        args=SimpleNamespace(
            algo=SimpleNamespace(advantage=advantage),
            rollout=SimpleNamespace(n_samples_per_prompt=1),
            reward=SimpleNamespace(clip_range=(-10, 10)),
        )
    )
    maker.advantage_estimator, maker.kl_ctl = estimator, SimpleNamespace(value=0.1)
    actor, critic = loss.PolicyLoss(dual_clip=3.0), loss.ValueLoss(0.2)
    s = setting()
    optimizer = torch.optim.Adam([s["logits"], s["values"]], lr=0.05)
    history = []
    for _ in range(STEPS):
        with torch.no_grad():
            old = utils.log_probs_from_logits(s["logits"].clone(), s["tokens"]) * s["mask"]
            ref = utils.log_probs_from_logits(s["ref"].clone(), s["tokens"]) * s["mask"]
            experience = maker_module.Experience(
                index=list(range(ROWS)),
                action_mask=s["mask"],
                values=s["values"].detach() * s["mask"],
                kl=maker_module.compute_approx_kl(old, ref, kl_estimator="k1"),
                rewards=s["scores"].clone(),
                info={},
            )
        held = experience.values
        (experience,) = maker.compute_advantages_and_returns([experience])
        for _ in range(2):
            new = utils.log_probs_from_logits(s["logits"], s["tokens"]) * s["mask"]
            totals = {"batch_num_tokens": s["mask"].sum().float()}
            policy, clip_ratio, kl, *_ = actor(new, old, experience.advantages, s["mask"], **totals)
            value = critic(s["values"], held, experience.returns, s["mask"], **totals)
            optimizer.zero_grad()
            (policy + value).backward()
            optimizer.step()
            history += [policy.item(), value.item(), clip_ratio.item(), kl.item()]
    return history


@pytest.mark.parametrize("estimator", ["gae", "reinforce"])
def test_openrlhf_by_its_modules(openrlhf: SimpleNamespace, estimator: str) -> None:
    without = openrlhf_run(estimator)
    with stand_ins(**OPENRLHF):
        record = ppo_fast.patch("openrlhf")
    patched = openrlhf_run(estimator)
    assert patched == pytest.approx(without, rel=1e-4, abs=1e-5)
    called = {
        name.rsplit(".", 2)[1] + "." + name.rsplit(".", 1)[1]: calls for name, calls in record.calls.items()
    }
    assert called["PolicyLoss.forward"] == called["ValueLoss.forward"] == 2 * STEPS
    assert called["utils.log_probs_from_logits"] == 4 * STEPS
    scan = {"gae": "get_advantages_and_returns", "reinforce": "get_cumulative_returns"}[estimator]
    assert called[f"RemoteExperienceMaker.{scan}"] == STEPS
