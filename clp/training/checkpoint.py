"""Checkpoints: complete or absent. A folder is written under another name and renamed."""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from clp.data.json_lines import read_json
from clp.policies.policy import Policy
from clp.training.value_head import ValueHead
from clp_kernels.files import whole_folder

_NAME = re.compile("checkpoint-([0-9]+)")
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """The numbers of a training that are not parameters: state.json.

    Attributes:
        step: Steps done.
        num_tokens: Tokens of their prompts and completions.
        skipped_steps: Those among them whose gradient was not finite.
        skipped_in_a_row: The last of them, up to `step`; 0 if that one was not skipped.
        completions, sampled_tokens: All that were sampled, those that measure the reward scale
            included; every objective scores each completion.
        gradient_steps: Gradients computed.
        seconds: Time of the steps and of measuring the reward scale. Steps that a kill has lost
            count nowhere here.
    """

    step: int = 0
    num_tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    completions: int = 0
    sampled_tokens: int = 0
    gradient_steps: int = 0
    seconds: float = 0.0


def save_checkpoint(
    run: Path,
    progress: Progress,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    keep: int,
    value: ValueHead | None = None,
    settings: str = "",
) -> Path:
    """Writes run/checkpoint-<step>: the policy, optimizer.safetensors, value.safetensors if there
    is a value head (its parameters and its optimizer's state), `settings` as training.yaml, for a
    copy of the folder alone, and state.json.

    It is a `whole_folder`: on an error (disk full) the earlier checkpoints stay. Afterwards only
    the newest `keep` remain; folders with other names than checkpoint-<number> are not counted.
    """
    final = run / f"checkpoint-{progress.step:06d}"
    with whole_folder(final) as partial:
        policy.save(partial)
        tensors = _optimizer_tensors(policy.trainable_parameters(), optimizer)
        (partial / "optimizer.safetensors").write_bytes(safetensors.torch.save(tensors))
        if value is not None:
            own = dict(value.named_parameters())
            tensors = _optimizer_tensors(own, value.optimizer)
            tensors |= {name: p.detach().cpu().contiguous() for name, p in own.items()}
            (partial / "value.safetensors").write_bytes(safetensors.torch.save(tensors))
        (partial / "training.yaml").write_text(settings, encoding="utf-8")
        (partial / "state.json").write_text(json.dumps(asdict(progress)) + "\n", encoding="utf-8")
    for hidden in run.glob(".checkpoint-*.old"):  # left by an interruption
        shutil.rmtree(hidden)
    for old in checkpoints(run)[:-keep]:
        hidden = old.rename(old.with_name(f".{old.name}.old"))  # no part of it is ever seen
        shutil.rmtree(hidden)
    return final


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = {
        path: int(name[1])
        for path in run.glob("checkpoint-*")
        if (name := _NAME.fullmatch(path.name)) and (path / "state.json").is_file()
    }
    return sorted(found, key=found.__getitem__)


def load_progress(checkpoint: Path) -> Progress:
    """What a checkpoint was written after; numbers that an older one lacks are 0.

    Raises: ValueError if state.json cannot be read or holds anything else.
    """
    path = checkpoint / "state.json"
    try:
        values = read_json(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    known = Progress.__dataclass_fields__
    if (
        not isinstance(values, dict)
        or "step" not in values
        or not set(values) <= set(known)
        or not all(_is_count(value, known[name].type) for name, value in values.items())
    ):
        raise ValueError(f"{path} must hold {', '.join(known)}, got {values!r:.200}")
    return Progress(**values)


def _is_count(value: Any, kind: Any) -> bool:
    kinds = (int, float) if kind is float else (int,)
    return type(value) in kinds and 0 <= value < float("inf")


def load_optimizer(
    checkpoint: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Restores AdamW's state, exactly.

    Raises: ValueError if the file does not fit the parameters.
    """
    tensors = _read(checkpoint / "optimizer.safetensors", parameters, _MOMENTS)
    _restore_optimizer(tensors, parameters, optimizer)


def load_value_head(checkpoint: Path, value: ValueHead) -> None:
    """Restores the parameters of the value head and its optimizer's state, exactly.

    Raises: ValueError if the file does not fit them.
    """
    parameters = dict(value.named_parameters())
    tensors = _read(checkpoint / "value.safetensors", parameters, ("", *_MOMENTS))
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[name])
    _restore_optimizer(tensors, parameters, value.optimizer)


def _read(
    path: Path, parameters: dict[str, nn.Parameter], kinds: tuple[str, ...]
) -> dict[str, Tensor]:
    """The tensors of a file, which has one of each kind for each parameter ("": itself).

    Raises: ValueError if it has not, or if one has another dtype or shape.
    """
    try:
        tensors = safetensors.torch.load(path.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    wanted = {
        f"{name}.{kind}" if kind else name: torch.Size() if kind == "step" else parameter.shape
        for name, parameter in parameters.items()
        for kind in kinds
    }
    if tensors.keys() != wanted.keys():
        odd = sorted(tensors.keys() ^ wanted.keys())[:3]
        raise ValueError(f"{path} does not belong to these parameters: {', '.join(odd)}")
    for key, shape in wanted.items():
        tensor = tensors[key]
        if tensor.shape != shape or tensor.dtype != torch.float32:
            raise ValueError(
                f"{path}: {key} must be float32 of shape {list(shape)}, got {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
    return tensors


def _restore_optimizer(
    tensors: dict[str, Tensor],
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    for name, parameter in parameters.items():
        optimizer.state[parameter] = {
            "step": tensors[f"{name}.step"].clone(),
            "exp_avg": tensors[f"{name}.exp_avg"].to(parameter.device),
            "exp_avg_sq": tensors[f"{name}.exp_avg_sq"].to(parameter.device),
        }


def _optimizer_tensors(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in parameters.items():
        # AdamW makes the state of a parameter at its first gradient (that of an idle expert may
        # never come), and what it then makes is zeros.
        step = torch.zeros((), dtype=torch.float32)
        nothing = (step, torch.zeros_like(parameter), torch.zeros_like(parameter))
        state = optimizer.state.get(parameter) or dict(zip(_MOMENTS, nothing, strict=True))
        for key in _MOMENTS:
            tensors[f"{name}.{key}"] = state[key].detach().cpu().contiguous()
    return tensors
