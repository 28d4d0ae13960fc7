"""Reading one PEFT folder, strictly: everything is accounted for and checked before it is used.

The format is that of PEFT 0.21. PEFT itself loads missing keys, keys that overwrite base weights,
NaN and costly regexes with a warning at most; here they are errors. Nothing is unpickled, and no
name from a file is imported.
"""

import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from clp_kernels.layers import is_transposed, target_linears

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_MAX_CONFIG_BYTES, _MAX_RANK, _MAX_ALPHA = 1_000_000, 4096, 1_000_000
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
    "layer_replication", "layers_pattern", "layers_to_transform", "lora_bias", "megatron_config",
    "modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices",
    "use_bdlora", "use_dora", "use_qalora", "velora_config",
]  # fmt: skip
# ... read elsewhere in this file, or of no meaning after training. All others are unknown.
_OTHERS = [
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
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


def read_adapter(folder: Path, model: nn.Module, dtype: torch.dtype) -> Adapter:
    """Reads and checks one folder against the model, which stays as it is."""
    config, file = _read_config(folder), folder / CONFIG
    targets = _targets(config, file, model)
    flag = bool(config.get("fan_in_fan_out"))
    if flag not in {is_transposed(layer) for layer in targets.values()}:
        warnings.warn(f"{file}: fan_in_fan_out={flag} fits no target layer; ignored", stacklevel=3)
    alphas = _pattern(config, "alpha_pattern", file, _check_alpha)
    ranks = _pattern(config, "rank_pattern", file, _check_rank)
    adapter: Adapter = {}
    found = {name: _match(ranks, name, config["r"]) for name in targets}
    for name, (lora_A, lora_B) in _read_tensors(folder / TENSORS, targets, found, dtype).items():
        alpha = float(_match(alphas, name, config["lora_alpha"]))
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


def _targets(config: dict[str, Any], file: Path, model: nn.Module) -> dict[str, nn.Module]:
    """The layers that target_modules and exclude_modules name, matched as PEFT matches lists."""
    wanted, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        wanted = "all-linear"
    elif isinstance(wanted, list) and wanted and all(isinstance(n, str) and n for n in wanted):
        wanted = list(dict.fromkeys(wanted))
    else:
        expected = '"all-linear" or a list of names (regexes are not read)'
        raise _error(file, "target_modules", expected, wanted)
    if not isinstance(excluded, list) or not all(isinstance(n, str) and n for n in excluded):
        raise _error(file, "exclude_modules", "a list of names (regexes are not read)", excluded)
    try:
        targets = target_linears(model, wanted)
    except ValueError as error:
        raise ValueError(f"{file}: {_short(error)}") from error
    endings = tuple(f".{name}" for name in excluded)
    targets = {n: layer for n, layer in targets.items() if not f".{n}".endswith(endings)}
    if not targets:
        raise _error(file, "target_modules", "the names of linear layers of the model", wanted)
    return targets


def _pattern(
    config: dict[str, Any], field: str, file: Path, check: Callable[[Path, str, Any], None]
) -> _Pattern:
    """rank_pattern or alpha_pattern, all of it checked."""
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict):
        raise _error(file, field, "an object", pattern)
    for key, value in pattern.items():
        if not re.fullmatch(r"\^?[\w.-]+", key):
            raise _error(file, field, "keyed by module names or endings of them (no regexes)", key)
        check(file, f"{field} of {_short(key)}", value)
    return {key: (i, value) for i, (key, value) in enumerate(pattern.items())}


def _match(pattern: _Pattern, name: str, default: Any) -> Any:
    """The first entry for a module: by its name, its name after "^", or an ending of its name."""
    parts = name.split(".")
    keys = [f"^{name}", *(".".join(parts[i:]) for i in range(len(parts)))]
    return min((pattern[key] for key in keys if key in pattern), default=(0, default))[1]


def _read_tensors(
    file: Path, targets: dict[str, nn.Module], ranks: dict[str, int], dtype: torch.dtype
) -> dict[str, list[Tensor]]:
    """[A, B] of each target, cast and finite; the file must hold these and nothing else."""
    tensors: dict[str, list[Tensor]] = {name: [] for name in targets}
    try:
        with safe_open(str(file), framework="pt") as stored:
            found = set(stored.keys())
            if foreign := found.difference(*map(tensor_keys, targets)):
                expected = "lora_A.weight or lora_B.weight of base_model.model.<target module>"
                raise _error(file, f"key {_short(min(foreign))}", expected, "another key")
            for name, layer in targets.items():
                weight: Tensor = layer.weight  # type: ignore[assignment]
                cast = torch.float64 if weight.dtype == torch.float64 else dtype
                if not weight.is_floating_point():
                    raise _error(file, name, "a layer that is not quantised", str(weight.dtype))
                rows, columns = weight.shape[::-1] if is_transposed(layer) else weight.shape
                shapes = [ranks[name], columns], [rows, ranks[name]]
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


def tensor_keys(module: str) -> tuple[str, str]:
    """PEFT's keys of lora_A and lora_B for a module."""
    start = f"base_model.model.{module}"
    return f"{start}.lora_A.weight", f"{start}.lora_B.weight"


def _check_rank(file: Path, field: str, value: Any) -> None:
    if type(value) is not int or not 1 <= value <= _MAX_RANK:
        raise _error(file, field, f"an integer in [1, {_MAX_RANK}]", value)


def _check_alpha(file: Path, field: str, value: Any) -> None:
    if type(value) not in (int, float) or not 0 < value <= _MAX_ALPHA:
        raise _error(file, field, f"a number in (0, {_MAX_ALPHA}]", value)


def _error(file: Path, field: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{file}: {field} must be {expected}, got {_short(got)}")


def _short(value: object) -> str:
    """For messages: hostile files may hold a megabyte, or control characters, as a name."""
    try:
        text = str(value) if isinstance(value, Exception) else repr(value)
    except RecursionError:
        return f"a deep {type(value).__name__}"
    return text if len(text) <= 300 else f"{text[:300]}..."
