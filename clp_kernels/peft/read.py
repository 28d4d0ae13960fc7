"""`load_adapters`: reads PEFT folders, strictly: all is checked and accounted for before its use.

The format is that of PEFT 0.21. PEFT itself loads missing keys, keys that overwrite base weights,
NaN with a warning at most, and runs any regex. Here the first three are errors and no regex is run:
the modules and their ranks are then those of the tensors. Nothing is unpickled, and no name from a
file is imported.
"""

import json
import math
import re
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from clp_kernels.nn.inject import replace_linears, target_linears
from clp_kernels.nn.mixed_lora import MAX_ALPHA, MAX_RANK, is_linear, is_transposed
from clp_kernels.nn.steering import all_steered

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 1_000_000
_DTYPES = ("F16", "BF16", "F32", "F64")
# The fields of PEFT 0.21: of few values (other starts, such as pissa, change the base weights) ...
_ALLOWED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, True, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
    "use_rslora": (False, True, None),
}
# ... refused when set, as they change what the tensors mean ...
_REFUSED = [
    "alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "kasa_config",
    "layer_replication", "lora_bias", "megatron_config",
    "modules_to_save", "monteclora_config", "trainable_token_indices", "use_bdlora",
    "use_dora", "use_qalora", "velora_config",
]  # fmt: skip
# ... read elsewhere in this file, or of no meaning after training. All others are unknown.
_OTHERS = [
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "target_parameters", "layers_to_transform", "layers_pattern",
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
]  # fmt: skip


class Factors(NamedTuple):
    """One adapter in one module: A [r, in], B [out, r]; scaling = lora_alpha / r."""

    lora_A: Tensor
    lora_B: Tensor
    lora_alpha: float


Adapter = dict[str, Factors]  # by module name
_Pattern = dict[str, tuple[int, Any]]  # rank_pattern or alpha_pattern: (position, value) by name


