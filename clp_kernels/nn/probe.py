"""A few tokens through a language model: what its layers see, and whether its start is the base.

Used when adapters are put into a model of transformers, which says by itself how it is run.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from clp_kernels.nn.steering import SteeredLayer, Steering, adapter_names, steer, wrong_batch

_EXAMPLES, _TOKENS = 2, 3  # unequal, so that no axis is taken for another
# Names of the size of a decoder's own vocabulary (Marian, FSMT).
_DECODER_ROWS = ("decoder_vocab_size", "tgt_vocab_size")
# In the names of a forward's arguments: it may need them beside token ids.
_MORE_THAN_TEXT = re.compile("visual|pixel|image|audio")
_Calls = list[Tensor | None]  # the first tensor of each call of a module


class Layout(NamedTuple):
    """How layers see a batch [B, T, ...].

    Attributes:
        flattened: Layers that get [B * T, in], one example's tokens after the other's: the
            innermost module around each that still sees [B, T, ...].
        unsteerable: Layers whose inputs cannot be told apart by example.
        bypassed: Layers whose weight or bias is read outside of their own call.
    """

    flattened: dict[str, nn.Module]
    unsteerable: list[str]
    bypassed: list[str]


def can_probe(model: nn.Module) -> bool:
    """Whether this is a model of transformers that runs on token ids alone.

    Of one that does not generate, such as an encoder or a classifier, that is asked of what is
    below its head (`_network`).
    """
    network = _network(model)
    if getattr(network, "main_input_name", None) != "input_ids":
        return False
    names = " ".join(inspect.signature(network.forward).parameters)
    if not _generates(network) and (not _has_table(network) or _MORE_THAN_TEXT.search(names)):
        return False
    if any(parameter.is_meta for parameter in network.parameters()):
        return False
    arguments = inspect.signature(network.forward).parameters.values()
    any_number = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = {p.name for p in arguments if p.default is p.empty and p.kind not in any_number}
    # A composite of encoder and decoder, such as MusicGen, takes other ids in the decoder.
    composite = network.config.is_encoder_decoder and network.config.sub_configs
    return needed <= {"input_ids"} and not composite


def layout(model: nn.Module, names: Sequence[str]) -> Layout:
    """Looks at what the named layers get for two examples of three tokens.

    Where not all see [B, T, ...], the model runs a second time with other tokens in the second
    example: the entries that change belong to it. A layer that does not run, such as one that is
    for images, counts as one that sees examples, unless its like (the other experts of its list,
    the same layer of another block) gets something else.

    Cost: one or two forwards of six tokens.
    """
    ids, changed = _token_ids(model)
    layers = {name: model.get_submodule(name) for name in names}
    reads = _Reads(model, layers)
    first = _inputs(model, layers, ids, reads)
    if reads.found or all(_by_example(x) for calls in first.values() for x in calls):
        return Layout({}, [], list(reads.found))
    around = {module: model.get_submodule(module) for name in names for module in _around(name)}
    second = _inputs(model, layers | around, changed)
    kinds = {name: _kind(first[name], second[name]) for name in names}
    groups: dict[str, set[str]] = {}
    for name, kind in kinds.items():
        groups.setdefault(_like(name), set()).add(kind)
    unsteerable = [n for n in names if kinds[n] != "examples" and _gathered(groups[_like(n)])]
    if unsteerable:
        return Layout({}, unsteerable, [])
    flattened = {
        name: next(
            around[m] for m in _around(name) if second[m] and all(map(_by_example, second[m]))
        )
        for name in names
        if kinds[name] == "flattened"
    }
    return Layout(flattened, [], [])


class _Reads(TorchDispatchMode):
    """Finds the layers whose parameters an op reads while no module that holds them is called.

    An adapter on such a layer does nothing there, as on the dt_proj of a Mamba, whose weight the
    mixer multiplies by itself. A parameter that an embedding shares may be read by that. To make a
    tensor of the same kind reads no value.

    Attributes:
        found: Their names, in the order of the reads.
        handles: Hooks by which it knows which modules are being called.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.found: dict[str, None] = {}
        self._layer_of = {id(p): name for name, layer in layers.items() for p in layer.parameters()}
        self._called: list[int] = []  # parameters of the modules that are being called
        self.handles: list[RemovableHandle] = []
        for module in model.modules():
            own = [id(p) for p in module.parameters(recurse=False) if id(p) in self._layer_of]
            if own:
                self._watch(module, own)

    def _watch(self, module: nn.Module, own: list[int]) -> None:
        def enter(*_: Any) -> None:
            self._called.extend(own)

        def leave(*_: Any) -> None:
            del self._called[-len(own) :]

        self.handles.append(module.register_forward_pre_hook(enter))
        self.handles.append(module.register_forward_hook(leave, always_call=True))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if not name.startswith("new_") and "_like." not in name:
            for value in tree_leaves((args, kwargs)):
                # A view that was made before, such as weight.t() kept as an attribute.
                source = getattr(value, "_base", None)
                key = id(value if source is None else source)
                if key in self._layer_of and key not in self._called:
                    self.found[self._layer_of[key]] = None
        return func(*args, **kwargs)


