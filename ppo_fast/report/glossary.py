"""Every metric that a run logs: its unit and one line on what it means."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """Unit and meaning of a metric."""

    unit: str
    meaning: str


GLOSSARY: dict[str, Metric] = {
    "event": Metric("", "`eval` on the line of an evaluation; absent on a training step"),
    "step": Metric("steps", "PPO steps done: one step is one batch of rollouts and all its update epochs"),
    "episode": Metric("responses", "responses sampled for training so far"),
    "objective/scores": Metric(
        "reward", "mean score of the batch's responses, before clipping and without KL"
    ),
    "objective/dropped": Metric(
        "responses",
        "samples left out of the step because their reward failed, where `on_error: drop` allows it",
    ),
    "objective/kl": Metric(
        "nats per sequence",
        "KL of the sampling policy from the reference, estimated per token and summed over a response",
    ),
    "objective/kl_coef": Metric("reward per nat", "weight of the KL term in the reward during this step"),
    "objective/rlhf_reward": Metric(
        "reward",
        "score as paid (clipped) plus the KL term, a response's whole reward: what PPO maximises",
    ),
    "objective/non_score_reward": Metric(
        "reward", "the KL term alone, summed over a response: -kl_coef x KL"
    ),
    "objective/entropy": Metric(
        "nats per token",
        "mean entropy of the sampling policy's next-token distribution",
    ),
    "loss/policy": Metric(
        "",
        "clipped policy loss, less the entropy bonus if any, mean over the step's updates",
    ),
    "loss/value": Metric("reward squared", "clipped value loss, mean over the step's updates"),
    "policy/approx_kl": Metric(
        "nats per token",
        "mean of ratio - 1 - log ratio: how far the updates moved the policy; 0 on the first minibatch",
    ),
    "policy/clip_fraction": Metric("fraction", "share of tokens whose ratio the clip held back"),
    "policy/ratio_mean": Metric("", "mean of the probability ratio new to old; 1 means no move"),
    "policy/ratio_max": Metric("", "largest probability ratio new to old of any token"),
    "policy/entropy": Metric("nats per token", "as `objective/entropy`, of the policy while it is updated"),
    "value/clip_fraction": Metric("fraction", "share of tokens whose value loss is the clipped one"),
    "value/explained_variance": Metric(
        "",
        "1 - var(returns - values) / var(returns): 1 is perfect, 0 no better than a constant, below 0 worse",
    ),
    "value/mean": Metric("reward", "mean value that the critic gave the sampled tokens"),
    "returns/mean": Metric("reward", "mean return (advantage plus value), the critic's target"),
    "advantages/mean": Metric("reward", "mean advantage before whitening"),
    "advantages/std": Metric("reward", "standard deviation of the advantages before whitening"),
    "response/length_mean": Metric("tokens", "mean response length, end-of-sequence token included"),
    "response/length_max": Metric("tokens", "longest response of the batch"),
    "response/eos_fraction": Metric(
        "fraction", "share of responses that ended by themselves, not at the limit"
    ),
    "optim/actor_lr": Metric("", "learning rate of the actor"),
    "optim/critic_lr": Metric("", "learning rate of the critic"),
    "optim/actor_grad_norm": Metric(
        "", "norm of the actor's gradient before clipping, mean over the step's updates"
    ),
    "optim/critic_grad_norm": Metric(
        "", "norm of the critic's gradient before clipping, mean over the step's updates"
    ),
    "optim/micro_batch_size": Metric(
        "sequences", "size of a micro-batch: the configured one, or less after memory ran out"
    ),
    "optim/skipped_updates": Metric(
        "updates", "updates of the step that were skipped because a loss or gradient was not finite"
    ),
    "time/rollout": Metric("seconds", "sampling the responses"),
    "time/scoring": Metric("seconds", "reward, and log-probabilities and values of all models"),
    "time/experience": Metric("seconds", "KL-shaped rewards, advantages, returns"),
    "time/update": Metric("seconds", "forward, backward and optimiser over all epochs and minibatches"),
    "time/step": Metric("seconds", "the whole step"),
    "throughput/tokens_per_second": Metric(
        "tokens per second", "response tokens of the step / time of the step"
    ),
    "eval/score": Metric("reward", "mean score of the responses to held-out prompts"),
    "eval/score_std": Metric("reward", "standard deviation of that score over the held-out prompts"),
    "eval/kl": Metric(
        "nats per sequence",
        "mean summed log-probability ratio of policy to reference, on held-out prompts",
    ),
    "eval/length_mean": Metric("tokens", "mean response length on held-out prompts"),
    "eval/eos_fraction": Metric("fraction", "share of held-out responses that ended by themselves"),
    "eval/<judge>": Metric(
        "judge's own",
        "mean of an outside judge that training never sees, such as `eval/vader`, on held-out prompts",
    ),
}


def is_judge(metric: str) -> bool:
    """Whether a metric name is that of an outside judge: under `eval/` and none of the fixed names."""
    return metric.startswith("eval/") and metric not in GLOSSARY


def glossary_markdown() -> str:
    """The glossary as a Markdown table, a row a metric, without a final newline."""
    rows = [f"| `{name}` | {metric.unit} | {metric.meaning} |" for name, metric in GLOSSARY.items()]
    return "\n".join(["| metric | unit | meaning |", "|---|---|---|", *rows])
