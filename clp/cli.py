"""The command line: clp train | sample | eval | export | info."""

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from clp.config import CLPConfig, load_config
from clp.sample_command import sample

# transformers, torch and matplotlib are imported inside the commands: `clp --help` is immediate.


@dataclass
class EvalCommand:
    """Sweep the weights on held-out prompts: frontier.json, samples.jsonl, pareto.png, a table."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder or checkpoint; the files are written into it."""
    prompts: str | None = None
    """JSONL of held-out prompts; default: the run's eval_prompts, else the embedded ones."""
    num_prompts: int = 128
    """Use at most this many of them."""
    rewards: list[str] | None = None
    """Reward of each objective; default: those of the training."""
    max_tokens: int | None = None
    """Tokens a completion at most; default: the training's."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_p: float = 1.0
    """1 is off."""
    seed: int = 0
    """Seed of the completions."""
    reference_point: list[float] | None = None
    """Reference point of the hypervolume; default: the origin."""
    max_batch_size: int = 128
    """Sequences decoded together."""
    base_model: str | None = None
    """Where the base model is, if it has moved."""
    device: str = "cpu"
    """Device to run on."""


@dataclass
class ExportCommand:
    """Write one ordinary PEFT adapter for fixed weights, for vLLM or any other server."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder or checkpoint."""
    output: Annotated[str, tyro.conf.Positional]
    """Folder to write; must not exist or be empty."""
    weights: str
    """The row, such as "joy=0.7,brief=0.3"."""
    simplex: bool = True
    """Refuse rows with negative entries or a sum other than 1."""
    base_model: str | None = None
    """Where the base model is, if it has moved."""


def train(argv: Sequence[str]) -> None:
    """clp train [--config FILE] [--option ...]: train one policy for every trade-off."""
    argv, config, given = list(argv), CLPConfig(), "--config" in argv
    if given:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise ValueError("--config needs the path of a YAML file")
        config = load_config(argv[at + 1])
        del argv[at : at + 2]

    def parsed(default: CLPConfig) -> CLPConfig:
        return tyro.cli(
            CLPConfig,
            prog="clp train",
            args=argv,
            default=default,
            description="Train one policy for every trade-off between the rewards. --config FILE "
            "reads the same options from YAML; options on the command line win. With --resume "
            "and without --config they are those of the run; only what is given may differ.",
        )

    config = parsed(config)
    if config.resume and not given and (Path(config.output_dir) / "config.yaml").is_file():
        config = parsed(CLPConfig.of_run(config.output_dir))
    from clp.train import CLPTrainer

    trainer = CLPTrainer(args=config)
    try:
        trainer.train()
    except FloatingPointError as error:
        raise ValueError(str(error)) from error
    tqdm.write(f"policy, metrics and adapters: {config.output_dir}")


def evaluate(argv: Sequence[str]) -> None:
    """clp eval RUN: sweep the weights on held-out prompts; numbers, plot, samples."""
    command = tyro.cli(EvalCommand, prog="clp eval", args=argv)
    from rich.console import Console

    from clp.evaluate import evaluate as sweep
    from clp.policy import Policy
    from clp.prompts import HELDOUT_PROMPTS, load_prompts
    from clp.report import plot_frontier, print_frontier, print_samples
    from clp.requests import SamplingParams
    from clp.rewards import load_rewards

    run = Path(command.run)
    config_file = run / "config.yaml"
    config = load_config(config_file) if config_file.is_file() else CLPConfig()
    rows = load_prompts(command.prompts or config.eval_prompts or HELDOUT_PROMPTS)
    policy = Policy.load(run, base_model=command.base_model, device=command.device)
    front, samples = sweep(
        policy,
        load_rewards(command.rewards or policy.rewards),
        rows[: command.num_prompts],
        params=SamplingParams(
            max_tokens=command.max_tokens or config.max_completion_length,
            temperature=command.temperature,
            top_p=command.top_p,
        ),
        seed=command.seed,
        reference_point=command.reference_point,
        max_batch_size=command.max_batch_size,
        progress=True,
    )
    front.save(run / "frontier.json")
    text = "".join(json.dumps(sample) + "\n" for sample in samples)
    (run / "samples.jsonl").write_text(text, encoding="utf-8")
    plot_frontier(front, run / "pareto.png")
    console = Console(width=None if sys.stdout.isatty() else 140)
    print_frontier(front, console)
    print_samples(front, samples, console)
    console.print(f"{run}/frontier.json, samples.jsonl, pareto.png")


def export(argv: Sequence[str]) -> None:
    """clp export RUN FOLDER --weights "joy=0.7,brief=0.3": one PEFT adapter."""
    command = tyro.cli(ExportCommand, prog="clp export", args=argv)
    import clp_kernels
    from clp.policy import Policy, model_path
    from clp.weights import parse_weights

    policy = Policy.load(command.run, base_model=command.base_model)
    row = parse_weights(command.weights, policy.objectives, simplex=command.simplex)
    base = model_path(policy.base_model)
    folder = clp_kernels.export_adapter(policy.model, row, command.output, base_model=base)
    print(f"PEFT adapter of rank {sum(_ranks(policy.model))}: {folder}")


def _ranks(model: Any) -> tuple[int, ...]:
    from clp_kernels.layers import steered_layers

    layers = steered_layers(model).values()
    return tuple(max(column) for column in zip(*(m.ranks for m in layers), strict=True))


def info(argv: Sequence[str]) -> None:
    """clp info: versions, devices, and which kernels run here."""
    from clp_kernels import info as kernels_info

    kernels_info.main(list(argv))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "sample": sample,
    "eval": evaluate,
    "export": export,
    "info": info,
}


def main() -> None:
    """Entry point. Bad input ends with one line on standard error and exit code 2."""
    # Read by OpenMP when torch is loaded: how long waiting threads spin. On two cores beside one
    # endless loop a training step of the demo takes 2.6 s by default and 2.1 s with this; on quiet
    # cores 0.9 s either way.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    name, argv = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("--help", "-h"):
        print("clp: one policy for every trade-off between objectives\n")
        for run in COMMANDS.values():
            print(f"  {(run.__doc__ or '').splitlines()[0]}")
        print("\nOptions of a command: clp COMMAND --help; the version: clp --version")
        return
    if name == "--version":
        # Of what is installed: clp_kernels.__version__ would import torch.
        print(f"clp {importlib.metadata.version('clp-steer')}")
        return
    if name not in COMMANDS:
        print(f"clp: unknown command {name!r}; one of {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    try:
        COMMANDS[name](argv)
    except (ValueError, OSError) as error:
        print(f"clp {name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
