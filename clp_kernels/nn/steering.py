"""`steer`, and what all steered layers of a model have in common: names and weights.

The layers are in nn.mixed_lora (adapters) and nn.experts (whole parameters).
"""

import re
import reprlib
import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clp_kernels import checks

_ENTERING = threading.Lock()
_NAME = re.compile(r"[A-Za-z0-9_-]+")

# What a call of a module runs besides the forward of its class.
CALLED = ("forward", "_call_impl", "_slow_forward", "_forward_pre_hooks", "_forward_hooks",
          "_backward_pre_hooks", "_backward_hooks")  # fmt: skip


class BusyError(RuntimeError):
    """Another thread has weights set for the model."""


class Active(NamedTuple):
    """The weights [B, m] that are set (None: the base model), token map, and when they were set."""

    weights: Tensor | None
    example_ids: Tensor | None
    set_in_backward: bool


class Steering:
    """The weights shared by all layers of one model. Only `steer` writes it."""

    def __init__(self) -> None:
        self.active: Active | None = None
        self.thread = 0  # the one that set them; 0: not known


class SteeredLayer(nn.Module):
    """A layer that mixes m terms per example by the weights of `steer`.

    Attributes:
        adapter_names: m names, in the order of the columns of `weights`.
        steering: The object that `steer` writes; shared by the layers of a model.
        has_base: Whether the layer can run for `steer(model, None)`.
        flattened: Whether x is [B * T, ...], one example's tokens after the other's, and the module
            around the layer refuses another B than the weights'. What puts the layer into a model
            finds out.
    """

    adapter_names: tuple[str, ...]
    steering: Steering
    has_base: bool = False
    flattened: bool = False

    @abstractmethod
    def mixed_parameter(self) -> Tensor:
        """One of the parameters that are mixed: weights go to its device, in its accumulator."""

    def fault(self) -> str | None:
        """That the base_layer has a hook or a forward of its own since the layer was made.

        The adapters or the experts would have no part in it.
        """
        base = self._modules.get("base_layer")
        if base is None:
            return None
        own = base.__dict__
        # Spelled out, because `steer` asks every layer: a loop takes five times as long.
        if not (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
            or "_call_impl" in own
            or "_slow_forward" in own
        ):
            return None
        what = next(shown_call(name) for name in CALLED if own.get(name))
        return (
            f"its base_layer has got {what} since it was wrapped; put that on this "
            f"{type(self).__name__} instead"
        )

    def by_example(self, x: Tensor) -> Tensor | None:
        """x [B * T, in] as [B, T, in] if the layer is `flattened`; None: x is as it should be."""
        active = self.steering.active
        if not self.flattened or x.dim() != 2 or active is None or active.weights is None:
            return None
        count = active.weights.shape[0]
        if active.example_ids is not None or x.shape[0] == count or not count:
            return None
        return x.unflatten(0, (count, -1)) if x.shape[0] % count == 0 else None

    def active_weights(self, x: Tensor, feature_axes: int, broadcast: bool = False) -> Active:
        """The weights for an input whose last `feature_axes` axes belong to one token.

        `broadcast` lets an input of one example serve all weights.

        Raises: RuntimeError without weights; ValueError if x and the weights do not fit.
        """
        active = self.steering.active
        if active is None:
            base = " (weights of zero give the base model)" if self.has_base else ""
            raise RuntimeError(
                "a steered layer ran without weights: call the model inside "
                f"`with clp_kernels.steer(model, weights):`{base}"
            )
        if not torch.compiler.is_compiling():
            _refuse_foreign_recompute(active)
        weights, example_ids = active.weights, active.example_ids
        if weights is None:
            return active
        if example_ids is not None:
            if x.shape[: x.dim() - feature_axes] != example_ids.shape:
                raise ValueError(
                    f"example_ids gives weights to {example_ids.numel()} tokens [T, in], the "
                    f"layer got {list(x.shape)}"
                )
        elif x.shape[0] != weights.shape[0] and not (broadcast and x.shape[0] == 1):
            raise wrong_batch(x.shape[0], weights.shape[0])
        return active


def shown_call(name: str) -> str:
    """A name of CALLED, as errors show it."""
    return name.strip("_").replace("_", " ") if name.endswith("hooks") else "a replaced forward"