def _inputs(
    model: nn.Module, modules: dict[str, nn.Module], ids: Tensor, reads: _Reads | None = None
) -> dict[str, _Calls]:
    """Copies of what the modules get while the model runs, by name."""
    calls: dict[str, _Calls] = {name: [] for name in modules}

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_tensor(args, kwargs)
            # A copy, because a model may go on to write into it.
            calls[name].append(None if x is None else x.detach().double().cpu())

        return hook

    handles = [
        module.register_forward_pre_hook(look(name), prepend=True, with_kwargs=True)
        for name, module in modules.items()
    ]
    # A forward that draws random numbers draws the same ones in both runs of `layout`.
    with _generators_kept(ids), reads or nullcontext():
        _run(model, ids, handles + (reads.handles if reads else []))
    return calls


def _outputs(
    model: nn.Module, modules: dict[str, nn.Module], ids: Tensor
) -> dict[str, list[Tensor]]:
    """Copies of what the modules return while the model runs, by name."""
    calls: dict[str, list[Tensor]] = {name: [] for name in modules}

    def look(name: str) -> Callable[..., None]:
        return lambda _, args, y: calls[name].append(y.detach().clone())

    handles = [module.register_forward_hook(look(name)) for name, module in modules.items()]
    _run(model, ids, handles)
    return calls


@torch.no_grad()
def _run(model: nn.Module, ids: Tensor, handles: Sequence[RemovableHandle]) -> None:
    """The model on token ids, in eval mode, with the hooks of `handles`; then all is as before."""
    network, modes = _network(model), {m: m.training for m in model.modules()}
    accepted = inspect.signature(network.forward).parameters
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
    if network.config.is_encoder_decoder:
        sizes = (getattr(network.config, name, None) for name in _DECODER_ROWS)
        rows = next(filter(None, sizes), None)
        options["decoder_input_ids"] = ids if rows is None else ids % rows
    try:
        network.eval()
        network(input_ids=ids, **options)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode


def _generators_kept(ids: Tensor) -> AbstractContextManager[None]:
    """PyTorch's generators are afterwards as they were before."""
    return torch.random.fork_rng([ids.device] if ids.is_cuda else [])


def _token_ids(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Ids of the two examples, and the same with other tokens in the second; none is special."""
    network = _network(model)
    config, table = network.config, network.get_input_embeddings().weight
    values = [v for c in (config, config.get_text_config()) for k, v in vars(c).items()
              if k.endswith("_token_id")]  # fmt: skip
    special = {i for v in values for i in (v if isinstance(v, list) else [v])}
    plain = [i for i in range(len(table)) if i not in special] or [0]
    count, size = _EXAMPLES * _TOKENS, len(plain)
    places = [i * max(1, size // count) for i in range(count)]
    moved = places[:_TOKENS] + [place + max(1, size // (2 * count)) for place in places[_TOKENS:]]
    both = torch.tensor([[plain[i % size] for i in where] for where in (places, moved)])
    first, second = both.to(table.device).view(2, _EXAMPLES, _TOKENS)
    return first, second


def _network(model: nn.Module) -> Any:
    """The model itself where torch.compile has wrapped it: six tokens need no compilation.

    Below its head if it does not generate: a classifier wants padding to tell where texts end.
    """
    network: Any = getattr(model, "_orig_mod", model)
    below = None if _generates(network) else getattr(network, "base_model", None)
    return network if below is None else below


def _has_table(network: Any) -> bool:
    """Whether it has an embedding of token ids, which CANINE, for instance, makes by hashes."""
    try:
        return hasattr(network.get_input_embeddings(), "weight")
    except NotImplementedError:
        return False


def _generates(network: Any) -> bool:
    can_generate: Callable[[], bool] = getattr(network, "can_generate", lambda: False)
    return can_generate()


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor that a module is called with: its input."""
    return next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)


