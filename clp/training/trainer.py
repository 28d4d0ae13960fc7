"""CLPTrainer: CLP with a policy gradient, read top to bottom.

Against the paper (arXiv:2407.15762), by default: the conditioned parameters are LoRA adapters, the
baseline is the mean of the other completions of the prompt group (RLOO) in place of a value
function (baseline="value"), and KL is the exact per-token divergence, in the objective and in its
gradient.

Each step is a function of (seed, step) and the parameters alone: weights, prompts and sampling
seeds come from new generators, so a run resumed from a checkpoint repeats itself exactly.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import TrainerState

from clp.data.prompts import TRAIN_PROMPTS, check_prompts, load_prompts
from clp.data.scoring import dry_call
from clp.engine.model_error import NotFiniteError
from clp.engine.requests import SamplingParams
from clp.engine.sampler import Sampler
from clp.policies.checksum import digest, stored
from clp.policies.loading import base_config
from clp.policies.policy import Policy
from clp.rewards import RewardFunc
from clp.training import run_folder
from clp.training.checkpoint import (
    Progress,
    checkpoints,
    load_optimizer,
    load_progress,
    load_value_head,
    save_checkpoint,
)
from clp.training.config import CLPConfig, located
from clp.training.gradient_checkpointing import checkpointed_layers
from clp.training.losses import scale_rewards
from clp.training.prompt_lengths import fitting_rows, tokens_digest
from clp.training.reward_functions import in_order, named_functions
from clp.training.reward_scale import measure_reward_scale, measured_completions
from clp.training.rollout import (
    append_completions,
    metric_names,
    roll_out,
    rollout_metrics,
)
from clp.training.schedule import lr_factor, prompts_of, pytorch_seed
from clp.training.start_policy import settings_of, start_policy
from clp.training.updates import update
from clp.training.value_head import ValueHead
from clp.training.weight_draws import DrawWeights, condition_draws
from clp_kernels.selftest.processes import ensure

# Each step draws other prompts, weights and completions. Where half of the draws give no finite
# gradient, one run of ten in 1,000 is all skipped; a policy that has diverged loses ten steps.
MOST_SKIPPED = 10


class CLPTrainer:
    """Trains one policy for every trade-off between m rewards.

    To resume, give CLPConfig.of_run(folder), and what cannot be read from there: reward functions
    and prompts given in Python. Objectives are known by their names; the order is the run's.
    max_steps may grow; save_steps, save_total_limit, device, eval_prompts and
    gradient_checkpointing may change.

    The folder is locked from here until `train` ends, or this object or the process does.

    Args:
        model: Path, hub name or "tiny"; None takes args.model. Or a Policy to start from, such as
            Policy.from_models(..., base=...), whose objectives are those of the rewards: training
            goes on from its parameters; base model, dtype, device and conditioning are its own.
            It is saved as checkpoint-000000; a run that is resumed takes its last checkpoint.
        reward_funcs: One per objective: a mapping from objective to function, or functions, or one
            (called by their __name__). None takes args.rewards. Signature as in TRL:
            f(prompts, completions, **columns) -> list of numbers or None (docs/rewards.md). Each
            is called once here, on two short completions, so that a wrong one fails before
            anything is sampled.
        args: The configuration.
        train_dataset: Dicts with "prompt" (a text, or a list of messages for the tokenizer's chat
            template) and any columns the rewards use; None reads args.prompts.
        draw_weights: A function (count, generator) -> weights [count, m], which are >= 0 and sum to
            1, in the order of the objectives: those of a step's prompt groups. For resuming to be
            exact, it must draw from this torch.Generator alone. None takes args.weight_draws.

    Raises:
        ValueError: bad configuration, prompts, rewards or model; an output folder that holds
            another run or is in use; a run to resume whose settings, objectives, rewards or prompts
            differ. TypeError: a reward function that returns something other than numbers. What a
            reward function raises passes through. The folder is then as it was before.
    """

    def __init__(
        self,
        model: str | Policy | None = None,
        reward_funcs: RewardFunc | Mapping[str, RewardFunc] | Sequence[RewardFunc] | None = None,
        args: CLPConfig | None = None,
        train_dataset: Iterable[dict[str, Any]] | None = None,
        draw_weights: DrawWeights | None = None,
    ) -> None:
        args = args or CLPConfig()
        if draw_weights is not None:
            args = replace(args, weight_draws="function")
        self.draw_weights = draw_weights
        start = None
        if isinstance(model, Policy):
            start, args = model, settings_of(model, args)
        elif model is not None:
            args = replace(args, model=model)
        args = located(args)
        named = named_functions(reward_funcs, args.rewards)
        if start is not None:
            named = in_order(named, start.objectives)
            if reward_funcs is None:
                specs_of = {spec.partition("=")[0]: spec for spec in args.rewards}
                args = replace(args, rewards=[specs_of[name] for name in named])
        path = None
        if train_dataset is None:
            path = args.prompts or TRAIN_PROMPTS
            train_dataset = load_prompts(path)
        self.rows = check_prompts(train_dataset)
        specs = args.rewards if reward_funcs is None else None
        inputs = run_folder.Inputs.of(named, specs, self.rows, draw_weights)
        # Functions given in Python have no name in a file, built-in ones aside: clp eval then asks.
        nameless = inputs.functions
        if reward_funcs is not None:
            own = [n if n in nameless else f"{n}={r}" for n, r in inputs.rewards.items()]
            args = replace(args, rewards=own)
        self.run = Path(args.output_dir)
        self.lock, checkpoint = run_folder.RunLock(self.run), None
        new = not (args.resume and (self.run / "config.yaml").is_file())
        with ExitStack() as undo:
            undo.callback(self.lock.release)
            if new:
                run_folder.check_free(self.run, resume=args.resume)
            else:
                self.lock.acquire()
                args, inputs, checkpoint = run_folder.check_resumed(self.run, args, inputs)
            if args.resume:
                begin = "holds no checkpoint: training begins at step 1"
                if checkpoint is not None:
                    begin = f"goes on from {checkpoint.name}"
                tqdm.write(f"{self.run} {begin}", file=sys.stderr)
            self.args = args
            self.reward_funcs = {name: named[name] for name in inputs.rewards}
            rewards = [] if nameless else args.rewards
            measured = self.prepare(checkpoint, rewards, path, inputs, start)
            trained = set(self.parameters.values())
            found = replace(
                measured,
                reward_scale=self.policy.reward_scale,
                base=digest(t for t in stored(self.policy.model) if t not in trained),
                config=base_config(self.policy.model),
                tokens=tokens_digest(self.policy, self.rows),
            )
            run_folder.check_base(self.run, inputs, found)
            inputs = found
            # Last, so that a start that fails leaves the folder as it was.
            run_folder.claim(self.lock, args, inputs, new=new)
            if start is not None and checkpoint is None:
                self.save()
            undo.pop_all()

    def prepare(
        self,
        checkpoint: Path | None,
        rewards: Sequence[str],
        prompts: str | Path | None,
        inputs: run_folder.Inputs,
        start: Policy | None,
    ) -> run_folder.Inputs:
        """Makes policy, optimizer and sampler, new or from a checkpoint; checks what goes in.

        Returns: the inputs, with the reward scale of a new run, which is measured here.
        """
        args = self.args
        self.policy = start_policy(args, list(self.reward_funcs), checkpoint, start)
        self.policy.rewards = tuple(rewards)
        self.progress = Progress() if checkpoint is None else load_progress(checkpoint)
        if args.gradient_checkpointing:
            checkpointed_layers(self.policy.model)
        self.parameters = self.policy.trainable_parameters()
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=args.peak_learning_rate, weight_decay=args.weight_decay
        )
        if checkpoint is not None:
            load_optimizer(checkpoint, self.parameters, self.optimizer)
        ensure(self.policy.device)  # the sampler's kernels and those of the loss in one go
        # All completions of a step decode together; the KV cache is bounded by micro_batch_size.
        # Before the head: it says in its own words what is wrong with a model's attention.
        self.sampler = Sampler(self.policy, max_batch_size=args.micro_batch_size)
        self.head, self.value = self.policy.head(), None
        if args.baseline == "value":
            size, m = self.head.weight.shape[1], len(self.policy.objectives)
            columns = m + (self.policy.kl_range is not None)
            self.value = ValueHead(size, columns, m, pytorch_seed(args.seed))
            self.value.to(self.policy.device)
            if checkpoint is not None:
                load_value_head(checkpoint, self.value)
        lines = run_folder.lines_until(self.run / "metrics.jsonl", self.step)
        self.log_history: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.rows = _usable_rows(self, prompts)
        self.draw = condition_draws(args, self.policy.objectives, self.draw_weights)
        self.reward_scale: Tensor | None = None
        if args.scale_rewards == "reference":
            inputs = inputs if inputs.reward_scale else _measured(self, inputs)
            scales = self.policy.reward_scale = inputs.reward_scale or {}
            scale = torch.tensor(list(scales.values()), dtype=torch.float32)
            self.reward_scale = scale.to(self.policy.device)
            if checkpoint is None:
                self.progress.completions = measured_completions(args.num_generations)
                self.progress.sampled_tokens = inputs.scale_tokens
                self.progress.seconds = inputs.scale_seconds
        return inputs

    def train(self) -> Policy:
        """Runs to args.max_steps; writes metrics.jsonl, checkpoints and the final policy.

        A number that is not finite is null in metrics.jsonl.

        Raises:
            FloatingPointError: MOST_SKIPPED steps in a row had a loss or a gradient that is not
                finite. The message names the last checkpoint.
        """
        with self.lock:
            self._train()
        return self.policy

    def _train(self) -> None:
        args = self.args
        found = checkpoints(self.run)
        if found and load_progress(found[-1]).step > self.step:
            raise ValueError(f"{self.run} has been trained further, to {found[-1].name}: resume it")
        for name in ("metrics.jsonl", "completions.jsonl"):
            run_folder.cut_lines(self.run / name, self.step)
        interval = 0.5 if sys.stderr.isatty() else 10
        bar = tqdm(
            total=args.max_steps, initial=self.step, desc="training", unit="step",
            mininterval=interval,
        )  # fmt: skip
        with bar, open(self.run / "metrics.jsonl", "a", encoding="utf-8") as metrics_file:
            while self.step < args.max_steps:
                metrics = self.train_step()
                metrics_file.write(json.dumps(metrics, allow_nan=False) + "\n")
                metrics_file.flush()
                shown = {k: v for k in ("reward", "kl") if (v := metrics[k]) is not None}
                bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items()})
                bar.update()
                self._check_progress()
                if self.step % args.save_steps == 0 or self.step == args.max_steps:
                    # The metrics of a step reach the disk before a checkpoint that follows it.
                    os.fsync(metrics_file.fileno())
                    self.save()
        self.policy.save(self.run)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.progress.step

    def save(self) -> Path:
        """Writes a checkpoint of the current step."""
        keep = self.args.save_total_limit
        settings = replace(self.args, resume=False).to_yaml()
        return save_checkpoint(
            self.run, self.progress, self.policy, self.optimizer, keep, self.value, settings
        )

    @property
    def sampling_params(self) -> SamplingParams:
        """Those of training's completions, but for their seeds."""
        args = self.args
        return SamplingParams(max_tokens=args.max_completion_length, temperature=args.temperature)

    @property
    def state(self) -> TrainerState:
        """The run so far, as reward functions get it (`trainer_state`).

        global_step steps are done of max_steps; epoch counts passes over the prompts, and
        log_history has a dict per step, as in metrics.jsonl.
        """
        args = self.args
        epochs = args.num_prompts / len(self.rows)
        return TrainerState(
            epoch=self.step * epochs, global_step=self.step, max_steps=args.max_steps,
            num_train_epochs=math.ceil(args.max_steps * epochs), logging_steps=1,
            save_steps=args.save_steps, num_input_tokens_seen=self.progress.num_tokens,
            log_history=list(self.log_history),
        )  # fmt: skip

    def train_step(self) -> dict[str, float | None]:
        """One step: draw, sample, score, update. Returns the step's metrics.

        If the loss or the gradient is not finite, parameters and optimizer stay as they are, and
        `skipped_steps` counts the step. A metric that is not finite is None.
        """
        start, args, step = time.perf_counter(), self.args, self.step
        generator = torch.Generator().manual_seed(pytorch_seed(args.seed * 1_000_003 + step))
        conditions = self.draw(args.num_prompts, generator)
        rows = prompts_of(self.rows, args, step)
        try:
            rollout = roll_out(
                self.sampler, self.reward_funcs, rows, conditions, args.num_generations,
                self.sampling_params, generator, self.state,
            )  # fmt: skip
        except NotFiniteError as error:
            raise _diverged(self.run, f"step {step + 1}: {error}") from error
        lr = args.peak_learning_rate * lr_factor(step, args)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        rewards = scale_rewards(rollout.rewards, args.scale_rewards, self.reward_scale)
        done = update(
            self.policy, self.parameters, self.optimizer, self.head, args, rollout.batch, rewards,
            self.value,
        )  # fmt: skip
        progress = self.progress
        progress.step += 1
        progress.num_tokens += int(rollout.batch.attention_mask.sum())
        progress.completions += len(rollout.completions)
        progress.sampled_tokens += int(rollout.batch.completion_mask.sum())
        progress.gradient_steps += done.passes
        progress.skipped_steps += done.skipped
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if done.skipped else 0
        if rollout.log.extra:
            table = self.run / "completions.jsonl"
            append_completions(table, rollout, rows, self.policy.objectives, self.step)
        step_time = time.perf_counter() - start
        progress.seconds += step_time
        found = {
            "step": progress.step, **done.metrics, "learning_rate": lr,
            "num_tokens": progress.num_tokens, "skipped_steps": progress.skipped_steps,
            **rollout_metrics(rollout, conditions, done.stats, self.policy.objectives),
            "step_time": step_time,
        }  # fmt: skip
        metrics = {k: v if v is None or math.isfinite(v) else None for k, v in found.items()}
        self.log_history.append(metrics)
        return metrics

    def _check_progress(self) -> None:
        if self.progress.skipped_in_a_row >= MOST_SKIPPED:
            raise _diverged(
                self.run,
                f"the loss or the gradient was not finite in {MOST_SKIPPED} steps in a row, up to "
                f"step {self.step}",
            )


