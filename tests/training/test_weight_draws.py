"""args.weight_draws and CLPTrainer(draw_weights=...)."""

from unittest.mock import Mock

import pytest
import torch
from tiny_runs import config, metrics

from clp.data.weights import weight_grid
from clp.rewards import brevity, diversity, sentiment
from clp.training.config import load_config
from clp.training.trainer import CLPTrainer
from clp.training.weight_draws import weight_draws

REWARDS = {"joy": sentiment, "brief": brevity, "varied": diversity}
ROWS = [{"prompt": "Tom had a red kite."}, {"prompt": "Mia"}]


def trainer(folder, draw_weights=None, **changes):
    args = config(folder, **changes)
    return CLPTrainer("tiny", REWARDS, args, ROWS, draw_weights=draw_weights)


def tilted(count, generator):
    """Mostly joy; the other two share the rest."""
    joy = 0.8 + 0.2 * torch.rand(count, 1, generator=generator)
    return torch.cat([joy, (1 - joy) / 2, (1 - joy) / 2], 1)


@pytest.mark.parametrize("name", ["dirichlet", "faces", "grid"])
def test_a_step_trains_on_what_is_named(tmp_path, name):
    one = trainer(tmp_path / "r", weight_draws=name, num_prompts=8, max_steps=1)
    drawn = one.draw(8, torch.Generator().manual_seed(0))
    if name == "grid":
        assert all(any(torch.equal(w, g) for g in weight_grid(3)) for w in drawn)
    if name == "faces":
        assert set((drawn > 0).sum(1).tolist()) <= {1, 2, 3} and (drawn == 1).any()
    seen = []
    real, one.draw = one.draw, lambda *args: seen.append(real(*args)) or seen[-1]
    one.train()
    [row] = metrics(tmp_path / "r")
    for i, objective in enumerate(REWARDS):
        assert row[f"reward_weights/{objective}"] == pytest.approx(float(seen[0][:, i].mean()))
        std = float(seen[0][:, i].std())
        assert row[f"reward_weights/{objective}/std"] == pytest.approx(std)


def test_a_function_draws_and_resuming_is_exact(tmp_path):
    trainer(tmp_path / "whole", tilted).train()
    rows = metrics(tmp_path / "whole")
    assert all(row["reward_weights/joy"] >= 0.8 for row in rows)
    assert load_config(tmp_path / "whole/config.yaml").weight_draws == "function"
    cut = trainer(tmp_path / "cut", tilted)
    for _ in range(2):
        cut.train_step()
    cut.save()
    del cut
    trainer(tmp_path / "cut", tilted, resume=True).train()
    assert metrics(tmp_path / "cut")[-2:] == rows[-2:]
    with pytest.raises(ValueError, match="needs the function: in Python"):
        trainer(tmp_path / "cut", resume=True, weight_draws="function")
    refused = "run with weight_draws='function'; resume asks for 'grid'"
    with pytest.raises(ValueError, match=refused):
        trainer(tmp_path / "cut", resume=True, weight_draws="grid")


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (
            lambda n: torch.ones(n, 2) / 2,
            r"draw_weights must return a tensor \[2, 3\], got \[2, 2\]",
        ),
        (lambda n: torch.ones(3, 3) / 3, r"tensor \[2, 3\], got \[3, 3\]"),
        (lambda n: [[1.0, 0.0, 0.0]] * n, r"tensor \[2, 3\], got list"),
        (lambda n: None, r"tensor \[2, 3\], got NoneType"),
        (lambda n: torch.ones(n, 3), "weights must be >= 0 and sum to 1, got joy=1, brief=1"),
        (lambda n: torch.tensor([[2.0, -1.0, 0.0]] * n), "weights must be >= 0 and sum to 1"),
        (lambda n: torch.full((n, 3), float("nan")), "weights: joy must be finite"),
    ],
)
def test_a_function_that_draws_no_weights_is_refused_at_the_start(tmp_path, drawn, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path / "r", lambda count, generator: drawn(count))
    assert list(tmp_path.iterdir()) == []


def test_what_a_function_raises_passes_through(tmp_path):
    with pytest.raises(LookupError, match="no table"):
        trainer(tmp_path / "r", Mock(side_effect=LookupError("no table")))
    assert list(tmp_path.iterdir()) == []


def test_without_a_function_and_with_numbers_that_would_be_ignored(tmp_path):
    with pytest.raises(ValueError, match="needs the function"):
        weight_draws(config(tmp_path, weight_draws="function"), ["a"], None)
    for name, value in (("dirichlet", 0.5), ("corner_probability", 0.0)):
        for draws in ("faces", "grid", "function"):
            refused = f"{name} must be left out with weight_draws='{draws}'"
            with pytest.raises(ValueError, match=refused):
                config(tmp_path, weight_draws=draws, **{name: value})
