"""`mix_models`: m whole models as one whose every example mixes their parameters."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clp_kernels.nn.experts import MixedEmbedding, MixedLinear, MixedModule, weight_of
from clp_kernels.nn.mixed_lora import has_own_call, is_linear, why_not_linear, why_not_plain
from clp_kernels.nn.steering import SteeredLayer, Steering, all_steered, distinct_names
from clp_kernels.registry import requested

# Attributes of a module that say nothing about what it computes in a forward.
_PASSIVE = ("training", "gradient_checkpointing", "padding_idx", "inplace")


def mix_models(
    models: Sequence[nn.Module],
    names: Sequence[str],
    *,
    conditioning: str = "full",
    backend: str = "auto",
) -> nn.Module:
    """Turns the first of m models of one architecture into a mixture, in place, and returns it.

        theta(b) = sum_i weights[b, i] theta_i      for every conditioned parameter

    "full" conditions every parameter, "attention" the linear layers inside modules whose class
    name ends with Attention, "head" the output embedding alone. All others must be equal in the m
    models. The sum is taken over the outputs (see clp_kernels.nn.experts): exact for any weights
    if a layer is linear in its parameters, and for weights that sum to 1 if it is affine.

    Tied parameters stay tied with "full". With "head" a tied head is untied first, and the input
    embedding stays the first model's (config.tie_word_embeddings becomes False).

    Args:
        models: m transformers causal LMs with the same classes, parameters and buffers. The first
            one is changed; nothing is shared with the others, so drop them.
        names: m distinct names, in the order of the columns of `weights`.
        conditioning: "full", "attention" or "head".
        backend: Of the calls of linear layers; see `mixed_linear`.

    Returns:
        models[0], all parameters frozen; run it inside `steer(model, weights)`. The expert
        parameters (`expert_weight`, `expert_bias`, `experts`) may be given requires_grad.

    Raises:
        ValueError: names what differs first between the models, or the module that cannot be
            mixed: one with another kind of parameters, a forward of its own, or hooks, which would
            no longer run. All checks come before the first change.
    """
    if conditioning not in ("full", "attention", "head"):
        raise ValueError(
            f'conditioning must be "full", "attention" or "head", got {conditioning!r}'
        )
    requested(backend)
    if isinstance(models, nn.Module) or not all(isinstance(m, nn.Module) for m in models):
        raise ValueError(f"models must be a list of models, got {type(models).__name__}")
    models, names = list(models), distinct_names("names", names)
    if len(models) != len(names):
        raise ValueError(f"models must be {len(names)} as the names, got {len(models)}")
    for name, model in zip(names, models, strict=True):
        if all_steered(model):
            raise ValueError(f"models must be plain, {name} has steered layers already")
        # PEFT's layers read attributes of the linear layers inside them, which would be mixed.
        if any(type(module).__module__.startswith("peft.") for module in model.modules()):
            raise ValueError(
                f"models must be plain, {name} has adapters of PEFT: merge them first "
                "(merge_and_unload)"
            )
    for name, model in zip(names[1:], models[1:], strict=True):
        refuse_other_architecture(models[0], model, f"{names[0]} and {name}")
    targets = conditioned(models[0], conditioning)
    for name, module in targets.items():
        _refuse_bypassed(module, f"{name} of {names[0]}")
    for who, model in zip(names[1:], models[1:], strict=True):
        for name, module in model.named_modules():
            # Of these models nothing is kept but the parameters.
            if fault := why_not_plain(module):
                raise ValueError(f"models must be plain, {name or 'the model'} of {who} {fault}")
            if name in targets:
                _refuse_bypassed(module, f"{name} of {who}")
    mixed = {id(p) for module in targets.values() for p in module.parameters(recurse=False)}
    for name, model in zip(names[1:], models[1:], strict=True):
        refuse_other_values(models[0], model, mixed, f"{names[0]} and {name}", conditioning)
    _mix(models, names, targets, backend)
    if conditioning == "head":
        _untie(models[0])
    models[0].requires_grad_(False)
    return models[0]


def refuse_other_architecture(first: nn.Module, other: nn.Module, who: str) -> None:
    """ValueError for the first module, parameter or buffer that differs in kind or shape."""
    theirs = dict(other.named_modules(remove_duplicate=False))
    for name, module in first.named_modules(remove_duplicate=False):
        shown = name or "the model itself"
        if name not in theirs:
            raise _unlike(f"{who} differ, one has no {shown}")
        a, b = type(module), type(theirs.pop(name))
        if a is not b:
            raise _unlike(f"{shown} of {who} is {a.__name__} and {b.__name__}")
    if theirs:
        raise _unlike(f"{who} differ, one has no {next(iter(theirs))}")
    _refuse_unlike(dict(_tensors(first)), dict(_tensors(other)), who)
    # Two numbers of heads, for instance, may give the same shapes.
    settings, others = _settings(first), _settings(other)
    for name in [*settings, *others]:
        if settings.get(name) != others.get(name):
            raise _unlike(f"{name} of {who} is {settings.get(name)} and {others.get(name)}")


def _refuse_unlike(mine: dict[str, Tensor], theirs: dict[str, Tensor], who: str) -> None:
    """ValueError for the first tensor that is missing, of another kind, or tied otherwise."""
    for name in [*mine, *theirs]:
        if name not in mine or name not in theirs:
            raise _unlike(f"{who} differ, one has no {name}")
        a, b = mine[name], theirs[name]
        for what in ("shape", "dtype", "device"):
            x, y = getattr(a, what), getattr(b, what)
            if x != y:
                x, y = (list(one) if what == "shape" else one for one in (x, y))
                raise _unlike(f"the {what} of {name} of {who} is {x} and {y}")
    owner_a = {id(t): name for name, t in reversed(mine.items())}
    owner_b = {id(t): name for name, t in reversed(theirs.items())}
    for name in mine:
        if owner_a[id(mine[name])] != owner_b[id(theirs[name])]:
            raise _unlike(f"{name} of {who} is tied to another parameter in one of them only")


def _unlike(how: str) -> ValueError:
    return ValueError(f"models must have one architecture: {how}")


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers under all their names."""
    parameters: list[tuple[str, Tensor]] = list(model.named_parameters(remove_duplicate=False))
    return parameters + list(model.named_buffers(remove_duplicate=False))


