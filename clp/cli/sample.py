"""clp sample: its options, and what it does with them."""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from clp.data.paths import home_expanded
from clp.training.config import run_config

if TYPE_CHECKING:
    from clp.engine.requests import SamplingParams


@dataclass
class SampleCommand:
    """Sample from a trained policy: prompts, a file of them, or one after the other as you type."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder or checkpoint."""
    prompts: Annotated[list[str], tyro.conf.Positional] = field(default_factory=list)
    """Prompts to continue. Without any, on a terminal: a prompt loop."""
    input: str | None = None
    """JSONL: "prompt" (text, token ids or messages), optionally "weights", "kl", "id" and
    sampling parameters."""
    output: str | None = None
    """Write JSONL here instead of the terminal. A killed run continues when run again."""
    interactive: bool = False
    """Type prompts, see completions as they are drawn; /help lists the loop's commands."""
    chat: bool = False
    """A prompt that is a text is the message of a user, for the tokenizer's chat template; typed
    prompts go on with one conversation, until /new."""
    weights: str | None = None
    """Of prompts without their own, such as "joy=0.7,brief=0.3"."""
    kl: float | None = None
    """KL strength alpha of those without their own, if the run has a kl_range; default: its
    geometric mean."""
    simplex: bool = True
    """Refuse weights that are negative or have a sum other than 1."""
    max_batch_size: int = 64
    """Sequences decoded together."""
    cache_gib: float = 4.0
    """Memory for keys and values at most."""
    base_model: str | None = None
    """Where the base model is, if it has moved."""
    device: str = "auto"
    """ "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1", ..."""


def run(argv: Sequence[str]) -> None:
    """clp sample RUN "prompt" ... | --input FILE | --interactive: continue prompts."""
    from clp.engine.requests import SamplingParams

    def together(
        command: Annotated[SampleCommand, tyro.conf.arg(name="")],
        params: Annotated[SamplingParams, tyro.conf.arg(name="")],
    ) -> tuple[SampleCommand, SamplingParams]:
        return command, params

    described = SampleCommand.__doc__
    command, params = tyro.cli(together, prog="clp sample", args=argv, description=described)
    given = bool(command.prompts) + (command.input is not None) + command.interactive
    if given > 1:
        raise ValueError("give one of: prompts, --input, --interactive")
    if command.interactive and command.output is not None:
        raise ValueError("--output goes with prompts or --input, not with --interactive")
    if params.logprobs and command.output is None:
        raise ValueError("--logprobs goes with --output: the terminal shows texts alone")
    terminal = sys.stdin.isatty() and sys.stdout.isatty() and command.output is None
    if not given and not terminal:
        raise ValueError(
            "give prompts, or a file of them with --input, or --interactive; --stop and other "
            "options with several values take all that follow, so prompts come before them"
        )
    try:
        failed = _sample(command, params)
    except KeyboardInterrupt:
        hint = "the same command goes on from here" if command.output is not None else ""
        raise KeyboardInterrupt(hint) from None
    if failed:
        where = f': see "error" in {command.output}' if command.output is not None else ""
        print(f"clp sample: lines that failed: {failed}{where}", file=sys.stderr)
        raise SystemExit(1)


def _sample(command: SampleCommand, params: "SamplingParams") -> int:
    """Does what the command says; returns how many lines failed."""
    import torch

    from clp.data.condition import Condition, parse_condition
    from clp.engine.sampler import Sampler
    from clp.policies.card import read_card
    from clp.policies.policy import Policy
    from clp.serving.jsonl import Defaults, check_defaults, sample_file
    from clp.serving.prompt_loop import prompt_loop
    from clp.serving.resumable_output import Source

    defaults = Defaults(params, command.weights, command.simplex, command.chat, command.kl)
    folder = home_expanded(command.run)
    card = read_card(folder)
    objectives = card["objectives"]
    some = [1.0, *[0.0] * (len(objectives) - 1)] if command.weights is None else command.weights
    condition = Condition(some, command.kl)
    parse_condition(condition, objectives, card["kl_range"], simplex=command.simplex)

    def make_sampler() -> Sampler:
        policy = Policy.load(
            folder, dtype=getattr(torch, run_config(folder).dtype),
            base_model=command.base_model, device=command.device,
        )  # fmt: skip
        sampler = Sampler(
            policy, max_batch_size=command.max_batch_size, cache_gib=command.cache_gib
        )
        check_defaults(sampler, defaults, command.prompts)
        return sampler

    if not command.prompts and command.input is None:
        prompt_loop(
            make_sampler(), params, command.weights, kl=command.kl, simplex=command.simplex,
            chat=command.chat, read=input,
        )  # fmt: skip
        return 0
    if command.input is not None:
        source = Source.of_file(home_expanded(command.input))
    elif command.weights is None:
        raise ValueError("the prompts have no weights: give --weights")
    else:
        source = Source.of_prompts(command.prompts)
    output = None if command.output is None else home_expanded(command.output)
    digest = hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()
    policy: dict[str, Any] = {"policy_sha256": digest, "base_model": command.base_model}
    return sample_file(source, output, defaults, make_sampler, **policy)
