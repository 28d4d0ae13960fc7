"""MixedLoRALinear, a linear layer with adapters, and which layers it can wrap."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from clp_kernels.checks import accumulator
from clp_kernels.invariant import is_batch_invariant
from clp_kernels.nn.steering import CALLED, SteeredLayer, Steering, shown_call
from clp_kernels.ops.mixed_lora.op import apply_mixed_lora, mixed_lora
from clp_kernels.ops.mixed_lora.reference import Inputs

# What nn.Module runs between a call and the forward.
_CALL = ("__call__", "_call_impl", "_compiled_call_impl", "_slow_forward")
# What an adapter's file may hold (clp_kernels.peft.read): what is made can be loaded again.
MAX_RANK, MAX_ALPHA = 4096, 1_000_000


class MixedLoRALinear(SteeredLayer):
    """A frozen linear layer plus m LoRA adapters, mixed per example by the weights of `steer`.

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

    Shapes: x [B, ..., in] with weights [B, m], or x [T, in] with example_ids [T].
    Raises: RuntimeError without weights; ValueError if x and the weights do not fit, or for a base
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
        values = [a / r if r else 0.0 for a, r in zip(self.lora_alpha, self.ranks, strict=True)]
        return torch.tensor(values, dtype=accumulator(self.lora_A.dtype), device=device)

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
        """PEFT's start: A Kaiming-uniform, B zero, so that any weights give the base layer.

        A is drawn in float32, so that a seed gives the same adapters in every dtype.
        """
        for i, r_i in enumerate(self.ranks):
            if r_i:
                start = torch.empty(
                    r_i, self.in_features, dtype=torch.float32, device=self.lora_A.device
                )
                nn.init.kaiming_uniform_(start, math.sqrt(5), generator=generator)
                self.lora_A.data[i, :r_i] = start
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ..., in] or [T, in] -> [..., out], with the weights that `steer` has set."""
        if self.flattened and (parts := self.by_example(x)) is not None:
            return self.forward(parts).flatten(0, 1)
        weights, example_ids, _ = self.active_weights(x, 1)
        if weights is None:
            return self.base_layer(x)  # type: ignore[no-any-return]
        # Not self.lora_A: a module's attributes take 0.6 us each, half of a call for one token.
        base, scaling = self._modules["base_layer"], _stored(self, "scaling")
        base_weight, bias = _stored(base, "weight"), _stored(base, "bias")
        lora_A, lora_B = _stored(self, "lora_A"), _stored(self, "lora_B")
        if self.transposed:
            base_weight = base_weight.t()
        if torch.is_autocast_enabled(x.device.type):
            # As F.linear does under autocast; the adapters keep their dtype and accumulate in fp32.
            dtype = torch.get_autocast_dtype(x.device.type)
            x, base_weight = x.to(dtype), base_weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        ids, backend = example_ids, self.backend
        if not torch.is_grad_enabled():
            # A few tokens then take the fast path (clp_kernels.ops.mixed_lora.cpu).
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
        tensors = x, base_weight, lora_A, lora_B, weights * scaling, bias, ids
        return apply_mixed_lora(Inputs(*tensors, is_batch_invariant()), backend)

    def extra_repr(self) -> str:
        """Names and ranks, for print(model)."""
        return ", ".join(f"{n}: r={r}" for n, r in zip(self.adapter_names, self.ranks, strict=True))


def _stored(module: Any, name: str) -> Any:
    """module.name, without a lookup of the class if it is a plain parameter or buffer."""
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
    """transformers' class Conv1D if the layer is one, found by name: nothing is imported here."""
    for kind in type(layer).__mro__:
        if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
            return kind
    return None


def has_own_call(layer: nn.Module) -> bool:
    """Whether the layer's class replaces a step between a call of the layer and its forward."""
    return any(getattr(type(layer), name) is not getattr(nn.Module, name) for name in _CALL)


def why_not_plain(layer: nn.Module, *forwards: Any) -> str | None:
    """Why a layer's output is not what one of these forwards makes of its parameters, or None.

    A class made from the layer's, a forward put on the object, hooks and tensors with operations of
    their own (quantised ones) may all compute something else.
    """
    if forwards and (type(layer).forward not in forwards or has_own_call(layer)):
        return f"is a {type(layer).__name__}, which has a forward of its own"
    for name in CALLED:
        if vars(layer).get(name):
            return f"is a {type(layer).__name__} with {shown_call(name)}"
    for name in ("weight", "bias") if not is_parametrized(layer) else ():
        if isinstance(getattr(type(layer), name, None), property):
            return f"is a {type(layer).__name__} whose {name} is a property"
        # As by a __getattr__ of its class, or a tensor put before the parameter.
        own = layer._parameters.get(name)
        if own is not None and getattr(layer, name) is not own:
            return f"is a {type(layer).__name__} whose {name} is not its parameter {name}"
    for name, value in [
        *layer.named_parameters(recurse=False),
        *layer.named_buffers(recurse=False),
    ]:
        if type(value) not in (nn.Parameter, Tensor):
            return f"is a {type(layer).__name__} whose {name} is a {type(value).__name__}"
    return None


def why_not_linear(layer: nn.Module) -> str | None:
    """Why this layer is not x W^T + bias of its own weight and bias, or None.

    A parametrized layer (torch.nn.utils.parametrize) is: its weight is computed when it is read.
    """
    if not is_linear(layer):
        return f"is a {type(layer).__name__}"
    return why_not_plain(layer, (_conv1d(layer) or nn.Linear).forward)


def steered_layers(model: nn.Module) -> dict[str, MixedLoRALinear]:
    """The MixedLoRALinear layers of a model by module name, in module order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, MixedLoRALinear)}
