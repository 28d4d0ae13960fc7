"""`save_adapters` and `export_adapter`: adapters as PEFT folders.

A folder holds adapter_config.json and adapter_model.safetensors, in the format of PEFT 0.21.
"""

import json
import math
import os
import re
import shutil
import statistics
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from clp_kernels.files import flush
from clp_kernels.nn.mixed_lora import MAX_RANK, MixedLoRALinear, is_transposed, steered_layers
from clp_kernels.nn.steering import adapter_names
from clp_kernels.peft.read import CONFIG, TENSORS, Adapter, Factors, tensor_keys

# Names of linear layers that PEFT takes for those of experts which transformers 5 has fused, where
# transformers converts a model's older checkpoints in this way (PEFT's _MOE_TARGET_MODULE_MAPPING).
_FUSED = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}


def save_adapters(
    model: nn.Module, directory: str | Path, *, base_model: str | None = None
) -> list[Path]:
    """Writes each adapter of a model as its own PEFT folder, `<directory>/<name>`.

    Tensors keep their dtype and own rank (no padding); `load_adapters` restores them bit for bit.
    All folders are written and synced under hidden names first, then renamed into place: after an
    error (disk full) everything is as before, and a crash leaves whole folders only (between two
    renames, the earlier folder under its hidden name `.<name>.<hex>`).

    Dense and shared layers beside experts that transformers 5 has fused (Ernie 4.5, DeepSeek-V3,
    GLM-4 and others) are written under target_parameters, by their weights: PEFT (0.17 or later)
    would take their names in target_modules for those of the experts.

    Args:
        model: A model after `inject` or `load_adapters`, also inside DDP or torch.compile.
        directory: Made if missing. A `<name>` in it that holds other files is refused.
        base_model: For base_model_name_or_path; by default the model config's name_or_path.

    Returns:
        The folders, in the order of the columns of `weights`.

    Raises:
        ValueError: no adapters (a model of `mix_models` has none), NaN or infinity in an adapter,
            or a `<name>` that is in the way. OSError: nothing was changed.
    """
    model = _unwrapped(model)
    layers, names = _layers(model), adapter_names(model)
    contents = {
        Path(directory) / name: {
            n: Factors(layer.lora_A[i, :r], layer.lora_B[i, :, :r], layer.lora_alpha[i])
            for n, layer in layers.items()
            if (r := layer.ranks[i]) > 0
        }
        for i, name in enumerate(names)
    }
    _write_folders(contents, model, base_model)
    return list(contents)


def export_adapter(
    model: nn.Module,
    weights: Sequence[float] | Mapping[str, float] | Tensor,
    directory: str | Path,
    *,
    base_model: str | None = None,
) -> Path:
    """Writes one ordinary PEFT adapter that equals the model at fixed weights.

        A' = [w_1 s_1 A_1; ...; w_m s_m A_m]  [R, in]      B' = [B_1, ..., B_m]  [out, R]

    with s_i = lora_alpha_i / r_i: the exact sum, PEFT's "cat". r = lora_alpha = R, the sum of the
    adapters' largest ranks, is the same in all modules (zero-padded), because servers ignore
    rank_pattern; vLLM needs max_lora_rank >= R. Written in float32 at least.

    Args:
        model: A model after `inject` or `load_adapters`, also inside DDP or torch.compile.
        weights: m numbers in the order of the adapters, or numbers by name (missing names are 0).
        directory: The folder itself; must be missing or empty. Written as in `save_adapters`.
        base_model: As in `save_adapters`.

    Returns:
        The folder.

    Raises:
        ValueError: wrong length, unknown name, NaN or infinity, R above 4096 (`load_adapters` reads
            no more), or a directory in use. OSError: nothing was written.
    """
    model, directory = _unwrapped(model), Path(directory)
    layers, fixed = _layers(model), _fixed_weights(weights, adapter_names(model))
    if directory.is_dir() and any(directory.iterdir()):
        raise ValueError(f"directory must be missing or empty, got {directory}")
    widths = [max(layer.ranks[i] for layer in layers.values()) for i in range(len(fixed))]
    if sum(widths) > MAX_RANK:
        raise ValueError(
            f"an export has rank {sum(widths)} here, the sum of the adapters' ranks "
            f"({' and '.join(map(str, widths))}); it must be at most {MAX_RANK} to be loaded again"
        )
    adapter: Adapter = {}
    for name, layer in layers.items():
        dtype = torch.promote_types(layer.lora_A.dtype, torch.float32)
        shrink, expand = [], []  # the blocks of A' and B'
        for i, (r, width) in enumerate(zip(layer.ranks, widths, strict=True)):
            scaled = layer.lora_A[i, :r].double() * (fixed[i] * layer.lora_alpha[i] / max(r, 1))
            shrink.append(nn.functional.pad(scaled.to(dtype), (0, 0, 0, width - r)))
            expand.append(nn.functional.pad(layer.lora_B[i, :, :r].to(dtype), (0, width - r)))
        adapter[name] = Factors(torch.cat(shrink), torch.cat(expand, 1), float(sum(widths)))
    _write_folders({directory: adapter}, model, base_model)
    return directory