def wrong_batch(examples: int, rows: int) -> ValueError:
    """The error of a batch that has another number of examples than there are rows of weights."""
    return ValueError(
        f"the batch has {examples} examples, weights has {rows} rows; repeat the rows "
        "(weights.repeat_interleave(n, 0) for n sequences per prompt), or pass example_ids to "
        "steer for a module that sees flattened tokens"
    )


def _refuse_foreign_recompute(active: Active) -> None:
    """A forward inside a backward is a recomputation, which needs the weights of its forward."""
    if torch._C._current_graph_task_id() != -1 and not active.set_in_backward:
        raise RuntimeError(
            "a steered layer was recomputed in the backward with weights that may not be its "
            "own; use transformers' gradient_checkpointing_enable() (from 5.23 on: "
            "activation_checkpointing_enable()), or torch.utils.checkpoint.checkpoint(..., "
            "use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), "
            "clp_kernels.steer(model, weights)))"
        )


def all_steered(model: nn.Module) -> list[SteeredLayer]:
    """Every layer that `steer` serves: adapters on a base and mixtures of whole parameters."""
    return [m for m in model.modules() if isinstance(m, SteeredLayer)]


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """The adapters (or mixed models) of a steered model, in the order of the columns of `weights`.

    Raises: ValueError for a model that has no steered layer.
    """
    return _names_of(all_steered(model))


def _names_of(layers: list[SteeredLayer]) -> tuple[str, ...]:
    if not layers:
        raise ValueError(
            "model has no MixedLoRALinear layer and no other that is steered; call inject, "
            "load_adapters or mix_models first"
        )
    return layers[0].adapter_names


def distinct_names(argument: str, names: Sequence[str]) -> list[str]:
    """The names as a list. Raises ValueError unless they are distinct and fit for a folder's."""
    listed = list(names)
    good = all(isinstance(n, str) and _NAME.fullmatch(n) for n in listed)
    if not listed or not good or len(set(listed)) != len(listed) or isinstance(names, str):
        raise ValueError(
            f"{argument} must be distinct names of letters, digits, _ and -, got {listed}"
        )
    return listed


