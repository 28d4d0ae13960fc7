"""Conditionings "full", "attention" and "head": experts as differences from the base model."""

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from clp.data.condition import beta
from clp.data.kl_range import KLRange
from clp.policies.interface import Conditioning
from clp.policies.loading import load_base
from clp_kernels import inject_experts
from clp_kernels.files import whole_file, whole_folder
from clp_kernels.nn.inject_experts import expert_layers, expert_state, load_experts
from clp_kernels.nn.mixed_lora import is_transposed


class Experts(Conditioning):
    """See clp.policies.interface.Conditioning.

    experts/<objective>.safetensors holds the differences under the names of the base model's
    parameters; its metadata names those that share theirs with another (tied parameters).

    With a range of KL strengths alpha, where beta = alpha / (1 - alpha), the differences have the
    coefficients w_i beta_low / beta: the lowest strength has them whole, and higher ones are
    interpolated towards the base model.
    """

    def __init__(self, name: str, kl_range: KLRange | None = None) -> None:
        self.name, self.kl_range = name, kl_range

    def layer_weights(self, condition: Tensor) -> Tensor:
        """As Conditioning.layer_weights: [..., m] themselves, or [..., m + 1] -> [..., m]."""
        if self.kl_range is None:
            return condition
        weights, alpha = condition[..., :-1], condition[..., -1:]
        return weights * (beta(self.kl_range.low) / beta(alpha))

    def inject(
        self,
        model: nn.Module,
        objectives: Sequence[str],
        *,
        target_modules: str | Sequence[str],
        exclude_modules: Sequence[str],
    ) -> None:
        """New experts, whose differences are zero."""
        targets: str | Sequence[str] = self.name
        if target_modules != "all-linear":
            if self.name != "full":
                raise ValueError(
                    f"target_modules must be left out with conditioning {self.name!r}, which is "
                    f'"full" of certain modules, got {target_modules!r}'
                )
            targets = target_modules
        inject_experts(model, objectives, target_modules=targets, exclude_modules=exclude_modules)

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Every difference, by name; one that two layers share goes by the first."""
        layers = [layer for layer in expert_layers(model).values() if layer.has_base]
        own = {p for layer in layers for p in layer.own_parameters()}
        return {name: p for name, p in model.named_parameters() if p in own}

    def save(
        self, model: nn.Module, objectives: Sequence[str], directory: Path, base_model: str
    ) -> dict[str, str]:
        """Writes experts/<objective>.safetensors; their digests.

        Raises: ValueError for a mixture of whole models, or NaN or infinity in a difference.
        """
        if not all(layer.has_base for layer in expert_layers(model).values()):
            raise ValueError(
                f"the experts of this policy ({', '.join(objectives)}) are whole models; "
                "save those, and load them with Policy.from_models"
            )
        folder = directory / "experts"
        folder.mkdir(parents=True, exist_ok=True)
        digests = {}
        for i, name in enumerate(objectives):
            tensors: dict[str, Tensor] = {}
            shared: dict[str, str] = {}
            first: dict[Any, str] = {}
            for key, value in expert_state(model, i).items():
                if not bool(value.isfinite().all()):
                    raise ValueError(f"the difference of {key} of {name} is not finite")
                same = first.setdefault((value.data_ptr(), value.shape), key)
                if same == key:
                    tensors[key] = value.detach().contiguous()
                else:
                    shared[key] = same
            path = folder / f"{name}.safetensors"
            with whole_file(path) as temporary:
                safetensors.torch.save_file(tensors, temporary, metadata=shared or None)
            digests[name] = _digest(path)
        return digests

    def load(
        self, model: nn.Module, objectives: Sequence[str], directory: Path, digests: dict[str, Any]
    ) -> None:
        """Puts the experts of a folder into the base model.

        Raises: ValueError if one is missing or damaged, differs from its digest, or does not fit.
        """
        states = []
        for name in objectives:
            path = directory / "experts" / f"{name}.safetensors"
            if not path.is_file():
                raise ValueError(f"expert {path} is missing")
            if _digest(path) != digests.get(name):
                raise ValueError(f"{path} is not the expert that {directory / 'clp.json'} names")
            try:
                with safetensors.safe_open(path, "pt") as file:
                    state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                    shared = file.metadata() or {}
            except (safetensors.SafetensorError, OSError) as error:
                raise ValueError(f"expert {path} cannot be read: {error}") from error
            for key, same in shared.items():
                if same not in state:
                    raise ValueError(f"expert {path} lacks {same}, which {key} shares")
                state[key] = state[same]
            states.append(state)
        try:
            load_experts(model, objectives, states)
        except ValueError as error:
            raise ValueError(
                f"{directory / 'experts'} does not fit the base model: {error}"
            ) from error

    def export(
        self,
        model: Any,
        objectives: Sequence[str],
        condition: Tensor,
        folder: Path,
        base_model: str,
        tokenizer: Any,
        ends: Collection[int],
    ) -> str:
        """Writes one ordinary model for a fixed condition; says what it is.

        Its parameters are theta + sum_i c_i delta_i, with the layers' weights c, or sum_i c_i
        theta_i for a mixture of whole models without a base, in the dtype of the policy. A head
        that is tied in the base and alone conditioned is written untied. Its generation ends at the
        ids of `ends`.
        """
        folder = folder.resolve()
        plain, _ = load_base(base_model, model.dtype)
        weights = self.layer_weights(condition).tolist()
        states = [expert_state(model, i) for i in range(len(weights))]
        has_base = all(layer.has_base for layer in expert_layers(model).values())
        _untie(plain, set(states[0]))
        tied = {id(p): n for n, p in plain.named_parameters(remove_duplicate=False)}
        with torch.no_grad():
            for name in tied.values():
                if name in states[0]:
                    parameter = plain.get_parameter(name)
                    total = parameter.double()
                    if not has_base:
                        total.zero_()
                    owner, _, key = name.rpartition(".")
                    # GPT-2's layers keep their weight transposed, the experts of a mixture do not.
                    turned = not has_base and is_transposed(plain.get_submodule(owner))
                    for w, state in zip(weights, states, strict=True):
                        value = state[name].double().cpu()
                        total += w * (value.t() if turned and key == "weight" else value)
                    parameter.copy_(total)
        if ends:
            first, *others = sorted(ends)
            plain.generation_config.eos_token_id = [first, *others] if others else first
        with whole_folder(folder) as partial:
            plain.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        return f"model: {folder}"


def _untie(model: Any, names: set[str]) -> None:
    """Gives those of the names that are tied to other parameters a copy of their own."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    for group in groups.values():
        inside = [name for name in group if name in names]
        if inside and len(inside) < len(group):
            copied = nn.Parameter(model.get_parameter(inside[0]).detach().clone(), False)
            for name in inside:
                owner, _, key = name.rpartition(".")
                setattr(model.get_submodule(owner), key, copied)
            model.config.tie_word_embeddings = False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
