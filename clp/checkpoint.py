"""Checkpoints: complete or absent. A folder is written under another name and renamed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from clp.policy import Policy

_PREFIX = "checkpoint-"


def save_checkpoint(
    run: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, keep: int
) -> Path:
    """Writes run/checkpoint-<step>: the policy, optimizer.safetensors and state.json.

    Files and folder are flushed to disk before the rename, so that a folder of that name is
    complete whenever the machine stops. On an error (disk full) the partial folder is removed and
    the earlier checkpoints stay. Afterwards only the newest `keep` remain.
    """
    final = run / f"{_PREFIX}{step:06d}"
    partial = run / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        policy.save(partial)
        tensors = _optimizer_tensors(policy.adapter_parameters(), optimizer)
        (partial / "optimizer.safetensors").write_bytes(safetensors.torch.save(tensors))
        (partial / "state.json").write_text(json.dumps({"step": step}) + "\n", encoding="utf-8")
        for path in [*partial.rglob("*"), partial]:
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _flush(run)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [p for p in run.glob(f"{_PREFIX}*") if (p / "state.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(_PREFIX)))


def load_step(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        return int(state["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {checkpoint} has no readable state.json: {error}") from error


def load_optimizer(
    checkpoint: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Restores AdamW's state, exactly.

    Raises: ValueError where the file does not fit the parameters.
    """
    path = checkpoint / "optimizer.safetensors"
    try:
        tensors = safetensors.torch.load(path.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    wanted = {f"{n}.{key}" for n in parameters for key in ("step", "exp_avg", "exp_avg_sq")}
    if set(tensors) != wanted:
        odd = sorted(set(tensors) ^ wanted)[:3]
        raise ValueError(f"{path} does not belong to these parameters: {', '.join(odd)}")
    for name, parameter in parameters.items():
        state = {key: tensors[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        if state["exp_avg"].shape != parameter.shape:
            raise ValueError(f"{path}: {name} has shape {list(state['exp_avg'].shape)}, expected "
                             f"{list(parameter.shape)}")  # fmt: skip
        optimizer.state[parameter] = {
            "step": state["step"].clone(),
            "exp_avg": state["exp_avg"].to(parameter.device),
            "exp_avg_sq": state["exp_avg_sq"].to(parameter.device),
        }


def _optimizer_tensors(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in parameters.items():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            tensors[f"{name}.{key}"] = optimizer.state[parameter][key].detach().cpu().contiguous()
    return tensors


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
