"""A whole run from a config: load, check, train, evaluate, record, save, report."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    set_seed,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from ppo_fast.ppo import models
from ppo_fast.ppo.config import PPOConfig
from ppo_fast.ppo.engine_config import (
    learner_settings,
    loading_device,
    optimizer_bytes,
    uses_deepspeed,
    zero_stage,
)
from ppo_fast.ppo.evaluate import Evaluation
from ppo_fast.ppo.interruption import Interrupted, StopSignal
from ppo_fast.ppo.memory import ModelShape, Workload, check_memory, device_memory, estimate_memory
from ppo_fast.ppo.parallel import Shard, agreed, process_group
from ppo_fast.ppo.ranks import Ranks
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

CHECKPOINTS = "checkpoints"
FINISHED = "finished.json"  # written last: what is in the folder then is all there
PROMPT_KEYS = [("prompt",), ("messages",)]


def train(config: PPOConfig) -> Path:
    """Run PPO as `config` says; returns the run folder, which then holds

    config.yaml, environment.json, metrics.jsonl, samples.jsonl, tensorboard/, checkpoints/ (if asked for), actor/ and
    critic/ (save_pretrained layout, model card), report.html, its PNG curves, and finished.json.

    A finished run that is resumed is reported again and not trained further. SIGTERM stops a run within one micro-batch
    (or one sampled token), saves a checkpoint and returns; with `resume` it goes on as if it had never been stopped.

    Raises:
        ValueError, FileNotFoundError: a setting, a file or a model is not usable; nothing was written then.
        RewardError: a reward function failed while training; the run folder keeps what was done.
        FloatingPointError: more updates in a row than `optimizer.max_skipped_updates` were not finite.
        LostRankError: another process of the run died, or did not answer within `parallel.timeout_minutes`.
    """
    refuse_before_loading(config)
    on_cpu = models.resolve_device(config.models.device).type == "cpu"
    timeout, engines = config.parallel.timeout_minutes, uses_deepspeed(config)
    with process_group(timeout, cpu=on_cpu, engines=engines) as ranks:
        return _train(config, ranks)


def _train(config: PPOConfig, ranks: Ranks) -> Path:
    """The run, of all processes together; the first alone writes to the folder, but for its checkpoints."""
    folder = Path(config.output_dir)
    resume = config.resume != "never"

    def check() -> None:
        Shard.of(ranks).check(config.rollout.batch_size, config.objective.minibatches)
        if uses_deepspeed(config):
            for which in ("actor", "critic"):
                learner_settings(config, which, ranks.count)
        check_folder(folder, config.to_dict(), resume=resume)

    agreed(ranks, check)
    if ranks.any(config.resume == "auto" and (folder / FINISHED).is_file()):
        if ranks.first:
            tqdm.write(f"{folder} holds a finished run")
            _print(folder, config)
        return folder
    stop = StopSignal(ranks)
    with stop.listening():
        trainer = build_trainer(config, stop)
        resumed = trainer.restore(folder / CHECKPOINTS, config.resume)
        if ranks.first:
            _open(folder, config, trainer, resumed=resumed)
        try:
            with _recorder(folder, config, trainer) as recorder:
                _loop(trainer, config, recorder, folder)
        except Interrupted:
            saved = trainer.save_checkpoint(folder / CHECKPOINTS)
            if ranks.first:
                tqdm.write(
                    f"SIGTERM: stopped {_place(trainer)} and saved {saved}; resume=auto goes on from there"
                )
            return folder
        _save(trainer, config, folder)
    if ranks.first:
        _print(folder, config)
    return folder


def _recorder(
    folder: Path, config: PPOConfig, trainer: PPOTrainer
) -> AbstractContextManager[Recorder | None]:
    """The first process's recorder; the others have none."""
    if not trainer.stop.ranks.first:
        return nullcontext()
    return Recorder(folder, tensorboard=config.tensorboard, first_step=trainer.steps_done + 1)


def _open(folder: Path, config: PPOConfig, trainer: PPOTrainer, *, resumed: bool) -> None:
    """Make the run folder, or take what stands there back to where the run goes on."""
    open_folder(folder, config.to_dict())
    write_whole(folder / "environment.json", json.dumps(describe_environment(), indent=1))
    if resumed:
        (folder / FINISHED).unlink(
            missing_ok=True
        )  # a finished run that was sent back to an older checkpoint
        tqdm.write(f"resuming {_place(trainer)}")
    # Without a checkpoint nothing of an interrupted run counts, the evaluation before its first step included.
    drop_after(
        folder, trainer.steps_done if resumed else -1, evaluated=trainer.evaluated == trainer.steps_done
    )


def refuse_before_loading(config: PPOConfig) -> None:
    """The cheap refusals first: ValueError for a setting that has no default and is not set."""
    if not config.output_dir:
        raise ValueError("output_dir is not set, expected a new folder for the run")
    if "\0" in config.output_dir:
        raise ValueError(f"output_dir is {config.output_dir!r}, expected a path without NUL")
    if not config.data.prompts:
        raise ValueError("data.prompts is not set, expected a .jsonl or .csv file of prompts")
    if not config.rewards:
        raise ValueError("rewards is empty, expected at least one `model` or `function`")


def build_trainer(config: PPOConfig, stop: StopSignal | None = None) -> PPOTrainer:
    """Read the data and load the four models as `config` names them, every check included."""
    stop = stop or StopSignal()
    parts = agreed(stop.ranks, lambda: _load(config))
    return PPOTrainer(config, **parts, stop=stop)


