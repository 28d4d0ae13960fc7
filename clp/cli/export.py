"""clp export: its options, and what it does with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from clp.data.paths import check_folder, home_expanded


@dataclass
class ExportCommand:
    """Write what vLLM or any other server can load for fixed weights: one ordinary PEFT adapter, or
    one whole model if the conditioning is "full", "attention" or "head"."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder or checkpoint."""
    output: Annotated[str, tyro.conf.Positional]
    """Folder to write; must not exist or be empty."""
    weights: str
    """Such as "joy=0.7,brief=0.3"."""
    kl: float | None = None
    """KL strength alpha, if the run has a kl_range; default: its geometric mean."""
    simplex: bool = True
    """Refuse weights that are negative or have a sum other than 1."""
    base_model: str | None = None
    """Where the base model is, if it has moved."""


def run(argv: Sequence[str]) -> None:
    """clp export RUN FOLDER --weights "joy=0.7,brief=0.3": one PEFT adapter or model."""
    command = tyro.cli(ExportCommand, prog="clp export", args=argv)
    from clp.data.condition import Condition, parse_condition
    from clp.policies.card import read_card
    from clp.policies.policy import Policy

    folder, output = home_expanded(command.run), home_expanded(command.output)
    card, condition = read_card(folder), Condition(command.weights, command.kl)
    parse_condition(condition, card["objectives"], card["kl_range"], simplex=command.simplex)
    check_folder(output, empty=True)
    print(Policy.load(folder, base_model=command.base_model).export(condition, output))
