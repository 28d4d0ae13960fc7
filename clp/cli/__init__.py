"""The command line: clp train | sample | eval | export | info."""

import importlib.metadata
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import tyro
from tqdm import tqdm

from clp.cli.sample import sample
from clp.data.paths import absolute, check_folder, home_expanded, reward_locations
from clp.training.config import CLPConfig, load_config

# transformers, torch and matplotlib are imported inside the commands: `clp --help` is immediate.


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
    argv, config = _take_config(argv)

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

    given, config = config is not None, parsed(config or CLPConfig())
    run = home_expanded(config.output_dir)
    if config.resume and not given and (run / "config.yaml").is_file():
        config = parsed(CLPConfig.of_run(run))
    from clp.training.checkpoint import checkpoints
    from clp.training.trainer import CLPTrainer

    trainer = CLPTrainer(args=config)
    try:
        trainer.train()
    except FloatingPointError as error:
        raise ValueError(str(error)) from error
    except KeyboardInterrupt:
        found = checkpoints(trainer.run)
        hint = "there is no checkpoint yet: --resume begins at step 1"
        if found:
            hint = f"--resume goes on from {found[-1].name}"
        raise KeyboardInterrupt(hint) from None
    tqdm.write(f"policy, metrics and adapters: {config.output_dir}")


def _take_config(argv: Sequence[str]) -> tuple[list[str], CLPConfig | None]:
    """The arguments without --config FILE (or --config=FILE), and what the file holds."""
    rest, files, arguments = [], [], iter(argv)
    for argument in arguments:
        option, given, value = argument.partition("=")
        if option == "--config":
            files.append(value if given else next(arguments, ""))
        else:
            rest.append(argument)
    if not all(files):
        raise ValueError("--config needs the path of a YAML file")
    if len(files) > 1:
        raise ValueError(f"--config must be given once, got {' and '.join(files)}")
    return rest, load_config(home_expanded(files[0])) if files else None


def evaluate(argv: Sequence[str]) -> None:
    """clp eval RUN: sweep the weights on held-out prompts; numbers, plot, samples."""
    command = tyro.cli(EvalCommand, prog="clp eval", args=argv)
    from rich.console import Console

    from clp.data.prompts import HELDOUT_PROMPTS, load_prompts
    from clp.engine.requests import SamplingParams
    from clp.evaluation.frontier import check_reference_point
    from clp.evaluation.frontier import evaluate as sweep
    from clp.evaluation.report import FILES, print_frontier, print_samples, save_evaluation
    from clp.policies.card import read_card
    from clp.policies.lora import Policy
    from clp.rewards import load_rewards

    for name in ("num_prompts", "max_batch_size"):
        if getattr(command, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(command, name)}")
    run = home_expanded(command.run)
    output = run if command.output_dir is None else home_expanded(command.output_dir)
    card, config = read_card(run), _config_of(run)
    check_folder(output, FILES)
    params = SamplingParams(
        max_tokens=config.max_completion_length
        if command.max_tokens is None
        else command.max_tokens,
        temperature=command.temperature,
        top_p=command.top_p,
    )
    reference_point = check_reference_point(command.reference_point, len(card["objectives"]))
    given = config.eval_prompts if command.prompts is None else command.prompts
    prompts = absolute(HELDOUT_PROMPTS if given is None else given)
    rows = load_prompts(prompts)[: command.num_prompts]
    specs = reward_locations(card["rewards"] if command.rewards is None else command.rewards)
    if not specs and command.rewards is None:
        raise ValueError(
            f"{run} was trained on functions given in Python: name them with --rewards"
        )
    rewards = load_rewards(specs)
    if list(rewards) != card["objectives"]:
        raise ValueError(f"rewards must be those of {card['objectives']}, got {list(rewards)}")
    policy = Policy.load(run, base_model=command.base_model, device=command.device)
    front, samples = sweep(
        policy,
        rewards,
        rows,
        params=params,
        seed=command.seed,
        reference_point=reference_point,
        max_batch_size=command.max_batch_size,
        progress=True,
    )
    front = replace(front, run=absolute(run), reward_specs=specs, prompts_file=prompts)
    save_evaluation(front, samples, output)
    console = Console(width=None if sys.stdout.isatty() else 140)
    print_frontier(front, console)
    print_samples(front, samples, console)
    console.print(f"{output}/frontier.json, samples.jsonl, pareto.png")