def load_adapters(
    model: nn.Module,
    folders: Sequence[str | Path],
    *,
    names: Sequence[str] | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> list[str]:
    """Reads m PEFT folders and wraps the union of their target modules in the model, in place.

        y_t = x_t W^T + bias + sum_i weights[b(t), i] * scaling_i * (x_t A_i^T) B_i^T

    Ranks, alphas (with use_rslora, rank_pattern, alpha_pattern) and target modules may differ; an
    adapter without a module adds nothing there. `fan_in_fan_out` is taken from the layers: a flag
    that fits none of them is warned about, as in PEFT, and so are unknown fields. `lora_dropout`
    is not used. A regex in target_modules or exclude_modules is not run: the modules are then those
    that the tensors name; and of each module whose rank a regex in rank_pattern may give, the rank
    is that of its tensors. target_parameters may name weights of linear layers (see
    `save_adapters`). All checks come before the model is touched; a language model runs on six
    tokens, as in `inject`.

    Args:
        model: A model without adapters. Everything but the adapters is frozen.
        folders: m folders, in the order of the columns of `weights`.
        names: m distinct adapter names; the folders' names by default.
        dtype: Of the adapters' parameters: float32, or the base layers'. Files are cast to it.
        backend: Of the layers' calls; see `mixed_lora`.

    Returns:
        The names of the replaced modules.

    Raises:
        ValueError: names the file, the key or field, what was expected and what came: a missing,
            malformed or truncated file; a tensor that is not lora_A [r, in] or lora_B [out, r] of
            a target module, or one of them missing; a target that the model lacks, or that cannot
            be steered (see `inject`); NaN or infinity; a regex in another field; a field that is
            not implemented (DoRA, modules_to_save, ...).
    """
    if isinstance(folders, str | Path):
        raise ValueError(f"folders must be a list of folders, got {str(folders)!r}")
    paths = [Path(folder) for folder in folders]
    names = [path.absolute().name for path in paths] if names is None else list(names)
    if not paths or len(names) != len(paths) or len(set(names)) != len(names):
        raise ValueError(
            "folders must be at least one, with as many distinct names (pass names= where folder "
            f"names repeat), got {len(paths)} folders and the names {names}"
        )
    if all_steered(model):
        raise ValueError("model has adapters already; inject or load_adapters works once a model")
    adapters: list[Adapter] = []  # filled by a loop, so that warnings name the caller
    for path in paths:
        adapters.append(_read_adapter(path, model, dtype))
    modules = [n for n, _ in model.named_modules() if any(n in adapter for adapter in adapters)]
    ranks = {n: [len(a[n].lora_A) if n in a else 0 for a in adapters] for n in modules}
    alphas = {n: [a[n].lora_alpha if n in a else 0.0 for a in adapters] for n in modules}
    layers = replace_linears(model, names, ranks, alphas, dtype, backend)
    with torch.no_grad():
        for i, adapter in enumerate(adapters):
            for name, (lora_A, lora_B, _) in adapter.items():
                layers[name].lora_A[i, : len(lora_A)] = lora_A
                layers[name].lora_B[i, :, : len(lora_A)] = lora_B
    return modules


def _read_adapter(folder: Path, model: nn.Module, dtype: torch.dtype) -> Adapter:
    """Reads and checks one folder against the model, which stays as it is."""
    config, file = _read_config(folder), folder / CONFIG
    keys = _read_keys(folder / TENSORS)
    if embedded := [key for key in keys if "lora_embedding_" in key]:
        raise ValueError(
            f"{folder / TENSORS}: key {_short(min(embedded))} is of an adapter of an embedding, "
            "which is not supported: train one whose target_modules name linear layers alone"
        )
    parameters = _parameter_layers(config, file, model)
    targets = _targets(config, file, model, keys, parameters)
    flag = bool(config.get("fan_in_fan_out"))
    if flag not in {is_transposed(layer) for layer in targets.values()}:
        warnings.warn(f"{file}: fan_in_fan_out={flag} fits no target layer; ignored", stacklevel=3)
    alphas = _pattern(config, "alpha_pattern", file, _check_alpha)
    ranks = _pattern(config, "rank_pattern", file, _check_rank, regexes=True)
    adapter: Adapter = {}
    # As PEFT matches the patterns.
    called = {name: f"{name}.weight" if name in parameters else name for name in targets}
    found = {name: _possible_ranks(ranks, called[name], config["r"]) for name in targets}
    for name, (lora_A, lora_B) in _read_tensors(folder / TENSORS, targets, found, dtype).items():
        alpha = float(_first(alphas, called[name], config["lora_alpha"])[1])
        if config.get("use_rslora"):  # scaling is alpha / sqrt(r), ours lora_alpha / r
            alpha *= math.sqrt(len(lora_A))
        _check_alpha(file, f"lora_alpha of {name}", alpha)
        adapter[name] = Factors(lora_A, lora_B, alpha)
    return adapter


def _read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, with all checked that does not need the model."""
    file = folder / CONFIG
    for needed in (file, folder / TENSORS):
        if not needed.is_file():
            pickled = needed.name == TENSORS and (folder / "adapter_model.bin").exists()
            hint = "; only safetensors are read, not adapter_model.bin" if pickled else ""
            if inner := sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}")):
                hint += f"; there are adapters in its folders {_short(inner)}"
            raise ValueError(f"{needed} must be a file, found none{hint}")
    with file.open("rb") as stream:
        data = stream.read(_MAX_CONFIG_BYTES + 1)
    if len(data) > _MAX_CONFIG_BYTES:
        raise ValueError(f"{file} must have at most {_MAX_CONFIG_BYTES} bytes, got more")
    try:
        config = json.loads(data.decode(), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be valid JSON: {_short(error)}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must be a JSON object, got {_short(config)}")
    for field, allowed in _ALLOWED.items():
        if config.get(field) not in allowed:
            expected = " or ".join(json.dumps(value) for value in allowed)
            raise _error(file, field, expected, config.get(field))
    _check_rank(file, "r", config.get("r"))
    _check_alpha(file, "lora_alpha", config.get("lora_alpha"))
    for field in _REFUSED:
        if config.get(field):
            raise _error(file, field, "unset (it is not implemented)", config[field])
    unknown = [k for k in config if config[k] and k not in {*_ALLOWED, *_REFUSED, *_OTHERS}]
    if unknown:
        warnings.warn(f"{file}: unknown fields are ignored: {_short(unknown)}", stacklevel=4)
    return config


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {_short(key)} comes twice")
        result[key] = value
    return result


def _parameter_layers(config: dict[str, Any], file: Path, model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers whose weights target_parameters names, matched as PEFT matches them."""
    wanted = config.get("target_parameters") or []
    expected = "unset or the names of weights of linear layers (others are not implemented)"
    if not isinstance(wanted, list) or not all(isinstance(name, str) for name in wanted):
        raise _error(file, "target_parameters", expected, wanted)
    layers: dict[str, nn.Module] = {}
    names, absent = set(wanted), set(wanted)
    for name, module in model.named_modules() if wanted else ():
        own = {key for key, _ in module.named_parameters(recurse=False)}
        # The weight of a parametrized layer is not one of them.
        for key in own | ({"weight"} if isinstance(module, nn.Linear) else set()):
            parts = f"{name}.{key}".split(".")
            endings = {".".join(parts[i:]) for i in range(len(parts))}
            if endings.isdisjoint(names):
                continue
            if key != "weight" or not isinstance(module, nn.Linear):
                raise _error(file, "target_parameters", expected, f"{name}.{key}")
            layers[name] = module
            absent -= endings
    if absent:
        raise _error(file, "target_parameters", expected, sorted(absent))
    return layers


def _targets(
    config: dict[str, Any],
    file: Path,
    model: nn.Module,
    keys: frozenset[str],
    parameters: dict[str, nn.Module],
) -> dict[str, nn.Module]:
    """The layers that the config names, matched as PEFT matches them, and those of `parameters`.

    Where target_modules or exclude_modules is a regex, those of them that the tensors name.
    """
    wanted, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    regex = isinstance(wanted, str) and wanted != "" and wanted.lower() != "all-linear"
    if wanted in (None, []) and parameters:
        wanted = []
    elif isinstance(wanted, list) and wanted and all(isinstance(n, str) and n for n in wanted):
        wanted = list(dict.fromkeys(wanted))
    elif not isinstance(wanted, str) or not wanted:
        raise _error(file, "target_modules", '"all-linear", a list of names or a regex', wanted)
    names = [excluded] if isinstance(excluded, str) else excluded
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise _error(file, "exclude_modules", "a list of names or a regex", excluded)
    linears = {name: layer for name, layer in model.named_modules() if is_linear(layer)}
    if regex:
        targets = linears
    else:
        try:
            targets = target_linears(model, wanted)
        except ValueError as error:
            raise ValueError(f"{file}: {_short(error)}{_compared(keys, linears)}") from error
    if isinstance(excluded, list):
        endings = tuple(f".{name}" for name in excluded)
        targets = {n: layer for n, layer in targets.items() if not f".{n}".endswith(endings)}
    targets = _in_layers(config, file, targets)
    if regex:
        targets = {n: layer for n, layer in targets.items() if n not in parameters}
    if twice := targets.keys() & parameters.keys():
        expected = f"other layers than target_modules, which has {_short(min(twice))} too"
        raise _error(file, "target_parameters", expected, config["target_parameters"])
    if regex or isinstance(excluded, str):
        targets = {n: m for n, m in targets.items() if not keys.isdisjoint(tensor_keys(n))}
    targets |= parameters
    if not targets:
        none = _error(file, "target_modules", "the names of linear layers of the model", wanted)
        raise ValueError(f"{none}{_compared(keys, linears)}")
    return targets


def _in_layers(
    config: dict[str, Any], file: Path, targets: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """Those of layers_to_transform; as in PEFT a module that is listed by its full name is one."""
    indices, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, list) or not all(
        isinstance(p, str) and re.fullmatch(r"[\w.-]+", p) for p in patterns
    ):
        raise _error(file, "layers_pattern", "names of lists of layers (no regexes)", patterns)
    if indices is None or indices == []:
        if patterns:
            raise _error(file, "layers_pattern", "unset without layers_to_transform", patterns)
        return targets
    numbers = indices if isinstance(indices, list) else [indices]
    if not all(type(i) is int for i in numbers):
        raise _error(file, "layers_to_transform", "an integer or a list of integers", indices)
    wanted = config.get("target_modules") or []
    if isinstance(wanted, str):
        raise _error(file, "layers_to_transform", "unset where target_modules is a str", indices)
    return {n: m for n, m in targets.items() if n in wanted or _index(n, patterns) in numbers}


def _index(name: str, patterns: list[str]) -> int | None:
    """The number of a module's layer: the first one behind a name of `patterns`, as in PEFT.

    Without patterns the first number that has two names before it and one behind.
    """
    parts = name.split(".")
    places = [i for i in range(1, len(parts) - 1) if parts[i].isdecimal()]
    if not patterns:
        return next((int(parts[i]) for i in places if i > 1), None)
    for pattern in patterns:
        for i in places:
            if f".{'.'.join(parts[:i])}".endswith(f".{pattern}"):
                return int(parts[i])
    return None


def _compared(keys: Collection[str], modules: Collection[str]) -> str:
    """For messages about an adapter that another model's modules may have."""
    key, module = _short(min(keys, default=None)), _short(next(iter(modules), None))
    return f"; the file's first key is {key}, the model's first linear layer is {module}"


def _pattern(
    config: dict[str, Any],
    field: str,
    file: Path,
    check: Callable[[Path, str, Any], None],
    *,
    regexes: bool = False,
) -> _Pattern:
    """rank_pattern or alpha_pattern, all of it checked; `regexes`: keys may be regexes."""
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict):
        raise _error(file, field, "an object", pattern)
    for key, value in pattern.items():
        if not regexes and not _plain(key):
            raise _error(file, field, "keyed by module names or endings of them (no regexes)", key)
        check(file, f"{field} of {_short(key)}", value)
    return {key: (i, value) for i, (key, value) in enumerate(pattern.items())}


