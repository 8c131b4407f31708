"""Sampling: padding, ends, honesty of the sampled distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from ppo_fast.ppo.config import RolloutConfig
from ppo_fast.ppo.experience import PolicyView
from ppo_fast.ppo.models import position_ids, response_logits
from ppo_fast.ppo.rollout import (
    PromptSampler,
    check_prompts,
    counted_tokens,
    decode,
    encode_prompts,
    end_token_ids,
    ended,
    generate,
    generation_config,
    left_pad,
)
from ppo_fast.ppo.sampling import SeededSampling, stream_seeds

CPU = torch.device("cpu")


def test_prompts_are_padded_on_the_left(world: Any) -> None:
    ids, mask = left_pad(world.prompts[:3], 0, CPU)  # "the film was", "a film", "the"
    assert ids.tolist() == [[5, 7, 8], [0, 6, 7], [0, 0, 5]]
    assert mask.tolist() == [[True] * 3, [False, True, True], [False, False, True]]


def test_position_ids_ignore_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 3, 3]]


def test_logits_do_not_depend_on_padding(world: Any) -> None:
    """A short prompt beside a long one scores as it does alone: mask and position ids are right."""
    actor = world.actor()
    ids = torch.tensor([[0, 0, 0, 5, 9, 10, 0], [5, 6, 7, 8, 11, 12, 13]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]])
    together = response_logits(actor, ids, mask, 3, bf16=False)
    alone = response_logits(actor, ids[:1, 3:6], mask[:1, 3:6], 2, bf16=False)
    torch.testing.assert_close(together[:1, :2], alone, rtol=1e-4, atol=1e-5)
    full = actor(ids[1:], attention_mask=mask[1:]).logits
    torch.testing.assert_close(together[1:], full[:, 3:6], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("row", "expected", "stops"),
    [
        ([7, 8, 1, 0, 0], [1, 1, 1, 0, 0], True),  # the end token counts, padding does not
        ([7, 8, 9, 10, 11], [1, 1, 1, 1, 1], False),  # truncated
        ([1, 0, 0, 0, 0], [1, 0, 0, 0, 0], True),  # ends at once
        ([7, 0, 8, 1, 0], [1, 1, 1, 1, 0], True),  # a pad id that was sampled is an action like any other
        ([7, 1, 1, 1, 1], [1, 1, 0, 0, 0], True),  # where pad and end share an id, the first one is the end
    ],
)
def test_counted_tokens(row: list[int], expected: list[int], stops: bool) -> None:
    ids = torch.tensor([row])
    mask = counted_tokens(ids, [1])
    assert mask.long().tolist() == [expected]
    assert ended(ids, mask, [1]).tolist() == [stops]


def test_pad_equal_to_end_changes_no_mask(world: Any) -> None:
    """DeepSpeed-Chat and many tokenizers set pad = eos; the end token must keep its gradient all the same."""
    same = world.other_tokenizer(world.tokenizer.get_vocab())
    same.pad_token = same.eos_token
    rollouts = []
    for tokenizer in (world.tokenizer, same):
        torch.manual_seed(4)
        rollouts.append(generate(world.actor(), tokenizer, world.prompts, RolloutConfig(max_new_tokens=6)))
    assert rollouts[0].ended.any()
    assert torch.equal(rollouts[0].response_mask, rollouts[1].response_mask)
    counted = rollouts[0].response_mask
    assert torch.equal(rollouts[0].response_ids[counted], rollouts[1].response_ids[counted])


def test_truncated_responses_are_known(world: Any) -> None:
    torch.manual_seed(0)
    rollout = generate(world.actor(), world.tokenizer, world.prompts, RolloutConfig(max_new_tokens=6))
    lengths = rollout.response_mask.sum(1)
    assert 0 < int(rollout.ended.sum()) < rollout.batch_size
    assert (lengths[~rollout.ended] == 6).all()
    last = rollout.response_ids.gather(1, lengths[:, None] - 1).squeeze(1)
    ends = torch.tensor(end_token_ids(world.actor(), world.tokenizer))
    assert torch.equal(torch.isin(last, ends), rollout.ended)


def test_chunks_keep_prompts_and_responses_together(world: Any) -> None:
    config = RolloutConfig(max_new_tokens=6, generation_batch_size=3)
    rollout = generate(world.actor(), world.tokenizer, world.prompts, config)
    assert rollout.prompts == [prompt.text for prompt in world.prompts]
    assert rollout.response_ids.shape[0] == len(world.prompts)
    assert rollout.responses == decode(world.tokenizer, rollout.response_ids, rollout.response_mask)


SETTINGS = [
    RolloutConfig(max_new_tokens=6),
    RolloutConfig(max_new_tokens=6, temperature=0.6),
    RolloutConfig(max_new_tokens=6, top_p=0.7),
    RolloutConfig(max_new_tokens=6, temperature=1.4, top_k=6, top_p=0.9),
]


@pytest.mark.parametrize("config", SETTINGS, ids=["plain", "temperature", "top_p", "all three"])
def test_scored_distribution_is_the_sampled_one(
    world: Any, monkeypatch: pytest.MonkeyPatch, config: RolloutConfig
) -> None:
    """Logprobs that the trainer scores against those of the sampler's own processed scores, token by token."""
    from ppo_fast.ppo.experience import kept_tokens

    actor = world.actor()
    # What a model's own settings would do to the distribution if they leaked into sampling.
    actor.generation_config = GenerationConfig(
        repetition_penalty=5.0, top_k=2, min_new_tokens=4, bad_words_ids=[[9]], eos_token_id=1
    )
    recorded: list[torch.Tensor] = []
    distribution = SeededSampling.distribution

    def spy(self: SeededSampling, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        recorded.append(distribution(self, ids, scores))
        return recorded[-1]

    monkeypatch.setattr(SeededSampling, "distribution", spy)
    torch.manual_seed(1)
    rollout = generate(actor, world.tokenizer, world.prompts, config)
    scores = torch.stack(recorded, 1)[:, : rollout.response_ids.shape[1]]
    sampled = (
        torch.log_softmax(scores.double(), -1).gather(-1, rollout.response_ids.unsqueeze(-1)).squeeze(-1)
    )
    view = PolicyView(config.temperature, bf16=False, impl="reference")
    with torch.no_grad():
        logits = view.logits(actor, rollout, slice(0, 8))
        kept = kept_tokens(logits, rollout.response_ids, config)
        logprobs, _ = view.score(logits, rollout.response_ids, kept)
    mask = rollout.response_mask
    torch.testing.assert_close(logprobs[mask].double(), sampled[mask], rtol=1e-3, atol=1e-4)
    assert actor.generation_config.repetition_penalty == 5.0  # set aside while sampling, not thrown away


def test_nothing_but_the_sampler_touches_the_scores(world: Any) -> None:
    """generate's own settings would add warpers, such as top-k 50, which no vocabulary of this file's size notices."""
    config = generation_config(RolloutConfig(temperature=0.5, top_p=0.5, top_k=3), [1], 0)
    names = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "min_new_tokens", "min_p")
    assert [name for name in names if getattr(config, name)] == []


