"""Layers whose parameters are mixed per example from m experts (CLP's full parameters).

Each computes a sum of m outputs weighted as `steer` says, not the output of a mixed matrix: that is
the same if the layer is linear in its parameters, and needs no copy per example.
`clp_kernels.mix_models` puts them into a model, and `clp_kernels.inject_experts` puts them beside
the layers of a model: the experts are then differences from its parameters.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from clp_kernels.checks import accumulator
from clp_kernels.nn.mixed_lora import is_transposed, why_not_linear
from clp_kernels.nn.steering import SteeredLayer, Steering, distinct_names
from clp_kernels.ops.mixed_linear.op import mixed_linear

_HALVES = (torch.bfloat16, torch.float16)


class Experts(SteeredLayer):
    """What the layers of m experts share.

    Without a base_layer, the experts are whole parameters theta_i. With one, which stays as it is,
    they are differences delta_i from its parameters theta:

        parameters(b) = sum_i weights[b, i] theta_i     or     theta + sum_i weights[b, i] delta_i
    """

    def __init__(
        self,
        adapter_names: Sequence[str],
        steering: Steering | None,
        base_layer: nn.Module | None,
    ) -> None:
        super().__init__()
        self.adapter_names = tuple(distinct_names("adapter_names", adapter_names))
        self.steering = steering or Steering()
        self.has_base = base_layer is not None
        # Models look at a layer's weight, and transformers takes the dtype of the first parameter
        # for a model's: it is the base's and not that of the differences.
        weight = getattr(base_layer, "weight", None)
        if isinstance(weight, nn.Parameter):
            self.weight = weight
        self.base_layer = base_layer

    def own_parameters(self) -> list[nn.Parameter]:
        """The experts' parameters, without the base layer's."""
        base = set() if self.base_layer is None else set(self.base_layer.parameters())
        return [p for p in self.parameters() if p not in base]

    @abstractmethod
    def parameters_of(self, i: int) -> dict[str, Tensor]:
        """Expert i's parameters, under the names and in the layout of the layer that they are of.

        They share memory with the layer's.
        """

    @abstractmethod
    def mixed(
        self, x: Tensor, weights: Tensor, example_ids: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """sum_i weights[b, i] times the term of expert i."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [B, ...] or [T, ...], with the weights that `steer` has set."""
        if (parts := self.by_example(x)) is not None:
            return self.forward(parts, *args, **kwargs).flatten(0, 1)
        weights, example_ids, _ = self.active_weights(x, *self._axes(x))
        base: Tensor | None = None
        if self.base_layer is not None:
            base = self.base_layer(x, *args, **kwargs)
            if weights is None:
                return base
        assert weights is not None  # steer refuses None for a layer without a base
        y = self.mixed(x, weights, example_ids, *args, **kwargs)
        return y if base is None else base + y

    @abstractmethod
    def _axes(self, x: Tensor) -> tuple[int, bool]:
        """x's last axes that belong to one token, and whether one example serves all weights."""

    def mixed_parameter(self) -> Tensor:
        """The first of the experts' parameters."""
        return self.own_parameters()[0]

    def _stacked(self, value: Tensor, axes: str) -> nn.Parameter:
        """The parameter expert_weight. Raises ValueError unless it is m matrices."""
        m, shape = len(self.adapter_names), list(value.shape)
        if len(shape) != 3 or shape[0] != m:
            raise ValueError(f"expert_weight must have shape [{m}, {axes}], got {shape}")
        return _parameter(value)