def _plain(key: str) -> bool:
    """Whether a key of a pattern is a name or an ending of one, and no other regex."""
    return re.fullmatch(r"\^?[\w.-]+", key) is not None


def _first(pattern: _Pattern, name: str, default: Any) -> tuple[int, Any]:
    """The first entry for a module: by its name, its name after "^", or an ending of its name."""
    parts = name.split(".")
    keys = [f"^{name}", *(".".join(parts[i:]) for i in range(len(parts)))]
    return min((pattern[key] for key in keys if key in pattern), default=(len(pattern), default))


def _possible_ranks(pattern: _Pattern, name: str, default: int) -> list[int]:
    """The ranks that a module may have: that of the first name which matches it, or the default.

    A regex is not run: each one before that name may match too, and the tensors say which does.
    """
    place, rank = _first(pattern, name, default)
    return [rank, *{r for key, (i, r) in pattern.items() if i < place and not _plain(key)}]


def _read_keys(file: Path) -> frozenset[str]:
    try:
        with safe_open(str(file), framework="pt") as stored:
            return frozenset(stored.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} must be a whole safetensors file: {_short(error)}") from error


def _read_tensors(
    file: Path, targets: dict[str, nn.Module], ranks: dict[str, list[int]], dtype: torch.dtype
) -> dict[str, list[Tensor]]:
    """[A, B] of each target, cast and finite; the file must hold these and nothing else.

    Of the ranks that a target may have it has that of its lora_A.
    """
    tensors: dict[str, list[Tensor]] = {name: [] for name in targets}
    try:
        with safe_open(str(file), framework="pt") as stored:
            found = set(stored.keys())
            expected = set().union(*map(tensor_keys, targets))
            if foreign := found - expected:
                raise _foreign_key(file, min(foreign), found if found == foreign else (), targets)
            for name, layer in targets.items():
                weight: Tensor = layer.weight  # type: ignore[assignment]
                cast = torch.float64 if weight.dtype == torch.float64 else dtype
                if not weight.is_floating_point():
                    raise _error(file, name, "a layer that is not quantised", str(weight.dtype))
                rows, columns = weight.shape[::-1] if is_transposed(layer) else weight.shape
                rank, first = ranks[name][0], tensor_keys(name)[0]
                if len(ranks[name]) > 1 and first in found:
                    length = stored.get_slice(first).get_shape()[:1]
                    rank = next((r for r in ranks[name] if [r] == length), rank)
                shapes = [rank, columns], [rows, rank]
                for key, shape in zip(tensor_keys(name), shapes, strict=True):
                    if key not in found:
                        raise _error(file, key, f"a tensor {shape}, as a target's", "no such key")
                    entry = stored.get_slice(key)
                    if entry.get_shape() != shape:
                        raise _error(file, key, f"of shape {shape}", entry.get_shape())
                    if entry.get_dtype() not in _DTYPES:
                        raise _error(file, key, f"one of {', '.join(_DTYPES)}", entry.get_dtype())
                    tensors[name].append(stored.get_tensor(key).to(cast))
                    if not bool(tensors[name][-1].isfinite().all()):
                        raise _error(file, key, f"finite as {cast}", "NaN or infinity")
    except SafetensorError as error:
        raise ValueError(f"{file} must be a whole safetensors file: {_short(error)}") from error
    return tensors


