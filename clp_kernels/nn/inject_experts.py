"""`inject_experts`: puts experts beside the parameters of a model, as differences from them."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clp_kernels import checks
from clp_kernels.nn.experts import Experts, MixedEmbedding, MixedLinear, MixedModule, weight_of
from clp_kernels.nn.inject import flattened_targets
from clp_kernels.nn.mix_models import (
    Stacks,
    conditioned,
    input_embedding,
    refuse_other_architecture,
    refuse_other_values,
    replace,
    why_bypassed,
    why_not_mixed,
)
from clp_kernels.nn.mixed_lora import is_linear
from clp_kernels.nn.probe import OneExamplePerWeights
from clp_kernels.nn.steering import Steering, all_steered, distinct_names
from clp_kernels.registry import requested


def inject_experts(
    model: nn.Module,
    names: Sequence[str],
    *,
    target_modules: str | Sequence[str] = "full",
    exclude_modules: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> list[str]:
    """Gives every target module m experts, in place, and freezes the model's own parameters.

        theta(b) = theta_ref + sum_i weights[b, i] delta_i        for every target's parameters

    The differences delta_i are zero at the start, so that any weights give the model itself, bit
    for bit. Tied parameters share their differences if both are targets; else only the target's
    differ, and the model is untied in effect.

    Args:
        model: Any module of linear layers, embeddings and norms.
        names: m names, in the order of the columns of `weights`.
        target_modules: "full", every module with parameters; "attention", the linear layers inside
            modules whose class name ends with Attention; "head", the output embedding; or names:
            each equals a module's name or its ending after a dot, and stands for all modules with
            parameters in it.
        exclude_modules: Names to leave out, matched in the same way.
        dtype: Of the differences.
        backend: Of the calls of linear layers; see `mixed_linear`.

    Returns:
        The names of the target modules. Run the model inside `steer(model, weights)`; weights of
        None give the base model.

    Raises:
        ValueError: bad names, a name that matches nothing, a model that has steered layers already,
            or a target that cannot be mixed. All checks come before the first change.
    Source: arXiv:2407.15762, full-, attention- and logit-conditioned CLP.
    """
    if all_steered(model):
        raise ValueError("model has steered layers already; inject_experts works once a model")
    if isinstance(exclude_modules, str):
        raise ValueError(f"exclude_modules must be a list of names, got {exclude_modules!r}")
    if isinstance(target_modules, str):
        if target_modules not in ("full", "attention", "head"):
            raise ValueError(
                'target_modules must be "full", "attention", "head" or a list of names, got '
                f"{target_modules!r}"
            )
        # Of all modules those that cannot be mixed may be excluded: put_experts looks.
        everything = target_modules == "full"
        targets = _owners(model) if everything else conditioned(model, target_modules)
    else:
        targets = _inside(model, target_modules, "target_modules")
    excluded = _inside(model, exclude_modules, "exclude_modules")
    targets = {name: module for name, module in targets.items() if name not in excluded}
    if not targets:
        raise ValueError("target_modules names no module with parameters, or all are excluded")
    excludable = target_modules not in ("attention", "head")
    put_experts(model, names, targets, dtype, excludable=excludable, backend=backend)
    return list(targets)


def put_experts(
    model: nn.Module,
    names: Sequence[str],
    targets: dict[str, nn.Module],
    dtype: torch.dtype,
    *,
    excludable: bool = False,
    backend: str = "auto",
) -> None:
    """As inject_experts, for targets by name; `excludable`: errors say how to leave one out."""
    names = distinct_names("names", names)
    requested(backend)
    if dtype not in checks.FLOATS:
        raise ValueError(f"dtype must be a floating dtype, got {dtype}")
    faults: dict[str, str] = {}
    for name, module in targets.items():
        if fault := why_not_mixed(name, module) or why_bypassed(module):
            faults[name] = fault
    if faults:
        name, fault = next(iter(faults.items()))
        last = list(dict.fromkeys(odd.rpartition(".")[2] for odd in faults))
        hint = f"; exclude_modules={last} leaves out all such modules"
        raise ValueError(
            f"{name or 'the model'} {fault}: experts cannot be mixed there"
            f"{hint if excludable and all(faults) else ''}"
        )
    words = input_embedding(model)
    flattened = flattened_targets(
        model, [name for name, m in targets.items() if not isinstance(m, nn.Embedding)]
    )
    model.requires_grad_(False)
    steering, stacks = Steering(), Stacks()
    for name, module in targets.items():
        layer: Experts
        if isinstance(module, nn.Embedding):
            layer = MixedEmbedding(
                stacks.of([module.weight], _zeros(module.weight, len(names), dtype)),
                names,
                steering=steering,
                scale=getattr(module, "embed_scale", None),
                padding_idx=module.padding_idx,
                broadcast=module is not words,  # positions
                base_layer=module,
            )
        elif is_linear(module):
            bias: Any = module.bias
            layer = MixedLinear(
                stacks.of([module.weight], _zeros(weight_of(module), len(names), dtype)),
                None if bias is None else stacks.of([bias], _zeros(bias, len(names), dtype)),
                names,
                steering=steering,
                base_layer=module,
                backend=backend,
            )
        else:
            experts = [_zero_copy(module, dtype) for _ in names]
            layer = MixedModule(experts, names, steering=steering, base_layer=module)
        for parameter in layer.own_parameters():
            parameter.requires_grad_(True)
        layer.flattened = name in flattened
        replace(model, module, layer)
    for around in dict.fromkeys(flattened.values()):
        guard = OneExamplePerWeights(steering)
        around.register_forward_pre_hook(guard, with_kwargs=True)


def expert_layers(model: nn.Module) -> dict[str, Experts]:
    """The layers with experts by module name, in module order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Experts)}


