"""DeepSpeed-Chat: the caller's exact pattern against its formulas in float64, and against its source where importable.

It is not on PyPI. With `applications/DeepSpeed-Chat` of DeepSpeedExamples on PYTHONPATH the tests of `source` run too;
DeepSpeed itself may be missing, since none of the functions reaches it.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
import torch
from torch import Tensor

import ppo_fast
from ppo_fast.integrations import deepspeed_chat as ours

PAD = 0
PROMPT, WIDTH, VOCAB = 4, 9, 23
START = PROMPT - 1
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def source() -> Iterator[SimpleNamespace]:
    """Its modules, with a stand-in for DeepSpeed where that is missing."""
    if importlib.util.find_spec("dschat") is None:
        pytest.skip(
            "DeepSpeed-Chat is not on PyPI: put applications/DeepSpeed-Chat of DeepSpeedExamples on PYTHONPATH"
        )
    importlib.import_module(
        "transformers.modeling_utils"
    )  # looks for DeepSpeed, so before that has a stand-in
    absent = ("deepspeed", "deepspeed.accelerator", "deepspeed.runtime.zero.partition_parameters")
    stands_in = (
        {} if importlib.util.find_spec("deepspeed") else {name: MagicMock(name=name) for name in absent}
    )
    with patch.dict(sys.modules, stands_in):
        trainer = importlib.import_module("dschat.rlhf.ppo_trainer")
        reward = importlib.import_module("dschat.utils.model.reward_model")
        yield SimpleNamespace(ppo_trainer=trainer, reward_model=reward)


class Engine:
    """What DeepSpeed wraps round a model, as far as the trainer calls it; plain SGD."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.forward_value = module, getattr(module, "forward_value", None)
        self.optimizer = MagicMock()

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        for parameter in self.module.parameters():
            parameter.data -= 0.1 * parameter.grad
            parameter.grad = None

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()


class Language(torch.nn.Module):
    """Logits that depend on the token alone, and a generation that is given."""

    def __init__(self, dtype: torch.dtype, generated: Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(VOCAB, VOCAB, dtype=dtype))
        self.generated, self.config = generated, SimpleNamespace(model_type="opt")

    def forward(self, input_ids: Tensor, **kwargs: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])

    def generate(self, *args: object, **kwargs: object) -> Tensor:
        return self.generated


class Value(torch.nn.Module):
    """A reward model with its method under test."""

    forward_value = ours.forward_value

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(VOCAB, 6, dtype=dtype)
        self.v_head = torch.nn.Linear(6, 1, bias=False, dtype=dtype)
        self.config, self.PAD_ID = SimpleNamespace(model_type="opt"), PAD

    def rwtransformer(self, input_ids: Tensor, **kwargs: object) -> tuple[Tensor]:
        return (self.table(input_ids),)


def sequences() -> Tensor:
    """Prompts padded on the left; answers that fill the width, end early, and have two tokens."""
    ids = torch.randint(2, VOCAB, (4, WIDTH))
    ids[0, :2] = PAD
    ids[1, 7:], ids[2, 6:] = PAD, PAD
    return ids


def settings(**changes: object) -> SimpleNamespace:
    defaults = {"kl_ctl": 0.1, "clip_reward_value": 5, "cliprange": 0.2, "cliprange_value": 0.2}
    defaults |= {"gamma": 1.0, "lam": 0.95, "compute_fp32_loss": False}
    return SimpleNamespace(**(defaults | changes))