def test_samples_follow_the_distribution() -> None:
    """20,000 draws from four logits at temperature 2, each with its own seed: frequencies within four deviations."""
    logits = torch.tensor([2.0, 0.0, -1.0, -torch.inf])
    truth = torch.softmax(logits.double() / 2, 0)
    rows = 20_000
    sampling = SeededSampling(
        RolloutConfig(temperature=2.0), stream_seeds(0, "training", 0, rows), torch.device("cpu")
    )
    none = torch.empty(0, dtype=torch.long)
    chosen = sampling(none, logits.expand(rows, 4).clone()).argmax(-1)
    share = torch.bincount(chosen, minlength=4).double() / rows
    assert ((share - truth).abs() <= 4 * (truth * (1 - truth) / rows).sqrt()).all()
    again = sampling(none, logits.expand(rows, 4).clone()).argmax(-1)  # the next token: new draws, as good
    both = torch.bincount(chosen * 4 + again, minlength=16).double().view(4, 4) / rows
    pairs = truth[:, None] * truth
    assert ((both - pairs).abs() <= 4 * (pairs * (1 - pairs) / rows).sqrt()).all()


def test_a_response_depends_on_its_own_seed_alone(world: Any) -> None:
    """The same prompts in other company, in another order and padded wider, as another number of processes has them."""
    config = RolloutConfig(max_new_tokens=6)
    seeds = stream_seeds(3, "training", 0, 8)
    whole = generate(world.actor(), world.tokenizer, world.prompts, config, seeds=seeds)
    assert len(set(whole.responses)) > 1
    rows = [6, 1, 4]
    part = generate(
        world.actor(),
        world.tokenizer,
        [world.prompts[row] for row in rows],
        config,
        seeds=[seeds[row] for row in rows],
        prompt_width=11,
    )
    assert part.prompt_ids.shape[1] == 11
    assert part.responses == [whole.responses[row] for row in rows]
    other = generate(
        world.actor(), world.tokenizer, world.prompts, config, seeds=stream_seeds(4, "training", 0, 8)
    )
    assert other.responses != whole.responses