def _foreign_key(
    file: Path, key: str, keys: Collection[str], targets: Collection[str]
) -> ValueError:
    """The error of a key that belongs to no target; `keys` are the file's if none does."""
    expected = "lora_A.weight or lora_B.weight of base_model.model.<target module>"
    message = str(_error(file, f"key {_short(key)}", expected, "another key"))
    if "lora_" not in key and {"embed_tokens", "lm_head", "base_layer"} & set(key.split(".")):
        message += (
            "; it is a weight of the base model: save the adapter again with PEFT's "
            "save_pretrained(..., save_embedding_layers=False)"
        )
    elif keys:
        message += _compared(keys, targets)
    return ValueError(message)


def tensor_keys(module: str) -> tuple[str, str]:
    """PEFT's keys of lora_A and lora_B for a module."""
    start = f"base_model.model.{module}"
    return f"{start}.lora_A.weight", f"{start}.lora_B.weight"


def _check_rank(file: Path, field: str, value: Any) -> None:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise _error(file, field, f"an integer in [1, {MAX_RANK}]", value)


def _check_alpha(file: Path, field: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 < value <= MAX_ALPHA:
        raise _error(file, field, f"a number in (0, {MAX_ALPHA}]", value)


def _error(file: Path, field: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{file}: {field} must be {expected}, got {_short(got)}")


def _short(value: object) -> str:
    """For messages: hostile files may hold a megabyte, or control characters, as a name."""
    try:
        text = str(value) if isinstance(value, Exception) else repr(value)
    except RecursionError:
        return f"a deep {type(value).__name__}"
    return text if len(text) <= 300 else f"{text[:300]}..."