def experience(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    ids = sequences()
    shape = (4, WIDTH - 1)
    return {
        "prompts": ids[:, :PROMPT],
        "logprobs": (-2 * torch.rand(shape)).to(dtype),
        "ref_logprobs": (-2 * torch.rand(shape)).to(dtype),
        "value": torch.randn(shape).to(dtype),
        "rewards": (6 * torch.randn(4)).to(dtype),
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
    }


def close(a: Tensor, b: Tensor, dtype: torch.dtype, steps: int = 4) -> None:
    """To a few roundings of the dtype, which the original takes at every step and ours once."""
    slack = max(1e-5, steps * torch.finfo(dtype).eps)
    torch.testing.assert_close(a.double(), b.double(), rtol=slack, atol=slack, equal_nan=True)


# The formulas of the source, written out for float64.


def true_rewards(data: dict[str, Tensor], kl_ctl: float, clip: float) -> Tensor:
    rewards = -kl_ctl * (data["logprobs"].double() - data["ref_logprobs"].double())
    for row, score, mask in zip(
        rewards, data["rewards"].double(), data["attention_mask"][:, 1:], strict=True
    ):
        end = START + int(mask[START:].sum()) + 1  # one slot beyond the answer
        row[min(end, len(row)) - 1] += min(max(score, -clip), clip)
    return rewards


def true_gae(values: Tensor, rewards: Tensor, start: int, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    values, rewards = values.double(), rewards.double()
    advantages = torch.zeros_like(rewards)
    for row in range(len(rewards)):
        running, following = 0.0, 0.0
        for t in reversed(range(start, rewards.shape[1])):
            running = rewards[row, t] + gamma * following - values[row, t] + gamma * lam * running
            advantages[row, t], following = running, values[row, t]
    advantages = advantages[:, start:]
    return advantages, advantages + values[:, start:]


def true_actor_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> Tensor:
    ratio = ((logprobs - old) * mask).exp()
    terms = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return (terms * mask).sum() / mask.sum()


def true_critic_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    clipped = values.clamp(old - clip, old + clip)
    return 0.5 * (torch.max((values - returns) ** 2, (clipped - returns) ** 2) * mask).sum() / mask.sum()


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_log_probs(dtype: torch.dtype) -> None:
    """On the view [:, :-1], as it is called, and under autocast."""
    logits, labels = (3 * torch.randn(3, 6, 97)).to(dtype), torch.randint(97, (3, 6))
    leaf, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = ours.gather_log_probs(leaf[:, :-1], labels[:, 1:])
    truth = wide[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].unsqueeze(-1)).squeeze(-1)
    assert got.dtype == dtype
    close(got, truth, dtype, steps=1)
    got.sum().backward()
    truth.sum().backward()
    close(leaf.grad, wide.grad, dtype, steps=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours.gather_log_probs(logits, labels).dtype == logits.log_softmax(-1).dtype


def test_gather_log_probs_refuses_what_torch_refuses() -> None:
    logits = torch.randn(2, 3, 5)
    for labels in (torch.full((2, 3), 5), torch.full((2, 3), -1), torch.zeros(3, 3, dtype=torch.int64)):
        with pytest.raises(RuntimeError):
            ours.gather_log_probs(logits, labels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kl_ctl", "clip"), [(0.1, 5), (0.0, 0.5), (0.7, 0)])
def test_compute_rewards(dtype: torch.dtype, kl_ctl: float, clip: float) -> None:
    data = experience(dtype)
    got = ours.compute_rewards(
        settings(kl_ctl=kl_ctl, clip_reward_value=clip),
        data["prompts"],
        data["logprobs"],
        data["ref_logprobs"],
        data["rewards"],
        data["attention_mask"][:, 1:],
    )
    assert got.dtype == dtype
    close(got, true_rewards(data, kl_ctl, clip), dtype)


def test_compute_rewards_needs_an_answer() -> None:
    data = experience()
    with pytest.raises(IndexError, match="none after"):
        ours.compute_rewards(
            settings(),
            data["input_ids"],
            data["logprobs"],
            data["ref_logprobs"],
            data["rewards"],
            data["attention_mask"][:, 1:],
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.99, 1.0)])
@pytest.mark.parametrize("start", [0, START, WIDTH - 2])
def test_advantages_and_returns(dtype: torch.dtype, gamma: float, lam: float, start: int) -> None:
    data = experience(dtype)
    values, rewards = data["value"].requires_grad_(), data["logprobs"]
    got, got_returns = ours.get_advantages_and_returns(settings(gamma=gamma, lam=lam), values, rewards, start)
    advantages, returns = true_gae(values.detach(), rewards, start, gamma, lam)
    assert got.dtype == got_returns.dtype == dtype
    assert not got.requires_grad
    assert got_returns.requires_grad
    close(got, advantages, dtype, steps=8)
    close(got_returns, returns, dtype, steps=8)


def test_advantages_need_a_column() -> None:
    with pytest.raises(RuntimeError, match="`start`"):
        ours.get_advantages_and_returns(settings(), torch.randn(2, 3), torch.randn(2, 3), 3)


def tokens(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    mask = (torch.rand(4, 7) < 0.7).long()
    return [torch.randn(4, 7).to(dtype) for _ in range(3)], mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip", [0.2, 0.0, 1.5])
@pytest.mark.parametrize("name", ["actor", "critic"])
def test_losses(dtype: torch.dtype, clip: float, name: str) -> None:
    (first, old, third), mask = tokens(dtype)
    mine = ours.actor_loss_fn if name == "actor" else ours.critic_loss_fn
    truth = true_actor_loss if name == "actor" else true_critic_loss
    leaf, wide = first.clone().requires_grad_(), first.double().requires_grad_()
    got = mine(settings(cliprange=clip, cliprange_value=clip), leaf, old, third, mask)
    want = truth(wide, old.double(), third.double(), mask, clip)
    assert got.dtype == dtype
    close(got.detach(), want.detach(), dtype, steps=8)
    got.backward()
    want.backward()
    close(leaf.grad, wide.grad, dtype, steps=8)


def test_ties_split_and_bounds_pass_as_in_torch() -> None:
    """Equal terms share the gradient in halves; clamp passes it at its bound."""
    zeros, mask = torch.zeros(2, 3), torch.ones(2, 3).long()
    advantages = torch.tensor([[1.0, -1.0, 0.0], [2.0, -2.0, 0.5]])
    at_bound = torch.log(torch.tensor(1.2, dtype=torch.float64)).float()
    for logprobs in (zeros, zeros + at_bound):
        leaves = [logprobs.clone().requires_grad_() for _ in range(2)]
        ours.actor_loss_fn(settings(), leaves[0], zeros, advantages, mask).backward()
        true_actor_loss(leaves[1], zeros, advantages, mask, 0.2).backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    values = torch.tensor([[0.2, 0.0, -0.2]])
    leaves = [values.clone().requires_grad_() for _ in range(2)]
    returns, mask = torch.ones(1, 3), torch.ones(1, 3).long()
    ours.critic_loss_fn(settings(), leaves[0], torch.zeros(1, 3), returns, mask).backward()
    true_critic_loss(leaves[1], torch.zeros(1, 3), returns, mask, 0.2).backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


SPOILED = {
    "empty mask": {},
    "NaN under a false mask": {"nan": (0, 1)},
    "infinity under a false mask": {"inf": (0, 1)},
    "NaN under a true mask": {"nan": (0, 0)},
    "overflow under an advantage of 0": {"overflow": (0, 0)},
    "overflow under a positive advantage": {"bounded": (0, 0)},
    "nothing": {"none": (0, 0)},
}


@pytest.mark.parametrize("what", SPOILED)
def test_the_loss_is_nan_where_theirs_is(what: str) -> None:
    (logprobs, old, advantages), _ = tokens(torch.float32)
    mask = (
        torch.zeros(4, 7).long()
        if what == "empty mask"
        else torch.tensor([[1, 0, 1, 1, 0, 1, 1]]).expand(4, 7)
    )
    for kind, slot in SPOILED[what].items():
        if kind in ("nan", "inf"):
            logprobs[slot] = float(kind)
        elif kind in ("overflow", "bounded"):
            logprobs[slot], old[slot] = 100.0, 0.0
            advantages[slot] = 0.0 if kind == "overflow" else 1.0
    got = ours.actor_loss_fn(settings(), logprobs, old, advantages, mask)
    want = true_actor_loss(logprobs, old, advantages, mask, 0.2)
    torch.testing.assert_close(got, want, equal_nan=True)
    value = ours.critic_loss_fn(settings(), logprobs, old, advantages, mask)
    torch.testing.assert_close(value, true_critic_loss(logprobs, old, advantages, mask, 0.2), equal_nan=True)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_value_is_clipped_before_it_is_widened(dtype: torch.dtype) -> None:
    (values, old, returns), mask = tokens(dtype)
    clipped = values.clamp(old - 0.2, old + 0.2).float()
    want = torch.max((values.float() - returns) ** 2, (clipped - returns) ** 2)
    got = ours.critic_loss_fn(settings(compute_fp32_loss=True), values, old, returns, mask)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, 0.5 * (want * mask).sum() / mask.sum())


def test_end_scores() -> None:
    ids, model = sequences(), Value(torch.float32)
    for prompt_length in (PROMPT, WIDTH):
        out = model.forward_value(ids, prompt_length=prompt_length)
        for row, score in enumerate(out["chosen_end_scores"]):
            end = next((t for t in range(prompt_length, WIDTH) if ids[row, t] == PAD), WIDTH)
            assert score == out["values"][row, end - 1]
    assert torch.equal(model.forward_value(ids, return_value_only=True), out["values"])
    with pytest.raises(AssertionError, match="prompt_length"):
        model.forward_value(ids)


class Methods:
    """The methods under test on a trainer like DeepSpeed-Chat's."""

    compute_rewards = ours.compute_rewards
    get_advantages_and_returns = ours.get_advantages_and_returns
    actor_loss_fn = ours.actor_loss_fn
    critic_loss_fn = ours.critic_loss_fn
    generate_experience = ours.generate_experience
    train_rlhf = ours.train_rlhf
    kl_ctl, clip_reward_value, cliprange, cliprange_value, gamma, lam = 0.1, 5, 0.2, 0.2, 1.0, 0.95

    def train(self) -> None:
        self.actor_model.train()
        self.critic_model.train()

    def eval(self) -> None:
        for name in ("actor", "critic", "ref", "reward"):
            getattr(self, f"{name}_model").eval()

    def _generate_sequence(self, prompts: Tensor, mask: Tensor, step: int) -> Tensor:
        self.prompt_length = prompts.shape[1]
        return self.actor_model.module.generate()


def equip(
    trainer: object, dtype: torch.dtype, fp32: bool, align_overflow: bool, value: Callable[..., Value]
) -> object:
    """Give a trainer its models, the same for the same seed."""
    torch.manual_seed(5)
    ids = sequences()
    trainer.actor_model, trainer.ref_model = (Engine(Language(dtype, ids)) for _ in range(2))
    trainer.critic_model, trainer.reward_model = (Engine(value(dtype)) for _ in range(2))
    trainer.tokenizer = SimpleNamespace(pad_token_id=PAD)
    trainer.args = SimpleNamespace(align_overflow=align_overflow, print_answers=False, local_rank=0)
    trainer.compute_fp32_loss, trainer.z3_enabled, trainer.max_answer_seq_len = fp32, False, WIDTH
    trainer.last_generated_experience = None
    return trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fp32", [False, True])
def test_an_update(dtype: torch.dtype, fp32: bool) -> None:
    trainer = equip(Methods(), dtype, fp32, False, Value)
    ids = trainer.actor_model.module.generated
    data = trainer.generate_experience(ids[:, :PROMPT], None, 0)
    logprob_dtype = torch.float32 if fp32 else dtype
    for name, model in (("logprobs", trainer.actor_model), ("ref_logprobs", trainer.ref_model)):
        logits = model(ids).logits[:, :-1].detach()
        want = logits.double().log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        assert data[name].dtype == logprob_dtype
        close(data[name], want, logprob_dtype, steps=1)
    rewards, before = true_rewards(data, 0.1, 5), data["value"].clone()
    ends = START + data["attention_mask"][:, PROMPT:].sum(1) + 1
    past = torch.arange(WIDTH - 1) >= ends.unsqueeze(1)
    rewards[past] = 0
    old = before.masked_fill(past, 0)
    advantages, returns = true_gae(old, rewards, START, 1.0, 0.95)
    actor_loss, critic_loss = trainer.train_rlhf(data)
    assert torch.equal(
        data["value"], old
    )  # the original writes into it, and on later epochs reads what it wrote
    mask = data["attention_mask"][:, PROMPT:]
    logprobs = data["logprobs"][:, START:].double()
    wanted = true_actor_loss(logprobs, logprobs, advantages, mask, 0.2)
    value = true_critic_loss(before[:, START:].double(), old[:, START:].double(), returns, mask, 0.2)
    close(actor_loss.detach(), wanted, dtype, steps=16)
    close(critic_loss.detach(), value, dtype, steps=16)


def test_the_experience_is_scored_in_train_mode() -> None:
    """As in the original, whose dropout is on then."""
    trainer, modes = equip(Methods(), torch.float32, False, False, Value), []
    trainer.eval()
    for model in (trainer.actor_model, trainer.ref_model):
        model.module.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    ids = trainer.actor_model.module.generated
    trainer.generate_experience(ids[:, :PROMPT], None, 0)
    assert modes == [True, False]


@pytest.mark.parametrize("align_overflow", [False, True])
def test_the_order_of_an_update(monkeypatch: pytest.MonkeyPatch, align_overflow: bool) -> None:
    for name in ("dschat", "dschat.utils", "dschat.utils.utils"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    trainer, done = equip(Methods(), torch.float32, False, align_overflow, Value), []

    def recorded(*event: str) -> Callable[..., None]:
        call = getattr(getattr(trainer, f"{event[0]}_model"), event[1])
        return lambda *args: [done.append(event), call(*args)]

    for name, method in (
        ("actor", "backward"),
        ("actor", "step"),
        ("critic", "backward"),
        ("critic", "step"),
    ):
        engine = getattr(trainer, f"{name}_model")
        engine.optimizer.check_overflow.return_value = False
        monkeypatch.setattr(engine, method, recorded(name, method))
    ids = trainer.actor_model.module.generated
    trainer.train_rlhf(trainer.generate_experience(ids[:, :PROMPT], None, 0))
    early, late = ("critic", "backward"), ("actor", "step")
    if not align_overflow:
        early, late = late, early
    assert done == [("actor", "backward"), early, late, ("critic", "step")]


# Against the source itself.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_source_functions(source: SimpleNamespace, dtype: torch.dtype) -> None:
    theirs = source.ppo_trainer.DeepSpeedPPOTrainer
    data, us = experience(dtype), settings()
    mask = data["attention_mask"][:, 1:]
    args = (data["prompts"], data["logprobs"], data["ref_logprobs"], data["rewards"], mask)
    got, want = ours.compute_rewards(us, *args), theirs.compute_rewards(us, *args)
    assert got.dtype == want.dtype
    close(got, want, dtype)
    pairs = zip(
        ours.get_advantages_and_returns(us, data["value"], got, START),
        theirs.get_advantages_and_returns(us, data["value"], got, START),
        strict=True,
    )
    for a, b in pairs:
        assert a.dtype == b.dtype
        close(a, b, dtype, steps=16)
    (first, old, third), mask = tokens(dtype)
    for name in ("actor_loss_fn", "critic_loss_fn"):
        for fp32 in (False, True):
            us = settings(compute_fp32_loss=fp32)
            a, b = (f(us, first, old, third, mask) for f in (getattr(ours, name), getattr(theirs, name)))
            assert a.dtype == b.dtype
            close(a, b, dtype, steps=16)
    logits, labels = torch.randn(3, 6, 97).to(dtype), torch.randint(97, (3, 6))
    close(
        ours.gather_log_probs(logits, labels),
        source.ppo_trainer.gather_log_probs(logits, labels),
        dtype,
        steps=4,
    )


@pytest.mark.parametrize("align_overflow", [False, True])
@pytest.mark.parametrize("overflowed", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_source_update(source: SimpleNamespace, align_overflow: bool, overflowed: tuple[bool, bool]) -> None:
    """Experience and two updates, original against patched: losses, weights, and who skips a step."""
    theirs, reward_model = source.ppo_trainer.DeepSpeedPPOTrainer, source.reward_model.RewardModel

    class TheirValue(Value):
        forward_value = reward_model.forward_value

    def run() -> tuple[list[object], list[Tensor]]:
        TheirValue.forward_value = reward_model.forward_value  # as it is now, patched or not
        trainer = equip(theirs.__new__(theirs), torch.float32, True, align_overflow, TheirValue)
        results: list[object] = []
        for name, over in zip(("actor", "critic"), overflowed, strict=True):
            optimizer = getattr(trainer, f"{name}_model").optimizer
            optimizer.check_overflow.return_value, optimizer.skip_step = over, False
        trainer.kl_ctl, trainer.clip_reward_value, trainer.gamma, trainer.lam = 0.1, 5, 1.0, 0.95
        trainer.cliprange = trainer.cliprange_value = 0.2
        ids = trainer.actor_model.module.generated
        data = trainer.generate_experience(ids[:, :PROMPT], None, 0)
        results += [data[name] for name in sorted(data)]
        for _ in range(2):
            results += [loss.detach() for loss in trainer.train_rlhf(data)]
        results += [getattr(trainer, f"{name}_model").optimizer.skip_step for name in ("actor", "critic")]
        weights = [*trainer.actor_model.module.parameters(), *trainer.critic_model.module.parameters()]
        return results, [x.detach() for x in weights]

    with patch("torch.distributed.get_rank", return_value=0):
        want = run()
        record = ppo_fast.patch("deepspeed_chat")
        try:
            got = run()
        finally:
            ppo_fast.unpatch("deepspeed_chat")
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        else:
            assert a == b
    assert record.calls["dschat.rlhf.ppo_trainer.DeepSpeedPPOTrainer.train_rlhf"] == 2


def test_source_is_restored(source: SimpleNamespace) -> None:
    module: ModuleType = source.ppo_trainer
    before = module.gather_log_probs, dict(vars(module.DeepSpeedPPOTrainer))
    print(ppo_fast.patch("deepspeed_chat"))
    assert module.gather_log_probs is not before[0]
    ppo_fast.unpatch("deepspeed_chat")
    assert (module.gather_log_probs, dict(vars(module.DeepSpeedPPOTrainer))) == before