def _settings(model: nn.Module) -> dict[str, float]:
    """The plain numbers that the modules hold: heads, epsilons, scales."""
    return {
        f"{name}.{key}".lstrip("."): value
        for name, module in model.named_modules()
        if not isinstance(module, nn.Dropout)
        for key, value in vars(module).items()
        if isinstance(value, int | float)
        if not key.startswith("_") and key not in _PASSIVE and "drop" not in key
    }


def conditioned(model: nn.Module, conditioning: str) -> dict[str, nn.Module]:
    """The modules whose parameters are mixed, by name.

    Raises: ValueError if the model has none, or one of another kind than layers.
    """
    modules = dict(model.named_modules())
    if conditioning == "head":
        get_head: Callable[[], Any] = getattr(model, "get_output_embeddings", lambda: None)
        head = get_head()
        targets = {n: m for n, m in modules.items() if m is head}
        if not targets or not is_linear(head):
            raise ValueError(f"models must have a linear output head, got {type(head).__name__}")
        return targets
    if conditioning == "attention":
        inside = tuple(
            f"{n}." for n, m in modules.items() if type(m).__name__.endswith("Attention")
        )
        targets = {n: m for n, m in modules.items() if is_linear(m) and n.startswith(inside)}
        if not targets:
            raise ValueError(
                "models must have linear layers inside modules whose class name ends with "
                f"Attention, {type(model).__name__} has none"
            )
        return targets
    targets = {
        n: m for n, m in modules.items() if next(m.parameters(recurse=False), None) is not None
    }
    for name, module in targets.items():
        if fault := why_not_mixed(name, module):
            raise ValueError(
                "models must hold their parameters in linear layers, embeddings and norms, "
                f"{name or 'the model itself'} {fault}"
            )
    return targets


def why_not_mixed(name: str, module: nn.Module) -> str | None:
    """Why this module of a model is not a layer that can be mixed, or None.

    Those are linear layers, the many norms, which are linear or affine in their parameters, and
    embeddings of a plain lookup, perhaps times a constant (Gemma, Bart).
    """
    kind = type(module).__name__
    kind = f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"
    norm = "Norm" in kind
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return f"is {kind} with max_norm, which changes its table when it runs"
    if norm and (inner := next(module.named_children(), None)):
        return f"is {kind} with a module inside it ({inner[0]})"
    if not (is_linear(module) or norm or isinstance(module, nn.Embedding)):
        return f"is {kind}, not a linear layer, an embedding or a norm"
    return None if name else f"is {kind}, which can be replaced only inside another module"


