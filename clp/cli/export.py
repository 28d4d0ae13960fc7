"""clp export: its options, and what it does with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from clp.data.paths import check_folder, home_expanded


@dataclass
class ExportCommand:
    """Write one ordinary PEFT adapter for fixed weights, for vLLM or any other server."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder or checkpoint."""
    output: Annotated[str, tyro.conf.Positional]
    """Folder to write; must not exist or be empty."""
    weights: str
    """Such as "joy=0.7,brief=0.3"."""
    simplex: bool = True
    """Refuse weights that are negative or have a sum other than 1."""
    base_model: str | None = None
    """Where the base model is, if it has moved."""


def run(argv: Sequence[str]) -> None:
    """clp export RUN FOLDER --weights "joy=0.7,brief=0.3": one PEFT adapter."""
    command = tyro.cli(ExportCommand, prog="clp export", args=argv)
    import clp_kernels
    from clp.data.weights import parse_weights
    from clp.policies.card import read_card
    from clp.policies.loading import model_path
    from clp.policies.policy import Policy
    from clp_kernels.nn.mixed_lora import steered_layers

    folder, output = home_expanded(command.run), home_expanded(command.output)
    objectives = read_card(folder)["objectives"]
    weights = parse_weights(command.weights, objectives, simplex=command.simplex)
    check_folder(output, empty=True)
    policy = Policy.load(folder, base_model=command.base_model)
    base = model_path(policy.base_model)
    written = clp_kernels.export_adapter(policy.model, weights, output, base_model=base)
    ranks = (layer.ranks for layer in steered_layers(policy.model).values())
    print(f"PEFT adapter of rank {sum(map(max, zip(*ranks, strict=True)))}: {written}")