def _fixed_weights(
    weights: Sequence[float] | Mapping[str, float] | Tensor, names: Sequence[str]
) -> list[float]:
    """The weights as m finite numbers in the order of the adapters."""
    expected = f"weights must be {len(names)} finite numbers ({', '.join(names)})"
    if isinstance(weights, Mapping):
        if unknown := set(weights) - set(names):
            raise ValueError(f"{expected}, got the unknown names {sorted(unknown)}")
        weights = [weights.get(name, 0.0) for name in names]
    listed = weights.tolist() if isinstance(weights, Tensor) else list(weights)
    if isinstance(listed, list):  # of numbers, or of tensors and arrays of no dimension
        listed = [w.tolist() if hasattr(w, "tolist") else w for w in listed]
    if not isinstance(listed, list) or len(listed) != len(names):
        raise ValueError(f"{expected}, got {weights}")
    if not all(isinstance(w, Real) and math.isfinite(w) for w in listed):
        raise ValueError(f"{expected}, got {listed}")
    return [float(w) for w in listed]


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP and torch.compile, with the module names that PEFT knows."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _path(name: str) -> str:
    """A module's name without what wrappers of inner modules (torch.compile, checkpoint) add."""
    return re.sub(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module)\.", "", name)


def _layers(model: nn.Module) -> dict[str, MixedLoRALinear]:
    names, layers = adapter_names(model), steered_layers(model)
    if not layers:
        raise ValueError(
            f"model must have adapters to be written, got a mixture of the parameters of "
            f"{', '.join(names)}: its experts are whole models; save those"
        )
    return {_path(name): layer for name, layer in layers.items()}


def _write_folders(
    contents: Mapping[Path, Adapter], model: nn.Module, base_model: str | None
) -> None:
    """Writes all folders or changes nothing: staged, synced, renamed; undone on any error."""
    for folder in contents:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} must be a folder or missing, found a file")
        found = {file.name for file in folder.iterdir()} if folder.exists() else set()
        if others := found - {CONFIG, TENSORS}:
            raise ValueError(f"{folder} must hold an adapter only, found also {sorted(others)}")
    with ExitStack() as undo:
        staged, replaced = [], []
        for folder, adapter in contents.items():
            place = Path(os.path.realpath(folder))  # what a link points at
            place.parent.mkdir(parents=True, exist_ok=True)
            stage = _hidden(place)
            undo.callback(shutil.rmtree, stage, ignore_errors=True)
            stage.mkdir()
            config = json.dumps(_config(adapter, model, base_model), indent=2, sort_keys=True)
            _write(stage / CONFIG, config.encode())
            _write(stage / TENSORS, _serialized(adapter, folder))
            flush(stage)
            staged.append((stage, place))
        for stage, place in staged:
            if place.exists():
                replaced.append(_hidden(place))
                os.rename(place, replaced[-1])
                undo.callback(os.rename, replaced[-1], place)
            os.rename(stage, place)
            undo.callback(os.rename, place, stage)
        for parent in {place.parent for _, place in staged}:
            flush(parent)
        undo.pop_all()
    for old in replaced:
        shutil.rmtree(old, ignore_errors=True)


