"""`inject`: puts adapters in place of the linear layers of a model, and refuses what it cannot."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clp_kernels import checks
from clp_kernels.nn.mixed_lora import (
    MAX_ALPHA,
    MAX_RANK,
    MixedLoRALinear,
    is_linear,
    why_not_linear,
)
from clp_kernels.nn.probe import OneExamplePerWeights, can_probe, layout
from clp_kernels.nn.steering import Steering, all_steered, distinct_names
from clp_kernels.registry import requested


def inject(
    model: nn.Module,
    adapters: Sequence[str],
    *,
    r: int = 8,
    lora_alpha: float = 16,
    target_modules: str | Sequence[str] = "all-linear",
    exclude_modules: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> list[str]:
    """Replaces the target layers of a model by MixedLoRALinear, in place, and freezes the rest.

    A text model of transformers runs here on six tokens, in eval mode, to see what its layers
    get: some flatten the tokens of a batch (OPT's fc1 and fc2, the shared experts of a mixture),
    and some put tokens first (Longformer), which is refused. Of another module nothing is known:
    the first axis of what its layers get must be the examples (else see `steer`'s example_ids).

    Args:
        model: Any module; transformers models get PEFT's meaning of "all-linear".
        adapters: Names of the m adapters (the objectives), in the order of `weights`' columns.
        r, lora_alpha: LoRA rank (at most 4096) and alpha (1e-6 to 1e6), the same for all, in PEFT's
            meaning.
        target_modules: "all-linear", or names matched as PEFT matches a list.
        exclude_modules: Names of targets to leave out, matched in the same way.
        dtype: Of the adapters' parameters: float32, or the base layers'.
        generator: Source of the start values; the global one if None.
        backend: Of the layers' calls; see `mixed_lora`.

    Returns:
        The names of the replaced modules. At the start B = 0: any weights give the base model.

    Raises:
        ValueError: bad r, lora_alpha or names, a name that matches nothing, a model injected
            before, or a target that cannot be steered, with what to leave out: a layer that has
            hooks or a forward of its own (routers, quantised layers), whose weight is read by the
            module around it, or that gets tokens gathered from the batch (experts).
    """
    if type(r) is not int or not 1 <= r <= MAX_RANK:
        raise ValueError(f"r must be an integer in [1, {MAX_RANK}], got {r!r}")
    # Much smaller ones give a scaling that is 0 in float32: nothing would be trained.
    if not 1 / MAX_ALPHA <= lora_alpha <= MAX_ALPHA:
        raise ValueError(
            f"lora_alpha must be a number in [{1 / MAX_ALPHA:g}, {MAX_ALPHA}], got {lora_alpha}"
        )
    if isinstance(exclude_modules, str):
        raise ValueError(f"exclude_modules must be a list of names, got {exclude_modules!r}")
    targets = target_linears(model, target_modules, exclude_modules)
    ranks = {name: [r] * len(adapters) for name in targets}
    alphas = {name: [float(lora_alpha)] * len(adapters) for name in targets}
    for layer in replace_linears(model, adapters, ranks, alphas, dtype, backend).values():
        layer.reset_parameters(generator)
    return list(targets)


def target_linears(
    model: nn.Module, target_modules: str | Sequence[str], exclude_modules: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """The linear layers that `target_modules` names and `exclude_modules` does not, by module name.

    "all-linear": every linear layer but the output embedding, as in PEFT. A list: each name equals
    a module's name or its ending after a dot.

    Raises: ValueError for a name that matches no linear layer, or where all are excluded.
    """
    linears = {n: m for n, m in model.named_modules() if is_linear(m)}
    if "" in linears:
        raise ValueError("model must be a module that holds linear layers, it is one itself")
    if isinstance(target_modules, str):
        if target_modules.lower() != "all-linear":
            raise ValueError(
                f'target_modules must be "all-linear" or a list of names, got {target_modules!r}'
            )
        get_head: Callable[[], Any] = getattr(model, "get_output_embeddings", lambda: None)
        head = get_head()
        found = {n for n, m in linears.items() if m is not head}
    else:
        found = set().union(*(_named(linears, t, "target_modules") for t in target_modules))
    excluded = set().union(*(_named(linears, t, "exclude_modules") for t in exclude_modules))
    return {n: m for n, m in linears.items() if n in found and n not in excluded}


def _named(linears: dict[str, nn.Module], target: str, argument: str) -> set[str]:
    """The names that equal `target`, or end with it after a dot."""
    hits = {n for n in linears if f".{n}".endswith(f".{target}")}
    if not hits:
        raise ValueError(f"{argument}: {target!r} names no linear layer of the model")
    return hits


def replace_linears(
    model: nn.Module,
    adapters: Sequence[str],
    ranks: dict[str, list[int]],
    lora_alpha: dict[str, list[float]],
    dtype: torch.dtype,
    backend: str = "auto",
) -> dict[str, MixedLoRALinear]:
    """Wraps the named layers (adapters all zero), freezes everything else, returns the new layers.

    `ranks` and `lora_alpha` hold one entry per adapter for each module name. All checks come before
    the first replacement, so a refused model is unchanged.
    """
    names = distinct_names("adapters", adapters)
    requested(backend)
    if all_steered(model):
        raise ValueError("model has adapters already; inject or load_adapters works once a model")
    if not ranks:
        raise ValueError("target_modules matches no linear layer of the model, or all are excluded")
    if dtype not in checks.FLOATS:
        raise ValueError(f"dtype must be a floating dtype, got {dtype}")
    _refuse_bypassed(model, list(ranks))
    weights: dict[str, Tensor] = {n: model.get_submodule(n).weight for n in ranks}  # type: ignore[misc]
    for name, weight in weights.items():
        if weight.dtype not in checks.FLOATS or weight.dim() != 2:
            raise ValueError(f"{name} has a {weight.dtype} weight of shape {list(weight.shape)}; "
                             "quantised layers are not supported")  # fmt: skip
        if weight.layout != torch.strided:
            raise ValueError(f"{name} has a weight of layout {weight.layout}, not a dense one")
        if dtype not in (torch.float32, weight.dtype):
            raise ValueError(f"dtype must be float32 or {name}'s {weight.dtype}, got {dtype}")
    flattened = flattened_targets(model, list(ranks))
    model.requires_grad_(False)
    steering, layers = Steering(), {}
    # A layer that the model holds under several names is steered under each.
    places = list(model.named_modules(remove_duplicate=False))
    for name in ranks:
        layer = model.get_submodule(name)
        layers[name] = MixedLoRALinear(
            layer,
            names,
            ranks=ranks[name],
            lora_alpha=lora_alpha[name],
            steering=steering,
            # A float64 model (tests, gradcheck) gets float64 adapters.
            dtype=torch.float64 if weights[name].dtype == torch.float64 else dtype,
            backend=backend,
        )
        for place in [n for n, module in places if module is layer]:
            parent, _, child = place.rpartition(".")
            setattr(model.get_submodule(parent), child, layers[name])
        layers[name].flattened = name in flattened
    for module in dict.fromkeys(flattened.values()):
        guard = OneExamplePerWeights(steering)
        module.register_forward_pre_hook(guard, with_kwargs=True)
    return layers


def _refuse_bypassed(model: nn.Module, names: list[str]) -> None:
    """ValueError for targets whose own computation would be left out."""
    faults = {}
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        fault = why_not_linear(model.get_submodule(name))
        if fault is None and isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            fault = f"is read by {type(parent).__name__} without a call"
        if fault:
            faults[name] = fault
    if faults:
        name = next(iter(faults))
        advice = "so does every other target"
        if len(faults) < len(names):
            advice = _leave_out(list(faults), names)
        raise ValueError(
            f"{name} {faults[name]}: adapters would leave out what it computes; {advice}"
        )


def flattened_targets(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """The targets that see flattened tokens, with the modules around them (nn.probe).

    Raises: ValueError for targets whose inputs cannot be told apart by example, or whose weight is
        used without a call.
    """
    if not can_probe(model):
        return {}
    found = layout(model, names)
    if odd := found.bypassed:
        raise ValueError(
            f"the weight of {odd[0]} is used without a call of the layer, where it is not steered; "
            f"{_leave_out(odd, names)}"
        )
    if odd := found.unsteerable:
        raise ValueError(
            f"{odd[0]} does not get one entry per example of the batch (an expert, for instance, "
            "gets the tokens that are routed to it), so that no weights belong to its inputs; "
            f"{_leave_out(odd, names)}"
        )
    return found.flattened


def _leave_out(odd: list[str], names: list[str]) -> str:
    """What to write to leave these targets out: their last names if no other target has one."""
    last = dict.fromkeys(name.rpartition(".")[2] for name in odd)
    kept = {name.rpartition(".")[2] for name in names if name not in set(odd)}
    shown = list(last) if kept.isdisjoint(last) else odd
    more = f" and {len(shown) - 20} more" if len(shown) > 20 else ""
    return f"leave out of target_modules: exclude_modules={shown[:20]}{more}"