def expert_state(model: nn.Module, i: int) -> dict[str, Tensor]:
    """Expert i's differences, under the names of the parameters that they are differences from.

    What tied parameters share stands under each of its names. The tensors share memory with the
    model's.
    """
    return {
        f"{name}.{key}": value
        for name, layer in expert_layers(model).items()
        for key, value in layer.parameters_of(i).items()
    }


def differences(
    model: nn.Module, other: nn.Module, name: str, *, conditioning: str = "full"
) -> dict[str, Tensor]:
    """The other model's parameters minus the model's, float32, for `load_experts`.

    Args:
        name: What errors call the other model.
        conditioning: "full", "attention" or "head", as in `mix_models`; what it does not name must
            be equal in both.

    Raises: ValueError, naming what differs in kind, or in value where it must not.
    """
    who = f"the base and {name}"
    refuse_other_architecture(model, other, who)
    targets = conditioned(model, conditioning)
    mixed = {id(p) for module in targets.values() for p in module.parameters(recurse=False)}
    refuse_other_values(model, other, mixed, who, conditioning)
    return {
        f"{target}.{key}": other.get_parameter(f"{target}.{key}").detach().float() - own.float()
        for target, module in targets.items()
        for key, own in module.named_parameters(recurse=False)
    }


def load_experts(
    model: nn.Module,
    names: Sequence[str],
    states: Sequence[Mapping[str, Tensor]],
    dtype: torch.dtype = torch.float32,
) -> None:
    """As inject_experts, with differences from `expert_state`; the targets are what they name.

    Raises: ValueError for names or shapes that do not fit the model, or that differ between the
        states, and as inject_experts.
    """
    if all_steered(model):
        raise ValueError("model has steered layers already; load_experts works once a model")
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, state in zip(names, states, strict=True):
        if set(state) != set(states[0]):
            odd = sorted(set(state) ^ set(states[0]))[0]
            raise ValueError(
                f"states must have the same names, {odd} is not in both {names[0]} and {name}"
            )
        for key, value in state.items():
            if key not in own:
                raise ValueError(f"the model has no {key}, of which {name} has a difference")
            if value.shape != own[key].shape or value.dtype not in checks.FLOATS:
                raise ValueError(
                    f"{key} of {name} must be floating of shape {list(own[key].shape)}, got "
                    f"{value.dtype} {list(value.shape)}"
                )
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = dict.fromkeys(key.rpartition(".")[0] for key in (states[0] if states else ()))
    targets = {name: modules[name] for name in owners}
    whole = {f"{n}.{p}" for n, m in targets.items() for p, _ in m.named_parameters()}
    if missing := sorted(whole - set(states[0] if states else ())):
        raise ValueError(f"states must have all parameters of a module, {missing[0]} is missing")
    put_experts(model, names, targets, dtype)
    with torch.no_grad():
        for i, state in enumerate(states):
            for key, parameter in expert_state(model, i).items():
                parameter.copy_(state[key])


def _inside(model: nn.Module, names: Sequence[str], argument: str) -> dict[str, nn.Module]:
    """The modules with parameters of their own that these names stand for."""
    owners = _owners(model)
    found: set[str] = set()
    for target in names:
        hits = {n for n in owners if f".{n}.".find(f".{target}.") >= 0}
        if not hits:
            raise ValueError(f"{argument}: {target!r} names no module with parameters")
        found |= hits
    return {n: m for n, m in owners.items() if n in found}


def _owners(model: nn.Module) -> dict[str, nn.Module]:
    """The modules with parameters of their own."""
    return {n: m for n, m in model.named_modules() if [*m.parameters(recurse=False)]}


def _zeros(like: Tensor, m: int, dtype: torch.dtype) -> list[Tensor]:
    """m zeros of this shape and layout."""
    dtype = torch.float64 if like.dtype == torch.float64 else dtype
    return [torch.zeros_like(like, dtype=dtype)] * m


def _zero_copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    made = copy.deepcopy(module)
    for parameter in made.parameters():
        parameter.data = _zeros(parameter.data, 1, dtype)[0]
    return made
