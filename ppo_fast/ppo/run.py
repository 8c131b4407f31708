"""A whole run from a config: load, check, train, evaluate, record, save, report."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from ppo_fast.ppo import models
from ppo_fast.ppo.config import PPOConfig
from ppo_fast.ppo.evaluate import Evaluation
from ppo_fast.ppo.recorder import Recorder, check_folder, drop_after, open_folder
from ppo_fast.ppo.rewards import Reward, load_function, load_reward, token_models
from ppo_fast.ppo.rollout import Prompt, encode_prompts
from ppo_fast.ppo.trainer import PPOTrainer
from ppo_fast.prepare.data import read_rows
from ppo_fast.prepare.folders import write_whole
from ppo_fast.report import (
    describe_environment,
    print_samples,
    print_summary,
    read_run,
    summarise,
    write_model_card,
    write_report,
)

FINISHED = "finished.json"  # written last: what is in the folder then is all there
PROMPT_KEYS = [("prompt",), ("messages",)]


def train(config: PPOConfig) -> Path:
    """Run PPO as `config` says; returns the run folder, which then holds

    config.yaml, environment.json, metrics.jsonl, samples.jsonl, tensorboard/, checkpoints/ (if asked for), actor/ and
    critic/ (save_pretrained layout, model card), report.html, its PNG curves, and finished.json.

    A finished run that is resumed is reported again and not trained further.

    Raises:
        ValueError, FileNotFoundError: a setting, a file or a model is not usable; nothing was written then.
        RewardError: a reward function failed while training; the run folder keeps what was done.
    """
    folder = Path(config.output_dir)
    resume = config.resume == "auto"
    refuse_before_loading(config)
    check_folder(folder, config.to_dict(), resume=resume)
    if resume and (folder / FINISHED).is_file():
        tqdm.write(f"{folder} holds a finished run")
        _print(folder, config)
        return folder
    trainer = build_trainer(config)
    open_folder(folder, config.to_dict())
    write_whole(folder / "environment.json", json.dumps(describe_environment(), indent=1))
    if trainer.restore(folder / "checkpoints"):
        tqdm.write(f"resuming after step {trainer.steps_done}")
    # Without a checkpoint nothing of an interrupted run counts, the evaluation before its first step included.
    drop_after(folder, trainer.steps_done if trainer.steps_done else -1)
    with Recorder(folder, tensorboard=config.tensorboard, first_step=trainer.steps_done + 1) as recorder:
        _loop(trainer, config, recorder, folder)
    _save(trainer, config, folder)
    _print(folder, config)
    return folder


def refuse_before_loading(config: PPOConfig) -> None:
    """The cheap refusals first: ValueError for a setting that has no default and is not set."""
    if not config.output_dir:
        raise ValueError("output_dir is not set, expected a new folder for the run")
    if not config.data.prompts:
        raise ValueError("data.prompts is not set, expected a .jsonl or .csv file of prompts")
    if not config.rewards:
        raise ValueError("rewards is empty, expected at least one `model` or `function`")


def build_trainer(config: PPOConfig) -> PPOTrainer:
    """Read the data and load the four models as `config` names them, every check included."""
    set_seed(config.seed)
    transformers_logging.disable_progress_bar()
    data, trust = config.data, config.models.trust_remote_code
    prompt_rows = read_rows(data.prompts, PROMPT_KEYS)
    eval_rows = read_rows(data.eval_prompts, PROMPT_KEYS) if data.eval_prompts else []
    judges = {
        name: load_function(spec, f"evaluation.judges.{name}")
        for name, spec in config.evaluation.judges.items()
    }
    tokenizer = models.load_tokenizer(config.models.actor, "models.actor", trust_remote_code=trust)
    prompts = encode_prompts(prompt_rows, tokenizer, data.prompts)
    eval_prompts: Sequence[Prompt] = encode_prompts(eval_rows, tokenizer, str(data.eval_prompts))
    actor = models.load_causal_lm(config.models.actor, "models.actor", config.models)
    reward = load_reward(config.rewards, tokenizer, config.models, config.objective.micro_batch_size)
    return PPOTrainer(
        config,
        actor=actor,
        critic=load_critic(config, actor, reward, tokenizer),
        reference=load_reference(config, actor),
        reward=reward,
        tokenizer=tokenizer,
        prompts=prompts,
        eval_prompts=eval_prompts,
        judges=judges,
    )


def load_reference(config: PPOConfig, actor: PreTrainedModel) -> PreTrainedModel:
    """The frozen reference: its own folder, or a copy of the actor before it learns."""
    if config.models.reference is None:
        return models.freeze(copy.deepcopy(actor))
    reference = models.load_causal_lm(config.models.reference, "models.reference", config.models)
    models.check_same_vocabulary(actor, reference)
    return models.freeze(reference)


def load_critic(
    config: PPOConfig, actor: PreTrainedModel, reward: Reward, tokenizer: Tokenizer
) -> PreTrainedModel:
    """The critic by `models.critic`: from the reward model, from the actor, or from a folder."""
    choice = config.models.critic
    source = next(iter(token_models(reward)), None)
    if choice == "reward" and source is None:
        raise ValueError(
            "models.critic is `reward`, but no reward model reads the actor's tokens; try `actor`"
        )
    if choice in ("auto", "reward") and source is not None:
        return models.critic_from_classifier(source)
    if choice in ("auto", "actor"):
        return models.critic_from_actor(actor)
    trust = config.models.trust_remote_code
    own = models.load_tokenizer(choice, "models.critic", trust_remote_code=trust)
    models.check_same_tokenizer(tokenizer, own, choice, "models.critic")
    return models.load_classifier(choice, "models.critic", config.models).requires_grad_(True)


def _loop(trainer: PPOTrainer, config: PPOConfig, recorder: Recorder, folder: Path) -> None:
    every = config.evaluation.every
    if trainer.steps_done == 0:
        _evaluate(trainer, recorder)
    bar = tqdm(total=config.steps, initial=trainer.steps_done, desc="PPO", unit="step", dynamic_ncols=True)
    with bar:
        while trainer.steps_done < config.steps:
            metrics = trainer.step()
            step = trainer.steps_done
            recorder.metrics({"step": step, "episode": step * config.rollout.batch_size, **metrics})
            bar.set_postfix_str(_postfix(metrics))
            bar.update()
            if step == config.steps or (every and step % every == 0):
                _evaluate(trainer, recorder)
            if config.checkpoint.every and step % config.checkpoint.every == 0 and step < config.steps:
                trainer.save_checkpoint(folder / "checkpoints")


def _postfix(metrics: dict[str, float]) -> str:
    return (
        f"reward {metrics['objective/scores']:.3f}, KL {metrics['objective/kl']:.2f} nats, "
        f"{metrics['throughput/tokens_per_second']:.0f} tokens/s"
    )


def _evaluate(trainer: PPOTrainer, recorder: Recorder) -> None:
    if not trainer.evaluator.prompts:
        return
    evaluation: Evaluation = trainer.evaluate()
    recorder.metrics({"event": "eval", "step": trainer.steps_done, **evaluation.metrics})
    recorder.samples(evaluation.samples)
    shown = ", ".join(
        f"{name.removeprefix('eval/')} {value:.3f}" for name, value in evaluation.metrics.items()
    )
    tqdm.write(f"held out, step {trainer.steps_done}: {shown}")


def _save(trainer: PPOTrainer, config: PPOConfig, folder: Path) -> None:
    for learner in (trainer.actor, trainer.critic):
        learner.model.save_pretrained(folder / learner.name)
        trainer.tokenizer.save_pretrained(folder / learner.name)
    run = read_run(folder)
    settings: dict[str, Any] = config.to_dict()
    write_model_card(folder / "actor", config.models.actor, settings, summarise(run))
    write_report(run)
    write_whole(folder / FINISHED, json.dumps({"steps": trainer.steps_done}))


def _print(folder: Path, config: PPOConfig) -> None:
    if config.evaluation.show_samples:
        print_samples(folder, count=config.evaluation.show_samples)
    print_summary(folder)
    print(f"report: {folder / 'report.html'}   tuned model: {folder / 'actor'}")
