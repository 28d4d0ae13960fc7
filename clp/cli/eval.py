"""clp eval: its options, and what it does with them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from clp.data.paths import absolute, check_folder, home_expanded, reward_locations
from clp.training.config import run_config


@dataclass
class EvalCommand:
    """Sweep the weights on held-out prompts: frontier.json, samples.jsonl, pareto.png, a table."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, or a checkpoint of one."""
    output_dir: str | None = None
    """Folder of the files; default: that of the run or checkpoint. Those of an earlier evaluation
    there are replaced."""
    prompts: str | None = None
    """JSONL of held-out prompts; default: the run's eval_prompts, else the embedded ones."""
    num_prompts: int = 128
    """Use at most this many of them."""
    rewards: list[str] | None = None
    """Reward of each objective; default: those of the training."""
    max_tokens: int | None = None
    """Tokens per completion, at most; default: the training's."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_p: float = 1.0
    """1 is off."""
    seed: int = 0
    """Seed of the completions."""
    kl: float | None = None
    """KL strength alpha, if the run has a kl_range; default: its geometric mean."""
    reference_point: list[float] | None = None
    """Reference point of the hypervolume; default: the origin."""
    max_batch_size: int = 128
    """Sequences decoded together."""
    base_model: str | None = None
    """Where the base model is, if it has moved."""
    device: str = "auto"
    """ "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1", ..."""


def run(argv: Sequence[str]) -> None:
    """clp eval RUN: sweep the weights on held-out prompts; numbers, plot, samples."""
    command = tyro.cli(EvalCommand, prog="clp eval", args=argv)
    import torch
    from rich.console import Console

    from clp.data.condition import Condition, parse_condition
    from clp.data.prompts import HELDOUT_PROMPTS, TRAIN_PROMPTS, load_prompts
    from clp.engine.requests import SamplingParams
    from clp.evaluation.frontier import check_reference_point, evaluate
    from clp.evaluation.report import FILES, print_frontier, print_samples, save_evaluation
    from clp.policies.card import read_card
    from clp.policies.policy import Policy
    from clp.rewards import load_rewards
    from clp.training.prompt_lengths import fitting_rows
    from clp.training.run_folder import had_other_prompts

    for name in ("num_prompts", "max_batch_size"):
        if getattr(command, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(command, name)}")
    folder = home_expanded(command.run)
    output = folder if command.output_dir is None else home_expanded(command.output_dir)
    card, config = read_card(folder), run_config(folder)
    check_folder(output, FILES)
    most = config.max_completion_length if command.max_tokens is None else command.max_tokens
    params = SamplingParams(max_tokens=most, temperature=command.temperature, top_p=command.top_p)
    reference_point = check_reference_point(command.reference_point, len(card["objectives"]))
    given = config.eval_prompts if command.prompts is None else command.prompts
    prompts = absolute(HELDOUT_PROMPTS if given is None else given)
    rows = load_prompts(prompts)[: command.num_prompts]
    embedded = config.prompts is None and not had_other_prompts(folder, load_prompts(TRAIN_PROMPTS))
    if given is None and not embedded:
        print(
            f"clp eval: the run's prompts were {config.prompts or 'given in Python'}; these are "
            "the embedded ones, --prompts names others",
            file=sys.stderr,
        )
    specs = reward_locations(card["rewards"] if command.rewards is None else command.rewards)
    form = "--rewards " + " ".join(f"{name}=REWARD" for name in card["objectives"])
    if not specs and command.rewards is None:
        raise ValueError(f"{folder} was trained on functions given in Python: name rewards, {form}")
    rewards = load_rewards(specs)
    if sorted(rewards) != sorted(card["objectives"]):
        raise ValueError(
            f"rewards must be those of {', '.join(card['objectives'])} ({form}), got "
            f"{', '.join(rewards)}"
        )
    spec_of = dict(zip(rewards, specs, strict=True))
    specs = [spec_of[name] for name in card["objectives"]]
    parse_condition(
        Condition([1.0, *[0.0] * (len(card["objectives"]) - 1)], command.kl),
        card["objectives"], card["kl_range"],
    )  # fmt: skip
    policy = Policy.load(
        folder, dtype=getattr(torch, config.dtype), base_model=command.base_model,
        device=command.device,
    )  # fmt: skip
    setting = "max_completion_length" if command.max_tokens is None else "max_tokens"
    fitting_rows(rows, policy, None, most, path=prompts, setting=setting)
    front, samples = evaluate(
        policy, rewards, rows, params=params, seed=command.seed, kl=command.kl,
        reference_point=reference_point, max_batch_size=command.max_batch_size, progress=True,
    )  # fmt: skip
    front = replace(front, run=absolute(folder), reward_specs=specs, prompts_file=prompts)
    save_evaluation(front, samples, output)
    console = Console(width=None if sys.stdout.isatty() else 140)
    print_frontier(front, console)
    print_samples(front, samples, console)
    console.print(f"{output}/frontier.json, samples.jsonl, pareto.png")