def _like(name: str) -> str:
    """The name without its numbers, which layers of the same part have in common."""
    return re.sub(r"\d+", "#", name)


def _around(name: str) -> list[str]:
    """The modules around one, the innermost first; "" is the model."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)]


def _by_example(x: Tensor | None) -> bool:
    return x is not None and x.dim() > 1 and x.shape[:2] == (_EXAMPLES, _TOKENS)


def _kind(first: _Calls, second: _Calls) -> str:
    """What a layer gets: "examples" [B, T, ...], "entries" [B, ...], "flattened" [B * T, in].

    "idle" if it does not run, "other" for everything else.
    """
    if len(first) != len(second):
        return "other"
    found = {_kind_of_call(a, b) for a, b in zip(first, second, strict=True)} or {"idle"}
    return found.pop() if len(found) == 1 else "other"


def _kind_of_call(a: Tensor | None, b: Tensor | None) -> str:
    if a is None or b is None or a.shape != b.shape or a.dim() < 2:
        return "other"
    if _by_example(a):
        return "examples"
    flat = a.dim() == 2 and len(a) == _EXAMPLES * _TOKENS
    if not flat and len(a) != _EXAMPLES:
        return "other"
    # Relative to each number, so that a large one which is rounded otherwise does not count more:
    # the experts of a mixture multiply the first example's tokens with other ones the second time.
    size = (a.abs() + b.abs()).flatten(1)
    change = ((a - b).abs().flatten(1) / size).nan_to_num(0).sum(1) / (size > 0).sum(1).clamp(min=1)
    kept, changed = (float(part) for part in (change.chunk(2)[0].max(), change.chunk(2)[1].min()))
    return ("flattened" if flat else "entries") if kept <= 0.3 * changed > 0 else "other"


def _gathered(kinds: set[str]) -> bool:
    """Whether like layers get what has no order of examples.

    Of a list of experts one may get all tokens, or one per example, if the others get none.
    """
    orders = kinds & {"flattened", "entries"}
    return "other" in kinds or len(orders) > 1 or bool(orders and "idle" in kinds)


class OneExamplePerWeights:
    """Forward pre-hook on a module that sees [B, T, ...] around layers that see [B * T, in].

    These cannot tell how many examples their tokens belong to.

    Raises: ValueError if B is not the first size of the weights.
    """

    def __init__(self, steering: Steering) -> None:
        self.steering = steering

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        active, x = self.steering.active, first_tensor(args, kwargs)
        if active is None or active.weights is None or active.example_ids is not None:
            return
        examples = 0 if x is None else x.shape[0]
        if examples != active.weights.shape[0]:
            raise wrong_batch(examples, active.weights.shape[0])


def check_start(model: nn.Module) -> None:
    """Refuses a steered model that is not its base model, bit for bit, while lora_B is zero.

    Six tokens run through the base model twice and once under weights that are not zero.

    Raises:
        ValueError: names the first layer whose outputs differ, between the runs of the base model
            (it is not deterministic) or between it and the steered model.
    """
    ids, _ = _token_ids(model)
    layers: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, SteeredLayer)
    }
    count = len(adapter_names(model))
    weights = torch.tensor([[1.0] * count, [-0.5] * count], dtype=torch.float32)

    def run(weights: Tensor | None) -> dict[str, list[Tensor]]:
        with steer(model, weights):
            return _outputs(model, layers, ids)

    with _generators_kept(ids):
        base, again, steered = run(None), run(None), run(weights)
    if name := _first_difference(base, again):
        raise ValueError(
            f"model must be deterministic, the outputs of {name} differ between two runs of the "
            "same tokens"
        )
    if name := _first_difference(base, steered):
        raise ValueError(
            f"model must equal its base model before training, the outputs of {name} differ; leave "
            f"it out of target_modules (exclude_modules=[{name!r}])"
        )


def _first_difference(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]]) -> str | None:
    """The first layer whose outputs are not the same values (NaN is NaN, -0.0 is 0.0)."""
    for name in one:
        a, b = one[name], other[name]
        if len(a) != len(b) or not all(map(_same, a, b)):
            return name
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape[:1] == (1,):  # positions, which are one row for any batch until they are mixed
        a = a.expand_as(b) if a.shape[1:] == b.shape[1:] else a
    return (
        a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a != a) & (b != b)).all())
    )