def _usable_rows(trainer: CLPTrainer, path: str | Path | None) -> list[dict[str, Any]]:
    """The training prompts that fit; prompts and held-out prompts are looked at as they are used.

    Raises: ValueError, TypeError as fitting_rows and dry_call.
    """
    args, policy = trainer.args, trainer.policy
    rows = fitting_rows(
        trainer.rows, policy, trainer.sampler, args.max_completion_length, args.max_prompt_length,
        path, hint=", and max_prompt_length (--max-prompt-length) leaves them out",
    )  # fmt: skip
    reserved = metric_names(policy.objectives)

    def call(each: Sequence[dict[str, Any]], source: str | Path | None) -> None:
        dry_call(
            trainer.reward_funcs, each, policy.tokenizer, trainer.state, reserved,
            args.num_generations, source,
        )  # fmt: skip

    call(rows, path)
    if (held_out := args.eval_prompts) is not None:
        found = fitting_rows(
            load_prompts(held_out), policy, None, args.max_completion_length, path=held_out
        )
        try:
            call(found, held_out)
        except (ValueError, TypeError) as error:
            raise ValueError(f"eval_prompts {held_out}: {error}") from error
    return rows


def _measured(trainer: CLPTrainer, inputs: run_folder.Inputs) -> run_folder.Inputs:
    """The inputs with the reward scale of a new run, and what it took to measure it."""
    args, sampler, begin = trainer.args, trainer.sampler, time.perf_counter()
    scales = measure_reward_scale(
        sampler, trainer.reward_funcs, trainer.rows, trainer.sampling_params, args.num_generations,
        pytorch_seed(args.seed * 1_000_003 + 400_000), trainer.state,
        metric_names(trainer.policy.objectives),
    )  # fmt: skip
    return replace(
        inputs, reward_scale=scales, scale_tokens=sampler.tokens_drawn,
        scale_seconds=time.perf_counter() - begin,
    )  # fmt: skip


def _diverged(run: Path, what: str) -> FloatingPointError:
    found = checkpoints(run)
    last = f"the last checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
    return FloatingPointError(
        f"{what}; {last}. A lower learning_rate, or dtype float32, may help a new run"
    )