class steer:
    """Sets the weights for all steered layers of a model: `with steer(model, weights): ...`

    Args:
        model: A model after `inject`, `load_adapters` or `mix_models` (also wrapped by DDP or
            torch.compile). Its steered layers are looked up once, here.
        weights: [B, m], one row per example: a tensor or nested sequence of real numbers. A tensor
            that requires grad gets its gradient. None runs the bare base model, for any batch;
            a mixture of whole models has none.
        example_ids: int32 or int64 [T], for modules that see flattened tokens [T, in].

    Weights may be changed freely between calls without recompilation. Contexts nest, and one object
    may be entered again and again: the inner weights hold inside, the outer ones afterwards.
    Gradient checkpointing through transformers' `gradient_checkpointing_enable()` sets the weights
    of the forward again when it recomputes, also after this context has ended.

    Raises:
        ValueError: wrong shape, NaN or infinity (weights on a GPU are read once here), no steered
            layer, None for a model without a base, hooks or another forward on a base layer, which
            would not run.
        TypeError: weights that are not numbers.
        RuntimeError: on entry, while another thread has weights set for the model.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Tensor | Sequence[Sequence[float]] | None,
        example_ids: Tensor | None = None,
    ) -> None:
        self.model, self.example_ids = model, example_ids
        # One list of steps per nesting level, so that leaving ends only what its entry began.
        self._undo: list[list[Callable[[], None]]] = []
        layers = all_steered(model)
        names = _names_of(layers)
        # Collected here: a walk over all modules at every entry is 3 % of a decoding step.
        self._shared = list({id(layer.steering): layer.steering for layer in layers}.values())
        self.weights: Tensor | None = None
        if weights is None:
            if not all([layer.has_base for layer in layers]):
                raise ValueError(
                    f"weights must be [B, {len(names)}], got None: a mixture of whole models "
                    f"({', '.join(names)}) has no base model"
                )
            return
        for layer in layers:
            if fault := layer.fault():
                name = next(n for n, module in model.named_modules() if module is layer)
                raise ValueError(f"{name}: {fault}")
        parameter = layers[0].mixed_parameter()
        acc = checks.accumulator(parameter.dtype)
        if not isinstance(weights, Tensor):
            weights = _as_tensor(weights, names)
        given = weights.to(parameter.device, acc)
        if given.dim() != 2 or given.shape[1] != len(names):
            raise ValueError(
                f"weights must have shape [B, {len(names)}] for the adapters {', '.join(names)}, "
                f"got {list(given.shape)}"
            )
        if not torch.compiler.is_compiling() and not bool(torch.isfinite(given).all()):
            bad = given[~torch.isfinite(given)][0].item()
            raise ValueError(f"weights must be finite, got {bad}")
        if example_ids is not None:
            tokens = example_ids.numel() if isinstance(example_ids, Tensor) else 0
            checks.example_ids(example_ids, tokens, given.shape[0], given)
        self.weights = given

    def __enter__(self) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        active = Active(self.weights, self.example_ids, in_backward)
        shared = self._shared
        if torch.compiler.is_compiling():
            previous = [s.active for s in shared]
            for steering in shared:
                steering.active, steering.thread = active, 0
        else:
            with _ENTERING:
                if not in_backward:  # a recomputation may run in a thread of autograd's
                    _claim(shared)
                previous = [s.active for s in shared]
                _assign(shared, [active] * len(shared))
        self._undo.append([lambda: _assign(shared, previous)])
        if torch.is_grad_enabled():
            self._bind_checkpointing(shared, active)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        steps = self._undo.pop()[::-1]
        try:
            for step in steps:
                step()
        except BaseException:  # Ctrl-C in the middle of it
            for step in steps:
                step()
            raise

    def _bind_checkpointing(self, shared: list[Steering], active: Active) -> None:
        """Makes what transformers passes to checkpoint() set these weights in the recomputation."""
        for module in self.model.modules():
            original = module.__dict__.get("_gradient_checkpointing_func")
            if original is not None:
                carrying = _carrying(original, shared, active)
                module._gradient_checkpointing_func = carrying  # type: ignore[assignment]
                self._undo[-1].append(_restore(module, original))


def _as_tensor(weights: Any, names: Sequence[str]) -> Tensor:
    """Lists of numbers or tensors as float64. Tensors in them get their gradients.

    Raises: ValueError for lists of unequal length, TypeError for anything else, such as mappings.
    """
    try:
        return _stacked(weights)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(
            f"weights must be numbers [B, {len(names)}], a column for each of {', '.join(names)}, "
            f"got {reprlib.repr(weights)} ({error})"
        ) from None


def _stacked(weights: Any) -> Tensor:
    # torch.as_tensor takes tensors in lists without their graph, and refuses arrays of negative
    # strides or another byte order, and those of no dimension in lists.
    if isinstance(weights, list | tuple) and any(map(_is_or_holds_array, weights)):
        return torch.stack([_stacked(row) for row in weights])
    if _is_or_holds_array(weights) and not isinstance(weights, Tensor):
        weights = weights.tolist()
    return torch.as_tensor(weights, dtype=torch.float64)


def _is_or_holds_array(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_is_or_holds_array, value))
    return hasattr(value, "tolist")


def _claim(shared: list[Steering]) -> None:
    """Records this thread as the one that sets weights. Raises RuntimeError if another has."""
    thread = threading.get_ident()
    if any(s.active is not None and s.thread not in (0, thread) for s in shared):
        raise BusyError(
            "another thread is running this model with weights of its own: let the threads take "
            "turns (a lock around each `with clp_kernels.steer(...)`), or give each a copy"
        )
    for steering in shared:
        steering.thread = thread


def _assign(shared: list[Steering], values: Sequence[Active | None]) -> None:
    for steering, value in zip(shared, values, strict=True):
        steering.active = value


def _restore(module: nn.Module, original: Callable[..., Any]) -> Callable[[], None]:
    return lambda: setattr(module, "_gradient_checkpointing_func", original)


def _carrying(
    checkpoint: Callable[..., Any], shared: list[Steering], active: Active
) -> Callable[..., Any]:
    """checkpoint(), but the function it will call twice runs with these weights both times."""

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def with_weights(*inner: Any, **inner_kwargs: Any) -> Any:
            previous = [s.active for s in shared]
            _assign(shared, [active._replace(set_in_backward=True)] * len(shared))
            try:
                return function(*inner, **inner_kwargs)
            finally:
                _assign(shared, previous)

        return checkpoint(with_weights, *args, **kwargs)

    return run