def _config_of(run: Path) -> CLPConfig:
    """The configuration of a run, also for one of its checkpoints; else the defaults."""
    folders = [run]
    if re.fullmatch(r"checkpoint-\d+", run.resolve().name):
        folders.append(run.resolve().parent)
    files = [folder / "config.yaml" for folder in folders]
    return next((load_config(file) for file in files if file.is_file()), CLPConfig())


def export(argv: Sequence[str]) -> None:
    """clp export RUN FOLDER --weights "joy=0.7,brief=0.3": one PEFT adapter."""
    command = tyro.cli(ExportCommand, prog="clp export", args=argv)
    import clp_kernels
    from clp.data.weights import parse_weights
    from clp.policies.card import read_card
    from clp.policies.loading import model_path
    from clp.policies.lora import Policy

    run, output = home_expanded(command.run), home_expanded(command.output)
    row = parse_weights(command.weights, read_card(run)["objectives"], simplex=command.simplex)
    check_folder(output, empty=True)
    policy = Policy.load(run, base_model=command.base_model)
    base = model_path(policy.base_model)
    folder = clp_kernels.export_adapter(policy.model, row, output, base_model=base)
    print(f"PEFT adapter of rank {sum(_ranks(policy.model))}: {folder}")


def _ranks(model: Any) -> tuple[int, ...]:
    from clp_kernels.nn.mixed_lora import steered_layers

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
    # A process may have been started without standard streams. Files must not take their places.
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:
            setattr(sys, stream, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A completion may hold characters that the terminal's encoding does not have.
        sys.stdout.reconfigure(errors="backslashreplace")
    name, *argv = sys.argv[1:] or ["--help"]
    stopped: list[int] = []

    def stop_now(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as by nohup
        signal.signal(signal.SIGINT, stop_now)
    try:
        try:
            _run(name, argv)
        except SystemExit:  # the options' help has been printed
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        hint = f"; {stop}" if str(stop) else ""
        _end(130, f"clp {name}: stopped{hint}\n")
    except BrokenPipeError:
        # What reads the output has gone (`| head`): nobody is left to be told.
        _end(128 + signal.SIGPIPE)
    except (ValueError, TypeError, OSError, MemoryError) as error:
        if stopped:  # PyTorch's C++ makes other errors of the KeyboardInterrupt
            _end(130, f"clp {name}: stopped\n")
        said = " ".join(str(error).split()) or "not enough memory"
        _end(2, f"clp {name}: error: {said}\n")
    finally:
        if signal.getsignal(signal.SIGINT) is stop_now:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(name: str, argv: Sequence[str]) -> None:
    if name in ("--help", "-h"):
        print("clp: one policy for every trade-off between objectives\n")
        for run in COMMANDS.values():
            print(f"  {(run.__doc__ or '').splitlines()[0]}")
        print("\nOptions of a command: clp COMMAND --help; the version: clp --version")
    elif name == "--version":
        # Of what is installed: clp_kernels.__version__ would import torch.
        print(f"clp {importlib.metadata.version('clp-steer')}")
    elif name in COMMANDS:
        COMMANDS[name](argv)
    else:
        _end(2, f"clp: unknown command {name!r}; one of {', '.join(COMMANDS)}\n")


def _end(code: int, message: str = "") -> NoReturn:
    """Ends with this code, and the message on standard error.

    A stream that takes nothing more (a full disk, a closed pipe) loses what is left for it. The
    interpreter would fail once more when it flushes that, and end with another code.
    """
    for stream, text in ((sys.stdout, ""), (sys.stderr, message)):
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    raise SystemExit(code)