class MixedLinear(Experts):
    """A linear layer whose matrix (and bias) is mixed per example from m experts.

        y_t = sum_i weights[b(t), i] * (x_t W_i^T + bias_i)

    Args:
        expert_weight: [m, out, in], kept as it is where it is a Parameter (shared, for a tie).
        expert_bias: [m, out] of the same dtype, or None.
        adapter_names: m names, in the order of the columns of `weights`.
        steering: The object that `steer` writes; the layer's own if None.
        base_layer: If given, the experts are differences from it: y_t = base_layer(x_t) + the sum.
            They may then have a wider dtype than x, in which they are trained.
        backend: See `clp_kernels.mixed_linear`.

    Shapes: x [B, ..., in] with weights [B, m], or x [T, in] with example_ids [T]. Under autocast
    it computes in autocast's dtype, as `F.linear` does; accumulated in float32 (float64).
    Raises: RuntimeError without weights; ValueError if x and the weights do not fit.
    """

    def __init__(
        self,
        expert_weight: Tensor,
        expert_bias: Tensor | None,
        adapter_names: Sequence[str],
        *,
        steering: Steering | None = None,
        base_layer: nn.Module | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(adapter_names, steering, base_layer)
        self.expert_weight = self._stacked(expert_weight, "out, in")
        if expert_bias is not None and expert_bias.shape != expert_weight.shape[:2]:
            raise ValueError(
                f"expert_bias must have shape {list(expert_weight.shape[:2])}, "
                f"got {list(expert_bias.shape)}"
            )
        self.backend = backend
        self.expert_bias = None if expert_bias is None else _parameter(expert_bias)

    @classmethod
    def from_layers(
        cls,
        layers: Sequence[nn.Module],
        adapter_names: Sequence[str],
        *,
        steering: Steering | None = None,
        backend: str = "auto",
    ) -> "MixedLinear":
        """Copies m layers of one shape: nn.Linear, or transformers' Conv1D (GPT-2's).

        Raises: ValueError for another kind of layer, one with hooks or a forward of its own, or
            where the shapes differ.
        """
        layers, names = list(layers), distinct_names("adapter_names", adapter_names)
        if len(layers) != len(names):
            raise ValueError(f"layers must be {len(names)} as the names, got {len(layers)}")
        for layer in layers:
            if fault := why_not_linear(layer):
                raise ValueError(f"layers must be plain linear layers, got one that {fault}")
        shapes = [list(weight_of(layer).shape) for layer in layers]
        biased = [layer.bias is not None for layer in layers]
        if shapes != shapes[:1] * len(layers) or len(set(biased)) > 1:
            raise ValueError(
                f"layers must have one shape [out, in] and all a bias or none, got {shapes}, "
                f"bias: {biased}"
            )
        weight = torch.stack([weight_of(layer).detach() for layer in layers])
        biases: list[Any] = [layer.bias for layer in layers]
        bias = torch.stack([b.detach() for b in biases]) if biased[0] else None
        return cls(weight, bias, names, steering=steering, backend=backend)

    @property
    def in_features(self) -> int:
        """Size of x's last axis."""
        return self.expert_weight.shape[2]

    @property
    def out_features(self) -> int:
        """Size of y's last axis."""
        return self.expert_weight.shape[1]

    def parameters_of(self, i: int) -> dict[str, Tensor]:
        """weight and bias of expert i; GPT-2's layers keep their weight transposed."""
        transposed = self.base_layer is not None and is_transposed(self.base_layer)
        weight = self.expert_weight[i].t() if transposed else self.expert_weight[i]
        bias = self.expert_bias
        return {"weight": weight} | ({} if bias is None else {"bias": bias[i]})

    def mixed(
        self, x: Tensor, weights: Tensor, example_ids: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """x [B, ..., in] or [T, in] -> [..., out]."""
        expert_weight: Tensor = self.expert_weight
        bias: Tensor | None = self.expert_bias
        autocast, dtype = torch.is_autocast_enabled(x.device.type), x.dtype
        if autocast:
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
        if autocast or self.base_layer is not None:
            expert_weight = expert_weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        return mixed_linear(
            x, expert_weight, weights, bias=bias, example_ids=example_ids, backend=self.backend
        )

    def _axes(self, x: Tensor) -> tuple[int, bool]:
        return 1, False

    def extra_repr(self) -> str:
        """Names and sizes, for print(model)."""
        return f"{', '.join(self.adapter_names)}: {self.in_features} -> {self.out_features}"


class MixedEmbedding(Experts):
    """An embedding whose table is mixed per example from m experts.

        y_t = scale * sum_i weights[b(t), i] * E_i[ids_t]

    Args:
        expert_weight: [m, V, d]. Give the head's Parameter where the model ties the two.
        adapter_names, steering: As in MixedLinear.
        scale: A constant factor (Gemma's sqrt(d)).
        padding_idx: The id whose entry gets no gradient, as in nn.Embedding.
        broadcast: Lets ids of one example serve all weights: positions are [1, S] for any batch.
        base_layer: If given, the experts are differences from it: y = base_layer(ids) + the sum.

    Shapes: ids [B, ...] with weights [B, m], or [T] with example_ids [T]; y [..., d] in the
    table's dtype, accumulated in float32 (float64) in the order i = 0, 1, ...
    Raises: RuntimeError without weights; ValueError if the ids and the weights do not fit.
    """

    def __init__(
        self,
        expert_weight: Tensor,
        adapter_names: Sequence[str],
        *,
        steering: Steering | None = None,
        scale: float | Tensor | None = None,
        padding_idx: int | None = None,
        broadcast: bool = False,
        base_layer: nn.Module | None = None,
    ) -> None:
        super().__init__(adapter_names, steering, base_layer)
        self.expert_weight = self._stacked(expert_weight, "V, d")
        self.padding_idx, self.broadcast = padding_idx, broadcast
        # A number is not rounded to the table's dtype, as in the embedding that it comes from.
        self.scale: float | Tensor | None
        if isinstance(scale, Tensor):
            self.register_buffer("scale", scale.to(expert_weight.device), persistent=False)
        else:
            self.scale = scale

    def parameters_of(self, i: int) -> dict[str, Tensor]:
        """The table of expert i."""
        return {"weight": self.expert_weight[i]}

    def mixed(
        self, x: Tensor, weights: Tensor, example_ids: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """ids [B, ...] or [T] -> [..., d]."""
        # unbind, whose backward stacks m gradients; m indexings would each make one of all.
        tables = self.expert_weight.unbind(0)
        terms = (F.embedding(x, table, self.padding_idx) for table in tables)
        y = _mix(terms, weights, example_ids)
        base: Any = self.base_layer
        dtype = self.expert_weight.dtype if base is None else base.weight.dtype
        if self.scale is not None:
            # Of a sum that is rounded before, experts one unit in the last place apart are lost.
            y = y * (self.scale.to(dtype) if isinstance(self.scale, Tensor) else self.scale)
        return y.to(dtype)

    def _axes(self, x: Tensor) -> tuple[int, bool]:
        return 0, self.broadcast

    def extra_repr(self) -> str:
        """Names and sizes, for print(model)."""
        _, entries, width = self.expert_weight.shape
        return f"{', '.join(self.adapter_names)}: {entries} x {width}"


class MixedModule(Experts):
    """Any other module with parameters, run once per expert: the norms of a model.

        y = sum_i weights[b, i] * f(x; theta_i)

    This is f at the mixed parameters sum_i weights[b, i] theta_i exactly where f is linear in them
    (LayerNorm, RMSNorm), and where f is affine in them (Gemma's norm multiplies by 1 + weight)
    exactly for weights that sum to 1. If f is neither it is a mixture of outputs and no more.

    Where x and the parameters have one 16-bit dtype, f runs in float32 and the sum is rounded once:
    of outputs that are rounded before, a mixture lies on one of the experts if these are one unit
    in the last place apart.

    Args:
        experts: m modules of one class, kept as they are.
        adapter_names, steering: As in MixedLinear.
        base_layer: If given, a module f(x; theta) of the same class; the experts' parameters are
            differences from its own: y = f(x; theta) + sum_i weights[b, i] * (f(x; theta + delta_i)
            - f(x; theta)). This is exact for any weights also where f is affine.

    Shapes: x [B, ...] with weights [B, m], or [T, ...] with example_ids [T]; f returns one tensor
    with the same first axis. Its dtype is kept (in 16 bits, x's is given back); the sum accumulates
    in float32 (float64).
    Raises: RuntimeError without weights; ValueError if x and the weights do not fit.
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        adapter_names: Sequence[str],
        *,
        steering: Steering | None = None,
        base_layer: nn.Module | None = None,
    ) -> None:
        super().__init__(adapter_names, steering, base_layer)
        if len(experts) != len(self.adapter_names):
            raise ValueError(
                f"experts must be {len(self.adapter_names)} modules, got {len(experts)}"
            )
        if next(experts[0].parameters(), None) is None:
            raise ValueError(f"experts must have parameters, {type(experts[0]).__name__} has none")
        self.experts = nn.ModuleList(experts)

    def parameters_of(self, i: int) -> dict[str, Tensor]:
        """The parameters of expert i."""
        return dict(self.experts[i].named_parameters())

    def mixed(
        self, x: Tensor, weights: Tensor, example_ids: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """x [B, ...] or [T, ...], and whatever f takes."""
        dtype, base = x.dtype, self.base_layer
        own = self.experts if base is None else base
        half = dtype in _HALVES and all(p.dtype == dtype for p in own.parameters())
        if base is None and not half:
            found = [f(x, *args, **kwargs) for f in self.experts]
            return _mix(found, weights, example_ids).to(found[0].dtype)
        if half:
            x, args, kwargs = tree_map(_float32, (x, args, kwargs))
        if base is None:
            terms = (functional_call(f, _wide_state(f), (x, *args), kwargs) for f in self.experts)
            return _mix(terms, weights, example_ids).to(dtype)
        theta: dict[str, Tensor] = dict(base.named_parameters())
        if half:
            theta = _wide_state(base)
        plain = functional_call(base, theta, (x, *args), kwargs)

        def moved(f: nn.Module) -> Tensor:
            state = theta | {n: theta[n] + delta for n, delta in f.named_parameters()}
            return functional_call(base, state, (x, *args), kwargs) - plain  # type: ignore[no-any-return]

        return _mix(map(moved, self.experts), weights, example_ids).to(dtype)

    def _axes(self, x: Tensor) -> tuple[int, bool]:
        return x.dim() - 1, False


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as [out, in]."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.t() if is_transposed(layer) else weight


def _float32(value: Any) -> Any:
    """A 16-bit tensor in float32, anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALVES else value


def _wide_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those of 16 bits in float32."""
    state = chain(module.named_parameters(), module.named_buffers())
    return {name: _float32(tensor) for name, tensor in state}


def _parameter(value: Tensor) -> nn.Parameter:
    """The value itself where it is a Parameter, else a frozen one that holds it."""
    if isinstance(value, nn.Parameter):
        return value
    return nn.Parameter(value, requires_grad=False)


def _mix(terms: Iterable[Tensor], weights: Tensor, example_ids: Tensor | None) -> Tensor:
    """sum_i weights[b(t), i] * term_i over [B, ...], added in order, in float32 (float64)."""
    columns = (weights if example_ids is None else weights[example_ids]).unbind(1)
    total: Tensor | None = None
    for column, term in zip(columns, terms, strict=True):
        acc = accumulator(term.dtype)
        part = column.to(acc).view(-1, *[1] * (term.dim() - 1)) * term.to(acc)
        total = part if total is None else total + part
    assert total is not None  # every layer has m > 0
    return total
