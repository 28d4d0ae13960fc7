"""Checkpoints: what they hold, which folders are some, and parameters without a gradient."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from clp.training.checkpoint import (
    Progress,
    checkpoints,
    load_optimizer,
    load_progress,
    save_checkpoint,
)


class Adapters:
    """Stands for a policy: `used` gets a gradient at every step, `idle` at none or later."""

    def __init__(self):
        values = torch.Generator().manual_seed(0)
        self.used, self.idle = (nn.Parameter(torch.randn(3, 2, generator=values)) for _ in range(2))
        self.optimizer = torch.optim.AdamW([self.used, self.idle], lr=0.1, weight_decay=0.1)

    def trainable_parameters(self):
        return {"used": self.used, "idle": self.idle}

    def save(self, folder):
        self.saved = self.used.data.clone(), self.idle.data.clone()

    def step(self, number, idle):
        self.optimizer.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(number)
        for parameter in (self.used, self.idle) if idle else (self.used,):
            parameter.grad = torch.randn(3, 2, generator=generator)
        self.optimizer.step()


def test_a_parameter_without_a_gradient_is_saved_and_resumed_exactly(tmp_path):
    whole = Adapters()
    for number in range(2):
        whole.step(number, idle=False)
    folder = save_checkpoint(tmp_path, Progress(2), whole, whole.optimizer, keep=2)
    resumed = Adapters()
    resumed.used.data, resumed.idle.data = whole.saved
    load_optimizer(folder, resumed.trainable_parameters(), resumed.optimizer)
    for number in range(2, 6):
        for one in (whole, resumed):
            one.step(number, idle=number > 3)
        assert torch.equal(whole.used, resumed.used) and torch.equal(whole.idle, resumed.idle)


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("wrong", [torch.zeros(7), torch.zeros((), dtype=torch.int64)])
def test_moments_that_do_not_fit_are_refused(tmp_path, key, wrong):
    adapters = Adapters()
    folder = save_checkpoint(tmp_path, Progress(1), adapters, adapters.optimizer, keep=1)
    path = folder / "optimizer.safetensors"
    save_file(load_file(path) | {f"idle.{key}": wrong}, path)
    with pytest.raises(ValueError, match=f"idle.{key} must be float32 of shape"):
        load_optimizer(folder, adapters.trainable_parameters(), adapters.optimizer)


def test_folders_with_other_names_are_no_checkpoints_and_stay(tmp_path):
    odd = ["checkpoint-best", "checkpoint-", "checkpoint-3x", "checkpoint--1", "checkpoint-\u0663"]
    for name in odd:
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("mine")
    (tmp_path / "checkpoint-9").mkdir()  # without state.json
    (tmp_path / "checkpoint-8").write_text("a file")
    adapters = Adapters()
    adapters.step(0, idle=True)
    for step in (9_999_999, 10_000_000, 5):
        save_checkpoint(tmp_path, Progress(step), adapters, adapters.optimizer, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-9999999", "checkpoint-10000000"]
    assert all((tmp_path / name).exists() for name in [*odd, "checkpoint-8", "checkpoint-9"])


def test_an_old_checkpoint_is_never_seen_in_part(tmp_path, monkeypatch):
    """It is gone after the next one, if its deletion was interrupted."""
    adapters, delete = Adapters(), shutil.rmtree
    adapters.step(0, idle=True)

    def save(step):
        save_checkpoint(tmp_path, Progress(step), adapters, adapters.optimizer, keep=1)

    def interrupted(path, **options):
        if "checkpoint-000001" not in path.name:
            return delete(path, **options)
        (path / "optimizer.safetensors").unlink()
        raise KeyboardInterrupt

    save(1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", interrupted)
        save(2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-000002"]
    save(1)  # as a run does that goes on from an earlier step
    save(3)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000003"]


def test_state(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({"step": 3}))
    assert load_progress(tmp_path) == Progress(3, 0, 0, 0)
    (tmp_path / "state.json").write_text('\ufeff{"step": 4}', encoding="utf-8")
    assert load_progress(tmp_path).step == 4


@pytest.mark.parametrize(
    "text", ["", "3", "[]", "{}", '{"step": "3"}', '{"step": true}', '{"step": -1}',
             '{"step": 1, "stop": 2}', "\\xff", "[" * 200_000]
)  # fmt: skip
def test_a_damaged_state_is_refused_by_name(tmp_path, text):
    (tmp_path / "state.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"state\.json"):
        load_progress(tmp_path)
