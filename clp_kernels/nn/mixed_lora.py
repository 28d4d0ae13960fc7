"""MixedLoRALinear and `inject`: adapters in place of the linear layers of a model.

The layers that mix whole parameters are in clp_kernels.nn.experts.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clp_kernels import checks
from clp_kernels.nn.probe import OneExamplePerWeights, can_probe, layout
from clp_kernels.nn.steering import SteeredLayer, Steering, all_steered, distinct_names
from clp_kernels.ops.functional import apply_mixed_lora, mixed_lora

# What an adapter's file may hold (clp_kernels.peft.read): what is made can be loaded again.
MAX_RANK, MAX_ALPHA = 4096, 1_000_000

# What a call of a module runs besides the forward of its class.
_CALLED = ("forward", "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks",
           "_backward_hooks")  # fmt: skip


class MixedLoRALinear(SteeredLayer):
    """A frozen linear layer plus m LoRA adapters, mixed per example by the rows of `steer`.

        y_t = x_t W^T + bias + sum_i weights[b(t), i] * scaling_i * (x_t A_i^T) B_i^T

    Wraps an `nn.Linear` (or transformers' `Conv1D`, which keeps W transposed), as `base_layer`. Its
    weight and bias are used and its forward is not called, so it must be the class's own and
    without hooks. Adapters of different rank are stored zero-padded to the largest.

    Args:
        base_layer: The layer to wrap; it stays as it is, and is the caller's to freeze.
        adapter_names: m names, in the order of the columns of `weights`.
        ranks: r of each adapter; 0 for an adapter without this module.
        lora_alpha: alpha of each adapter; scaling_i = lora_alpha_i / r_i.
        steering: The object that `steer` writes; shared by the layers of a model.
        dtype: dtype of the adapters: float32 (default) or the base layer's.

    Attributes:
        flattened: Whether x is [B * T, in], each example's tokens after the other's, and the module
            around it refuses another B than the weights'. `inject` finds out.

    Shapes: x [B, ..., in] with weights [B, m], or x [T, in] with example_ids [T].
    Raises: RuntimeError without rows; ValueError where x and the rows do not fit, or for a base
        layer that computes something else than its class.
    """

    has_base = True

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_names: Sequence[str],
        *,
        ranks: Sequence[int],
        lora_alpha: Sequence[float],
        steering: Steering,
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if fault := why_not_linear(base_layer):
            raise ValueError(f"base_layer must be a plain linear layer, got one that {fault}")
        self.base_layer = base_layer
        self.flattened = False
        self.transposed = is_transposed(base_layer)
        self.adapter_names = tuple(adapter_names)
        self.ranks = tuple(ranks)
        self.lora_alpha = tuple(lora_alpha)
        self.steering = steering
        self.backend = backend
        m, r, device = len(self.adapter_names), max(self.ranks), self.weight.device
        shape_A, shape_B = (m, r, self.in_features), (m, self.out_features, r)
        self.lora_A = nn.Parameter(torch.zeros(shape_A, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(shape_B, dtype=dtype, device=device))
        self.scaling: Tensor
        self.register_buffer("scaling", self._scaling(device), persistent=False)

    def _scaling(self, device: torch.device) -> Tensor:
        """lora_alpha / r of each adapter, in the dtype of the weights that it multiplies."""
        acc = torch.float64 if self.lora_A.dtype == torch.float64 else torch.float32
        values = [a / r if r else 0.0 for a, r in zip(self.lora_alpha, self.ranks, strict=True)]
        return torch.tensor(values, dtype=acc, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MixedLoRALinear":
        super()._apply(fn, recurse)
        # model.bfloat16() would round the scaling too: 16/3 by 0.2 %.
        self.scaling = self._scaling(self.lora_A.device)
        return self

    def mixed_parameter(self) -> Tensor:
        """lora_A."""
        return self.lora_A

    def fault(self) -> str | None:
        """That the base layer has a hook or a forward of its own, which `forward` does not call."""
        held = self._modules["base_layer"].__dict__
        # Spelled out, because `steer` asks every layer: a loop takes five times as long.
        if not (
            held["_forward_hooks"]
            or held["_forward_pre_hooks"]
            or held["_backward_hooks"]
            or held["_backward_pre_hooks"]
            or "forward" in held
        ):
            return None
        what = next(_shown(name) for name in _CALLED if held.get(name))
        return (
            f"its base_layer has got {what} since it was wrapped, which would not run; put that on "
            "this MixedLoRALinear instead"
        )

    @property
    def weight(self) -> Tensor:
        """The base layer's weight as it stores it (models look at its dtype and device)."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        bias: Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        return bias

    @property
    def base_weight(self) -> Tensor:
        """W as [out_features, in_features]."""
        return self.weight.t() if self.transposed else self.weight

    @property
    def in_features(self) -> int:
        """Size of x's last axis."""
        return self.base_weight.shape[1]

    @property
    def out_features(self) -> int:
        """Size of y's last axis."""
        return self.base_weight.shape[0]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """PEFT's start: A Kaiming-uniform, B zero, so that every row gives the base layer."""
        for i, r_i in enumerate(self.ranks):
            if r_i:
                start = self.lora_A.data[i, :r_i]
                nn.init.kaiming_uniform_(start, math.sqrt(5), generator=generator)
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ..., in] or [T, in] -> [..., out], with the rows that `steer` has set."""
        if self.flattened and x.dim() == 2:
            rows = self.steering.rows
            if rows is not None and rows.weights is not None and rows.example_ids is None:
                count = rows.weights.shape[0]
                if x.shape[0] != count and count and x.shape[0] % count == 0:
                    return self.forward(x.unflatten(0, (count, -1))).flatten(0, 1)
        weights, example_ids, _ = self.active_rows(x, 1)
        if weights is None:
            return self.base_layer(x)  # type: ignore[no-any-return]
        # Not self.lora_A: a module's attributes take 0.6 us each, half of a call with one row.
        base, scaling = self._modules["base_layer"], _held(self, "scaling")
        base_weight, bias = _held(base, "weight"), _held(base, "bias")
        lora_A, lora_B = _held(self, "lora_A"), _held(self, "lora_B")
        if self.transposed:
            base_weight = base_weight.t()
        if torch.is_autocast_enabled(x.device.type):
            # As F.linear does under autocast; the adapters keep their dtype and accumulate in fp32.
            dtype = torch.get_autocast_dtype(x.device.type)
            x, base_weight = x.to(dtype), base_weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        ids, backend = example_ids, self.backend
        if not torch.is_grad_enabled():
            # A few rows then take one call (clp_kernels.ops.mixed_lora.cpu.fast_path).
            return mixed_lora(
                x,
                base_weight,
                lora_A,
                lora_B,
                weights,
                scaling=scaling,
                bias=bias,
                example_ids=ids,
                backend=backend,
            )
        scaled = weights * scaling
        return apply_mixed_lora(x, base_weight, lora_A, lora_B, scaled, bias, ids, backend)

    def extra_repr(self) -> str:
        """Names and ranks, for print(model)."""
        return ", ".join(f"{n}: r={r}" for n, r in zip(self.adapter_names, self.ranks, strict=True))


def _held(module: Any, name: str) -> Any:
    """module.name, at once where it is a plain parameter or buffer (not a parametrized one)."""
    for own in (module._parameters, module._buffers):
        if name in own:
            return own[name]
    return getattr(module, name)


def is_transposed(layer: nn.Module) -> bool:
    """Whether this is transformers' Conv1D (GPT-2), which keeps its weight as [in, out]."""
    return _conv1d(layer) is not None