def test_seeds_of_a_run_do_not_collide() -> None:
    """mt19937 takes 32 bits of a seed: among these few streams none may meet."""
    found = [
        seed % 2**32
        for run in range(4)
        for stream in ("training", "evaluation", "order")
        for seed in stream_seeds(run, stream, 0, 500)
    ]
    assert len(set(found)) == len(found)
    assert stream_seeds(1, "training", 100, 3) == stream_seeds(1, "training", 0, 103)[100:]


def test_kl_of_equal_policies_is_zero_under_every_sampler(world: Any) -> None:
    for config in SETTINGS:
        trainer = world.trainer(world.config(rollout=RolloutConfig(**{**config.__dict__, "batch_size": 8})))
        scored = trainer.score(trainer.sample(world.prompts))
        assert torch.equal(scored.logprobs, scored.ref_logprobs)


def test_sampler_draws_every_prompt_once_a_pass_and_resumes(world: Any) -> None:
    sampler = PromptSampler(world.prompts, seed=3)
    drawn = [prompt.text for prompt in sampler.draw(5) + sampler.draw(3)]
    assert sorted(drawn) == sorted(prompt.text for prompt in world.prompts)
    assert drawn != [prompt.text for prompt in world.prompts]
    rest = [prompt.text for prompt in sampler.draw(8)]
    assert rest != drawn
    again = PromptSampler(world.prompts, seed=3)
    again.drawn = 8
    assert [prompt.text for prompt in again.draw(8)] == rest


def test_messages_go_through_the_chat_template(world: Any) -> None:
    tokenizer = world.other_tokenizer(world.tokenizer.get_vocab())
    record = {"messages": [{"role": "user", "content": "the film"}]}
    with pytest.raises(ValueError, match="record 1 has `messages`, but the tokenizer has no chat template"):
        encode_prompts([record], tokenizer, "chat.jsonl")
    tokenizer.chat_template = (
        "{% for m in messages %}a {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}was{% endif %}"
    )
    assert encode_prompts([record], tokenizer, "chat.jsonl")[0].text == "a the film was"


def test_a_chat_that_the_template_refuses_is_named(world: Any) -> None:
    tokenizer = world.other_tokenizer(world.tokenizer.get_vocab())
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    record = {"messages": [{"role": "user", "content": "the film"}]}
    with pytest.raises(ValueError, match="chat.jsonl: record 1: the chat template refuses it: roles must"):
        encode_prompts([record], tokenizer, "chat.jsonl")


def test_prompts_open_as_the_tokenizer_opens_texts(world: Any) -> None:
    """BOS where the tokenizer adds one, as in training; an EOS that it adds would end the prompt and stays out."""
    from tokenizers.processors import TemplateProcessing

    from ppo_fast.prepare.reward_model import _encode_one

    tokenizer = world.other_tokenizer(world.tokenizer.get_vocab())
    row = {"prompt": "the film", "chosen": "was good"}
    assert encode_prompts([row], tokenizer, "x")[0].ids == (5, 7)
    assert _encode_one(row, 1, "chosen", tokenizer, 9, eos=False) == [5, 7, 8, 3]
    tokenizer.bos_token = "<unk>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A <eos>", special_tokens=[("<unk>", 2), ("<eos>", 1)]
    )
    assert tokenizer("the film").input_ids == [2, 5, 7, 1]
    assert encode_prompts([row], tokenizer, "x")[0].ids == (2, 5, 7)
    assert _encode_one(row, 1, "chosen", tokenizer, 9, eos=False) == [2, 5, 7, 8, 3]


@pytest.mark.parametrize(
    "chat", ["the film", [], [{"role": "user"}], ["the film"], [{"role": "user", "content": 5}]]
)
def test_messages_that_are_no_chat_are_refused(world: Any, chat: Any) -> None:
    tokenizer = world.other_tokenizer(world.tokenizer.get_vocab())
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match=r"chat.jsonl: record 1 has `messages` that are no list of"):
        encode_prompts([{"messages": chat}], tokenizer, "chat.jsonl")


@pytest.mark.parametrize("prompt", ["", "   \n", 5])
def test_blank_prompts_are_refused(world: Any, prompt: Any) -> None:
    records = [{"prompt": "the film"}, {"prompt": prompt}]
    with pytest.raises(ValueError, match=r"data.jsonl: record 2 has the prompt .*, expected text"):
        encode_prompts(records, world.tokenizer, "data.jsonl")


def test_prompts_beyond_the_context_are_refused(world: Any) -> None:
    long = encode_prompts([{"prompt": "the film"}, {"prompt": "the " * 60}], world.tokenizer, "data.jsonl")
    with pytest.raises(
        ValueError, match=r"record 2 has 60 tokens; .*over the context of models.actor, 64 tokens"
    ):
        check_prompts(long, world.actor(), "models.actor", 6, "data.jsonl")
    check_prompts(long, world.actor(), "models.actor", 4, "data.jsonl")