def _load(config: PPOConfig) -> dict[str, Any]:
    """What a trainer is made of."""
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
    if not uses_deepspeed(config):  # whose engines hold parts of models
        check_fits(config, max(len(prompt.ids) for prompt in [*prompts, *eval_prompts]))
    config = dataclasses.replace(
        config, models=dataclasses.replace(config.models, device=loading_device(config))
    )
    actor = models.load_causal_lm(config.models.actor, "models.actor", config.models)
    reward = load_reward(config.rewards, tokenizer, config.models, config.objective.micro_batch_size)
    return {
        "actor": actor,
        "critic": load_critic(config, actor, reward, tokenizer),
        "reference": load_reference(config, actor),
        "reward": reward,
        "tokenizer": tokenizer,
        "prompts": prompts,
        "eval_prompts": eval_prompts,
        "judges": judges,
    }


def check_fits(config: PPOConfig, longest_prompt: int) -> None:
    """Hold what the four models and the batch will take against the device's memory, before anything is loaded.

    Raises ValueError where the models alone are more than there is, warns where the batch may be.
    """

    def sizes(source: str, kind: Any) -> ModelShape | None:
        model = models.sizes_without_loading(source, kind, config.models)
        return ModelShape.of(model) if model is not None else None

    actor = sizes(config.models.actor, AutoModelForCausalLM)
    if actor is None:
        return
    reference = sizes(config.models.reference, AutoModelForCausalLM) if config.models.reference else actor
    judges = [
        sizes(source.model, AutoModelForSequenceClassification) for source in config.rewards if source.model
    ]
    rewards = [shape for shape in judges if shape is not None]
    critic = rewards[0] if rewards and config.models.critic in ("auto", "reward") else actor
    if config.models.critic not in ("auto", "reward", "actor"):
        critic = sizes(config.models.critic, AutoModelForSequenceClassification) or actor
    device = models.resolve_device(config.models.device)
    size = 2 if config.models.dtype == "bfloat16" else 4
    ranks = Ranks().count
    own = config.rollout.batch_size // ranks
    work = Workload(
        prompt=longest_prompt,
        response=config.rollout.max_new_tokens,
        generated=min(config.rollout.generation_batch_size or own, own),
        micro_batch=min(config.objective.micro_batch_size, config.minibatch_size // ranks),
        weight_bytes=size,
        activation_bytes=size,
        optimizer_bytes=optimizer_bytes(config),
        recompute=config.models.gradient_checkpointing,
        ranks=ranks,
        zero_stage=zero_stage(config),
        device=device.type,
    )
    estimate = estimate_memory(actor, critic, [reference or actor, *rewards], work)
    check_memory(estimate, device_memory(device), str(device), work)


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


def _loop(trainer: PPOTrainer, config: PPOConfig, recorder: Recorder | None, folder: Path) -> None:
    """All steps, evaluations and checkpoints that are left; without a recorder nothing is written or shown."""
    bar = tqdm(
        total=config.steps,
        initial=trainer.steps_done,
        desc="PPO",
        unit="step",
        dynamic_ncols=True,
        disable=recorder is None,
    )
    with bar:
        while True:
            trainer.stop.check()
            done = trainer.steps_done
            if _is_due(config, done) and trainer.evaluated != done:
                _evaluate(trainer, recorder)
            if done == config.steps:
                return
            every = config.checkpoint.every
            if every and done and done % every == 0 and trainer.progress is None:
                trainer.save_checkpoint(folder / CHECKPOINTS)
            metrics = trainer.step()
            step = trainer.steps_done
            if recorder is not None:
                recorder.metrics({"step": step, "episode": step * config.rollout.batch_size, **metrics})
            bar.set_postfix_str(_postfix(metrics))
            bar.update()


def _is_due(config: PPOConfig, step: int) -> bool:
    """Whether there is an evaluation after `step`: before the first, after the last, and every so many."""
    every = config.evaluation.every
    return step in (0, config.steps) or bool(every and step % every == 0)


def _place(trainer: PPOTrainer) -> str:
    """Where a run stands, in words."""
    if trainer.progress is None:
        return f"after step {trainer.steps_done}"
    return f"in step {trainer.steps_done + 1}, after {len(trainer.progress.updates)} of its updates"


def _postfix(metrics: dict[str, float]) -> str:
    return (
        f"reward {metrics['objective/scores']:.3f}, KL {metrics['objective/kl']:.2f} nats, "
        f"{metrics['throughput/tokens_per_second']:.0f} tokens/s"
    )


def _evaluate(trainer: PPOTrainer, recorder: Recorder | None) -> None:
    if not trainer.evaluator.prompts:
        return
    evaluation: Evaluation = trainer.evaluate()
    if recorder is None:
        return
    recorder.metrics({"event": "eval", "step": trainer.steps_done, **evaluation.metrics})
    recorder.samples(evaluation.samples)
    shown = ", ".join(
        f"{name.removeprefix('eval/')} {value:.3f}" for name, value in evaluation.metrics.items()
    )
    tqdm.write(f"held out, step {trainer.steps_done}: {shown}")


def _save(trainer: PPOTrainer, config: PPOConfig, folder: Path) -> None:
    for learner in (trainer.actor, trainer.critic):
        weights = learner.weights()  # every process has a share in them
        if not trainer.stop.ranks.first:
            continue
        try:
            learner.model.save_pretrained(folder / learner.name, state_dict=weights)
        except SafetensorError as error:
            raise OSError(f"{folder / learner.name}: the model could not be written ({error})") from error
        trainer.tokenizer.save_pretrained(folder / learner.name)
    if not trainer.stop.ranks.first:
        return
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