def is_linear(layer: nn.Module) -> bool:
    """Whether this is an nn.Linear or transformers' Conv1D, or a class made from one."""
    return isinstance(layer, nn.Linear) or is_transposed(layer)


def _conv1d(layer: nn.Module) -> type[nn.Module] | None:
    """transformers' class Conv1D if the layer is one; told by name, as nothing is imported here."""
    for kind in type(layer).__mro__:
        if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
            return kind
    return None


def why_not_plain(layer: nn.Module, *forwards: Any) -> str | None:
    """Why a layer's output is not what one of these forwards makes of its parameters, or None.

    A class made from the layer's, a forward put on the object, hooks and tensors with operations of
    their own (quantised ones) may all compute something else.
    """
    own = type(layer).forward not in forwards or type(layer).__call__ is not nn.Module.__call__
    if forwards and own:
        return f"is a {type(layer).__name__}, which has a forward of its own"
    for name in _CALLED:
        if vars(layer).get(name):
            return f"is a {type(layer).__name__} with {_shown(name)}"
    for name, value in [
        *layer.named_parameters(recurse=False),
        *layer.named_buffers(recurse=False),
    ]:
        if type(value) not in (nn.Parameter, Tensor):
            return f"is a {type(layer).__name__} whose {name} is a {type(value).__name__}"
    return None


def _shown(name: str) -> str:
    return "a replaced forward" if name == "forward" else name.strip("_").replace("_", " ")


def why_not_linear(layer: nn.Module) -> str | None:
    """Why this layer is not x W^T + bias of its own weight and bias, or None.

    A parametrized layer (torch.nn.utils.parametrize) is: its weight is computed when it is read.
    """
    if not is_linear(layer):
        return f"is a {type(layer).__name__}"
    return why_not_plain(layer, (_conv1d(layer) or nn.Linear).forward)


def _why_not_called(parent: nn.Module) -> str | None:
    """Why a linear layer directly inside this module is not called, or None."""
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        return f"is read by {type(parent).__name__} without a call"
    return None