def why_bypassed(module: nn.Module) -> str | None:
    """Why a mixed layer would leave out what this linear layer, embedding or norm computes."""
    fault = why_not_linear(module) if is_linear(module) else why_not_plain(module)
    if fault is None and isinstance(module, nn.Embedding) and not _looks_up(module):
        return f"is a {type(module).__name__}, which has a forward of its own"
    return fault


def _refuse_bypassed(module: nn.Module, name: str) -> None:
    if fault := why_bypassed(module):
        raise ValueError(f"models must be plain where parameters are mixed, {name} {fault}")


def _looks_up(module: nn.Embedding) -> bool:
    """Whether an embedding looks up its table, times its `embed_scale` if it has one."""
    if has_own_call(module):
        return False
    if type(module).forward is nn.Embedding.forward:
        return True
    scale = getattr(module, "embed_scale", None)
    if scale is None:
        return False
    ids = torch.arange(min(3, module.num_embeddings), device=module.weight.device)
    found: Tensor = F.embedding(ids, module.weight)
    found = found * (scale.to(found.dtype) if isinstance(scale, Tensor) else scale)
    with torch.no_grad():
        return torch.equal(module(ids), found)


def refuse_other_values(
    first: nn.Module, other: nn.Module, mixed: set[int], who: str, conditioning: str
) -> None:
    """ValueError for the first tensor that is not mixed and not equal."""
    theirs = dict(_tensors(other))
    for name, tensor in _tensors(first):
        if id(tensor) not in mixed and not torch.equal(tensor, theirs[name]):
            raise ValueError(
                f'conditioning "{conditioning}" does not mix {name}, which must be equal in all '
                f"models and differs between {who}"
            )


def _mix(
    models: Sequence[nn.Module],
    names: Sequence[str],
    targets: dict[str, nn.Module],
    backend: str,
) -> None:
    """Puts a mixed layer in place of each target of the first model."""
    steering, stacks = Steering(), Stacks()
    words = input_embedding(models[0])
    groups = {name: [model.get_submodule(name) for model in models] for name in targets}
    # One memo per model: what two modules share, their copies share.
    copies: list[dict[int, Any]] = [{} for _ in models]
    for name, module in targets.items():
        group = groups.pop(name)
        layer: SteeredLayer
        if is_linear(module):
            biases = [m.bias for m in group]
            bias = None if module.bias is None else stacks.of(biases, biases)
            weight = stacks.of([m.weight for m in group], [weight_of(m) for m in group])
            layer = MixedLinear(weight, bias, names, steering=steering, backend=backend)
        elif isinstance(module, nn.Embedding):
            weights = [m.weight for m in group]
            layer = MixedEmbedding(
                stacks.of(weights, weights),
                names,
                steering=steering,
                scale=getattr(module, "embed_scale", None),
                padding_idx=module.padding_idx,
                broadcast=module is not words,  # positions
            )
        else:
            experts = [copy.deepcopy(m, memo) for m, memo in zip(group, copies, strict=True)]
            layer = MixedModule(experts, names, steering=steering)
        replace(models[0], module, layer)


def input_embedding(model: nn.Module) -> Any:
    """The embedding of the tokens, or None."""
    get: Callable[[], Any] = getattr(model, "get_input_embeddings", lambda: None)
    return get()


def replace(model: nn.Module, module: nn.Module, layer: SteeredLayer) -> None:
    """Puts the layer in place of the module, under each name that the model holds it under."""
    layer.train(module.training)
    for place in [n for n, m in model.named_modules(remove_duplicate=False) if m is module]:
        parent, _, child = place.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


class Stacks:
    """The m values of a parameter as one Parameter [m, ...]; the same one for tied parameters."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, tuple[int, ...]], nn.Parameter] = {}
        self._kept: list[Any] = []  # so that no id is given twice

    def of(self, parameters: Sequence[Any], values: Sequence[Any]) -> nn.Parameter:
        """`values` stacked: the parameters as they are, or transposed."""
        key = (id(parameters[0]), values[0].stride())
        if key not in self._made:
            stacked = torch.stack([value.detach() for value in values])
            self._made[key] = nn.Parameter(stacked, requires_grad=False)
            self._kept.append(parameters[0])
        return self._made[key]


def _untie(model: nn.Module) -> None:
    """Tells transformers that head and input embedding are not tied any more."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