def _hidden(place: Path) -> Path:
    return place.with_name(f".{place.name}.{uuid.uuid4().hex}")


def _write(file: Path, data: bytes) -> None:
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _serialized(adapter: Adapter, folder: Path) -> bytes:
    tensors: dict[str, Tensor] = {}
    for name, factors in adapter.items():
        for key, tensor in zip(tensor_keys(name), factors[:2], strict=True):
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{folder}: {key} must be finite, got NaN or infinity")
            tensors[key] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return serialize(tensors, metadata={"format": "pt"})


def _config(adapter: Adapter, model: nn.Module, base_model: str | None) -> dict[str, Any]:
    """adapter_config.json: those of PEFT's fields that are old and stable."""
    if not adapter:
        raise ValueError("an adapter must have a module of rank > 0 to be saved, got none")
    layers, hub = _layers(model), getattr(model, "config", None)
    decoder = not getattr(hub, "is_encoder_decoder", False)
    # PEFT adapts a weight that is named as a parameter as it does the layer, with the same keys.
    fused = _fused_names(model)
    as_parameter = {n: f"{n}.weight" for n in adapter if n.rpartition(".")[2] in fused}
    called = {n: as_parameter.get(n, n) for n in adapter}  # as the patterns are matched
    alphas = {called[n]: int(a) if a == int(a) else a for n, (_, _, a) in adapter.items()}
    lora_alpha, alpha_pattern = _common(alphas)
    r, rank_pattern = _common({called[n]: len(f.lora_A) for n, f in adapter.items()})
    target_modules, exclude_modules = _target_names(set(adapter) - set(as_parameter), model)
    parameters = {"target_parameters": sorted(as_parameter.values())} if as_parameter else {}
    return parameters | {
        "alpha_pattern": alpha_pattern,
        "base_model_name_or_path": base_model or getattr(hub, "name_or_path", None) or None,
        "bias": "none",
        "exclude_modules": exclude_modules,
        "fan_in_fan_out": all(is_transposed(layers[n].base_layer) for n in adapter),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora_alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": "0.21.2",  # whose format this is
        "r": r,
        "rank_pattern": rank_pattern,
        "target_modules": target_modules,
        "task_type": "CAUSAL_LM"
        if decoder and hasattr(model, "prepare_inputs_for_generation")
        else None,
        "use_dora": False,
        "use_rslora": False,
    }


def _common(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and a pattern of the others ("^" before the ending of another)."""
    common = statistics.mode(values.values())
    rest = {name: value for name, value in values.items() if value != common}
    ending = {name for name in rest if any(other.endswith(f".{name}") for other in values)}
    return common, {f"^{name}" if name in ending else name: value for name, value in rest.items()}


def _fused_names(model: nn.Module) -> tuple[str, ...]:
    """Last names of the layers that PEFT would look for in fused experts of this model.

    It decides by the type of the model, whether that has such experts or not.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    # Loaded with every model of transformers; PEFT reads the same table.
    known = sys.modules.get("transformers.conversion_mapping")
    table = {"mixtral": "mixtral", **getattr(known, "_MODEL_TO_CONVERSION_PATTERN", {})}
    return _FUSED.get(table.get(model_type, ""), ())


def _target_names(modules: set[str], model: nn.Module) -> tuple[list[str], list[str] | None]:
    """target_modules and exclude_modules that PEFT matches to exactly these modules."""
    inside = tuple(f"{name}." for name in steered_layers(model))
    every = {_path(name) for name, _ in model.named_modules() if not name.startswith(inside)}
    others, last = every - modules, {name.rpartition(".")[2] for name in modules}
    if not any(name.rpartition(".")[2] in last for name in others):
        return sorted(last), None
    endings = tuple(f".{name}" for name in modules)
    return sorted(modules), sorted(name for name in others if name.endswith(endings)) or None