def steered_layers(model: nn.Module) -> dict[str, MixedLoRALinear]:
    """The MixedLoRALinear layers of a model by module name, in module order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, MixedLoRALinear)}


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
) -> list[str]:
    """Replaces the target layers of a model by MixedLoRALinear, in place, and freezes the rest.

    A language model of transformers runs here on six tokens, in eval mode, to see what its layers
    get: some flatten the tokens of a batch (OPT's fc1 and fc2, the shared experts of a mixture).

    Args:
        model: Any module; transformers models get PEFT's meaning of "all-linear".
        adapters: Names of the m adapters (the objectives), in the order of `weights`' columns.
        r, lora_alpha: LoRA rank (at most 4096) and alpha (at most 1e6), the same for all, in PEFT's
            meaning.
        target_modules: "all-linear", or names matched as PEFT matches a list.
        exclude_modules: Names of targets to leave out, matched in the same way.
        dtype: Of the adapters' parameters: float32, or the base layers'.
        generator: Source of the start values; the global one if None.

    Returns:
        The names of the replaced modules. At the start B = 0: every row gives the base model.

    Raises:
        ValueError: bad r, lora_alpha or names, a name that matches nothing, a model injected
            before, or a target that cannot be steered, with what to leave out: a layer that has
            hooks or a forward of its own (routers, quantised layers), whose weight is read by the
            module around it, or that gets tokens gathered from the batch (experts).
    """
    if type(r) is not int or not 1 <= r <= MAX_RANK:
        raise ValueError(f"r must be an integer in [1, {MAX_RANK}], got {r!r}")
    if not 0 < lora_alpha <= MAX_ALPHA:
        raise ValueError(f"lora_alpha must be a number in (0, {MAX_ALPHA}], got {lora_alpha}")
    if isinstance(exclude_modules, str):
        raise ValueError(f"exclude_modules must be a list of names, got {exclude_modules!r}")
    targets = target_linears(model, target_modules, exclude_modules)
    ranks = {name: [r] * len(adapters) for name in targets}
    alphas = {name: [float(lora_alpha)] * len(adapters) for name in targets}
    for layer in replace_linears(model, adapters, ranks, alphas, dtype).values():
        layer.reset_parameters(generator)
    return list(targets)


def replace_linears(
    model: nn.Module,
    adapters: Sequence[str],
    ranks: dict[str, list[int]],
    lora_alpha: dict[str, list[float]],
    dtype: torch.dtype,
) -> dict[str, MixedLoRALinear]:
    """Wraps the named layers (adapters all zero), freezes everything else, returns the new layers.

    `ranks` and `lora_alpha` hold one entry an adapter for each module name. All checks come before
    the first replacement, so a refused model is unchanged.
    """
    names = distinct_names("adapters", adapters)
    if all_steered(model):
        raise ValueError("model has adapters already; inject or load_adapters works once a model")
    if not ranks:
        raise ValueError("target_modules matches no linear layer of the model, or all are excluded")
    if dtype not in checks.FLOATS:
        raise ValueError(f"dtype must be a floating dtype, got {dtype}")
    _refuse_bypassed(model, list(ranks))
    for name in ranks:
        weight: Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
        if weight.dtype not in checks.FLOATS or weight.dim() != 2:
            raise ValueError(f"{name} has a {weight.dtype} weight of shape {list(weight.shape)}; "
                             "quantised layers are not supported")  # fmt: skip
        if dtype not in (torch.float32, weight.dtype):
            raise ValueError(f"dtype must be float32 or {name}'s {weight.dtype}, got {dtype}")
    flattened = _flattened(model, list(ranks))
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
            dtype=torch.float64 if _dtype_of(model, name) == torch.float64 else dtype,
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
        fault = why_not_linear(model.get_submodule(name)) or _why_not_called(parent)
        if fault:
            faults[name] = fault
    if faults:
        name = next(iter(faults))
        raise ValueError(
            f"{name} {faults[name]}: adapters would leave out what it computes; "
            f"{_leave_out(list(faults), names)}"
        )


def _flattened(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """The targets that see flattened tokens, with the modules around them (nn.probe)."""
    if not can_probe(model):
        return {}
    found = layout(model, names)
    if odd := found.unsteerable:
        raise ValueError(
            f"{odd[0]} does not get one entry per example of the batch (an expert, for instance, "
            "gets the tokens that are routed to it), so that no weights belong to its inputs; "
            f"{_leave_out(odd, names)}"
        )
    return found.flattened


def _leave_out(odd: list[str], names: list[str]) -> str:
    """What to write to leave these targets out: their last names where no other target has one."""
    last = dict.fromkeys(name.rpartition(".")[2] for name in odd)
    kept = {name.rpartition(".")[2] for name in names if name not in set(odd)}
    shown = list(last) if kept.isdisjoint(last) else odd
    more = f" and {len(shown) - 20} more" if len(shown) > 20 else ""
    return f"leave out of target_modules: exclude_modules={shown[:20]}{more}"


def _dtype_of(model: nn.Module, name: str) -> torch.dtype:
    weight: Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
    return weight.dtype
