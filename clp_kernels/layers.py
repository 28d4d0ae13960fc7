"""MixedLoRALinear and `inject`: adapters in place of the linear layers of a model.

The layers that mix whole parameters are in clp_kernels.experts.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clp_kernels import checks
from clp_kernels.functional import apply_mixed_lora, mixed_lora
from clp_kernels.steering import SteeredLayer, Steering, all_steered, distinct_names


class MixedLoRALinear(SteeredLayer):
    """A frozen linear layer plus m LoRA adapters, mixed per example by the rows of `steer`.

        y_t = x_t W^T + bias + sum_i weights[b(t), i] * scaling_i * (x_t A_i^T) B_i^T

    Wraps any `nn.Linear` (or transformers' `Conv1D`, which keeps W transposed), as `base_layer`.
    Adapters of different rank are stored zero-padded to the largest.

    Args:
        base_layer: The layer to wrap; it stays as it is, and is the caller's to freeze.
        adapter_names: m names, in the order of the columns of `weights`.
        ranks: r of each adapter; 0 for an adapter without this module.
        lora_alpha: alpha of each adapter; scaling_i = lora_alpha_i / r_i.
        steering: The object that `steer` writes; shared by the layers of a model.
        dtype: dtype of the adapters: float32 (default) or the base layer's.

    Shapes: x [B, ..., in] with weights [B, m], or x [T, in] with example_ids [T].
    Raises: RuntimeError without rows; ValueError where x and the rows do not fit.
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
        self.base_layer = base_layer
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
            # A few rows then take one call (clp_kernels.cpu_mixed_lora.at_once).
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
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def steered_layers(model: nn.Module) -> dict[str, MixedLoRALinear]:
    """The MixedLoRALinear layers of a model by module name, in module order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, MixedLoRALinear)}


def target_linears(model: nn.Module, target_modules: str | Sequence[str]) -> dict[str, nn.Module]:
    """The linear layers that `target_modules` names, by module name.

    "all-linear": every linear layer but the output embedding, as in PEFT. A list: each name equals
    a module's name or its ending after a dot.

    Raises: ValueError for a name that matches no linear layer.
    """
    linears = {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or is_transposed(m)
    }
    if "" in linears:
        raise ValueError("model must be a module that holds linear layers, it is one itself")
    if isinstance(target_modules, str):
        if target_modules.lower() != "all-linear":
            raise ValueError(
                f'target_modules must be "all-linear" or a list of names, got {target_modules!r}'
            )
        get_head: Callable[[], Any] = getattr(model, "get_output_embeddings", lambda: None)
        head = get_head()
        return {n: m for n, m in linears.items() if m is not head}
    found: dict[str, nn.Module] = {}
    for target in target_modules:
        hits = {n: m for n, m in linears.items() if n == target or n.endswith(f".{target}")}
        if not hits:
            raise ValueError(f"target_modules: {target!r} names no linear layer of the model")
        found |= hits
    return {n: m for n, m in linears.items() if n in found}


def inject(
    model: nn.Module,
    adapters: Sequence[str],
    *,
    r: int = 8,
    lora_alpha: float = 16,
    target_modules: str | Sequence[str] = "all-linear",
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Replaces the target layers of a model by MixedLoRALinear, in place, and freezes the rest.

    Args:
        model: Any module; transformers models get PEFT's meaning of "all-linear".
        adapters: Names of the m adapters (the objectives), in the order of `weights`' columns.
        r, lora_alpha: LoRA rank and alpha (PEFT's meaning), the same for all.
        target_modules: "all-linear", or names matched as PEFT matches a list.
        dtype: Of the adapters' parameters: float32, or the base layers'.
        generator: Source of the start values; the global one if None.

    Returns:
        The names of the replaced modules. At the start B = 0: every row gives the base model.

    Raises:
        ValueError: bad r, lora_alpha or names, a target that matches nothing, a model injected
            before, or a quantised layer.
    """
    if type(r) is not int or r < 1:
        raise ValueError(f"r must be a positive integer, got {r!r}")
    if not (math.isfinite(lora_alpha) and lora_alpha > 0):
        raise ValueError(f"lora_alpha must be finite and positive, got {lora_alpha}")
    targets = target_linears(model, target_modules)
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
        raise ValueError("target_modules matches no linear layer of the model")
    if dtype not in checks.FLOATS:
        raise ValueError(f"dtype must be a floating dtype, got {dtype}")
    for name in ranks:
        weight: Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
        if weight.dtype not in checks.FLOATS or weight.dim() != 2:
            raise ValueError(f"{name} has a {weight.dtype} weight of shape {list(weight.shape)}; "
                             "quantised layers are not supported")  # fmt: skip
        if dtype not in (torch.float32, weight.dtype):
            raise ValueError(f"dtype must be float32 or {name}'s {weight.dtype}, got {dtype}")
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
    return layers


def _dtype_of(model: nn.Module, name: str) -> torch.dtype:
    weight: Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
    return weight.dtype
