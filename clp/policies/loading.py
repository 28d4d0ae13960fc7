"""Loading a base model and its tokenizer, and what a loaded one allows: lengths, ids, devices."""

import json
import threading
from pathlib import Path
from typing import Any

import huggingface_hub.errors
import numpy as np
import safetensors
import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from clp.data.paths import TINY, model_location

# What transformers raises for a folder that is incomplete or damaged, or that needs a package which
# is not installed. None can be left out: with single fields of the embedded model's files damaged,
# 344 loads failed, and each came up but ImportError (quantised models) and AssertionError (a
# padding id past the vocabulary).
LOAD_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
               AssertionError, RuntimeError, ImportError, safetensors.SafetensorError,
               huggingface_hub.errors.StrictDataclassError)  # fmt: skip


def model_path(name: str) -> str:
    """What transformers and PEFT load: the name itself (a path or hub name), or "tiny"'s folder."""
    return str(TINY) if name == "tiny" else name


# While transformers loads a model it replaces `tie_weights` of all models. Of two threads at once
# the second restores what the first has put there, after which no model of the process is tied.
_LOADING = threading.RLock()


class loading:
    """Context of transformers' loading: what it raises for a bad folder is a ValueError with
    `problem`, and one thread is in it at a time.

    A class, because the library tokenizers raises Exception itself, and an except clause for that
    would take every other error too. Wrap nothing but transformers' own calls.
    """

    def __init__(self, problem: str) -> None:
        self.problem = problem

    def __enter__(self) -> None:
        _LOADING.acquire()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        _LOADING.release()
        if kind is Exception or isinstance(error, LOAD_ERRORS):
            raise ValueError(f"{self.problem}: {error}") from error


def load_base(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The frozen base model in eval mode, and its tokenizer (with a padding token).

    Args:
        name: "tiny" for the embedded model, else a path or hub name (see clp.data.paths).

    Raises: ValueError if it is not a transformers causal LM with its tokenizer.
    """
    path = model_path(model_location(name))
    if (Path(path) / "adapter_config.json").exists():
        raise ValueError(f"model {name!r} is an adapter; give its base model, or a merged one")
    with loading(f"model {name!r} cannot be loaded"):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    named = config.architectures if isinstance(config.architectures, list) else []
    causal = [a for a in named if isinstance(a, str) and a in known]
    if not causal:
        shown = ", ".join(map(str, named)) or config.model_type
        raise ValueError(f"model {name!r} is not a causal LM: it holds {shown}")
    # Given explicitly because a config.json may name code to fetch in its place.
    attention = "sdpa" if getattr(transformers, causal[0])._supports_sdpa else "eager"
    with loading(f"model {name!r} cannot be loaded"):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, attn_implementation=attention, use_safetensors=True,
            trust_remote_code=False, output_loading_info=True,
        )  # fmt: skip
        model, report = loaded
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    # transformers drops a method that it does not know, and takes the numbers as they are stored;
    # where it has made plain weights of them, this is gone from the model's configuration.
    quantised = getattr(model.config, "quantization_config", None)
    if quantised and not getattr(model, "hf_quantizer", None):
        method = config.quantization_config.get("quant_method")
        raise ValueError(f"model {name!r} is quantised by {method!r}, which transformers lacks")
    # transformers makes an empty tokenizer if the files are missing.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"model {name!r} comes without its tokenizer")
    if report["missing_keys"]:
        raise ValueError(f"model {name!r} lacks weights: {sorted(report['missing_keys'])[:5]}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    model.requires_grad_(False)
    return model.eval(), tokenizer


def torch_device(name: str | torch.device) -> torch.device:
    """The device: "cpu", "cuda", "cuda:1" ..., or "auto": CUDA if there is one, else the CPU.

    Raises: ValueError for an unknown name, or a device that PyTorch does not find here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        expected = '"auto", "cpu", "cuda" or "cuda:N"'
        raise ValueError(f"device must be {expected}, got {name!r}") from None
    if device.type == "cpu":
        return device
    absent = f"device {str(device)!r} is not here"
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if here is None or here.type != device.type:
        found = "none but the CPU" if here is None else f"the CPU and {here.type}"
        raise ValueError(f"{absent}: PyTorch {torch.__version__} finds {found}")
    count = torch.accelerator.device_count()
    if device.index is not None and device.index >= count:
        raise ValueError(f"{absent}: there are {count}, counted from 0")
    return device


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Token ids that end a completion: all that the configurations and the tokenizer name."""
    found: list[Any] = []
    configs = (model.generation_config, model.config, model.config.get_text_config())
    for ids in (getattr(config, "eos_token_id", None) for config in configs):
        ids = ids.tolist() if isinstance(ids, np.generic | np.ndarray | Tensor) else ids
        found += ids if isinstance(ids, (list, tuple, set, frozenset)) else [ids]
    # An end token that the vocabulary lacks has the id of the unknown token.
    known = tokenizer.eos_token_id != tokenizer.unk_token_id
    if known or tokenizer.eos_token == tokenizer.unk_token:
        found.append(tokenizer.eos_token_id)
    known = (i for i in found if isinstance(i, int | np.integer) and not isinstance(i, bool))
    rows = vocab_size(model)
    return frozenset(int(i) for i in known if 0 <= i < rows)


def base_config(model: Any) -> dict[str, Any]:
    """The model's configuration as JSON has it, without what another copy of it may change."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"):
        config.pop(name, None)
    return config


def context_length(model: Any) -> int:
    """Tokens that this model can see.

    For LongRoPE (Phi-3's long contexts) those of its short factors: transformers takes the long
    ones for a whole batch if one example of it is longer.
    """
    config = model.config.get_text_config()
    most = int(getattr(config, "max_position_embeddings", None) or 2**31)
    rope = getattr(config, "rope_parameters", None) or {}
    for one in (rope, *rope.values()):  # for all layers, or by type of layer
        if isinstance(one, dict) and one.get("rope_type") == "longrope":
            most = min(most, int(one["original_max_position_embeddings"]))
    return most


def vocab_size(model: Any) -> int:
    """Rows of the embedding."""
    return int(model.config.get_text_config().vocab_size)


def token_count(tokenizer: Any) -> int:
    """Ids that the tokenizer has are below it."""
    vocabulary = tokenizer.get_vocab()
    count = max(vocabulary.values(), default=-1) + 1
    # One that names several ids alike, or only counts them, says so by its length.
    return max(count, len(tokenizer)) if len(tokenizer) > len(vocabulary) else count


def drawable_ids(tokenizer: Any, rows: int) -> slice | Tensor:
    """Index of the ids below `rows` that the tokenizer has: all from 0 on, or ids in order.

    An id that it does not have, beyond its last or between two others, would vanish from the text.
    """
    vocabulary = tokenizer.get_vocab()
    ids = sorted({i for i in vocabulary.values() if 0 <= i < rows})
    if not ids or len(tokenizer) > len(vocabulary) or ids[-1] < len(ids):
        return slice(min(rows, token_count(tokenizer)))
    return torch.tensor(ids, dtype=torch.long)
