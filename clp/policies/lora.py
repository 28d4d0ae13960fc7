"""A steerable policy: a frozen causal LM, one adapter an objective, and the names in order."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub.errors
import safetensors
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import clp_kernels
from clp.data.json_lines import read_json
from clp.data.paths import TINY, model_location
from clp.policies.interface import Network
from clp_kernels.nn.mixed_lora import steered_layers
from clp_kernels.nn.probe import check_start
from clp_kernels.nn.steering import SteeredLayer

# What transformers raises on a folder that is incomplete or damaged, or that needs a package which
# is not here.
LOAD_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
               AssertionError, RuntimeError, ImportError, safetensors.SafetensorError,
               huggingface_hub.errors.StrictDataclassError)  # fmt: skip


class Policy:
    """One policy pi(y | x; w) for every weight row w over the objectives.

    Attributes:
        model: The transformers causal LM with injected adapters, or a mixture of whole models.
        tokenizer: Its tokenizer.
        objectives: Names, in the order of the columns of the weights.
        rewards: The reward specification of each objective, as given to training.
        base_model: What the base was loaded from ("tiny", an absolute path or a hub name); for a
            mixture of whole models, what the first of them was.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        objectives: Sequence[str],
        base_model: str,
        rewards: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.objectives = tuple(objectives)
        self.base_model = base_model
        self.rewards = tuple(rewards)

    @classmethod
    def create(
        cls,
        base_model: str,
        objectives: Sequence[str],
        *,
        rewards: Sequence[str] = (),
        r: int = 8,
        lora_alpha: float = 16,
        target_modules: str | Sequence[str] = "all-linear",
        exclude_modules: Sequence[str] = (),
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        seed: int = 0,
    ) -> "Policy":
        """A policy that equals its base model for every weight row (LoRA's B starts at zero).

        That is checked bit for bit on six tokens.

        Raises: ValueError for a device that is not here (see torch_device), a base that cannot be
            loaded, or that `clp_kernels.inject` or the check refuses.
        """
        device, base_model = torch_device(device), model_location(base_model)
        model, tokenizer = load_base(base_model, dtype)
        generator = torch.Generator().manual_seed(seed)
        clp_kernels.inject(
            model, objectives, r=r, lora_alpha=lora_alpha, target_modules=target_modules,
            exclude_modules=exclude_modules, generator=generator,
        )  # fmt: skip
        check_start(model)
        return cls(model.to(device), tokenizer, objectives, base_model, rewards)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        base_model: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> "Policy":
        """Reads a folder written by `save` (a run folder or a checkpoint).

        Args:
            directory: The folder with clp.json.
            base_model: Where the base model is now, if not where clp.json says.

        Raises:
            ValueError: no clp.json, a malformed one, an adapter that does not match its recorded
                digest, a device that is not here, or anything that clp_kernels.load_adapters
                refuses.
        """
        directory, device = Path(directory), torch_device(device)
        card = read_card(directory)
        folders = [directory / "adapters" / name for name in card["objectives"]]
        for name, folder in zip(card["objectives"], folders, strict=True):
            found = _digest(folder)
            if found != card["adapters"].get(name):
                raise ValueError(f"{folder} is not the adapter that {directory / 'clp.json'} names")
        try:
            base = model_location(card["base_model"] if base_model is None else base_model)
        except ValueError as error:
            if base_model is not None:
                raise
            raise ValueError(
                f"{error}; {directory / 'clp.json'} names it: if it has moved, base_model "
                "(--base-model) says where it is"
            ) from error
        model, tokenizer = load_base(base, dtype)
        clp_kernels.load_adapters(model, folders)
        return cls(model.to(device), tokenizer, card["objectives"], base, card["rewards"])

    @classmethod
    def from_models(
        cls,
        models: Mapping[str, str],
        *,
        conditioning: str = "full",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> "Policy":
        """A policy whose every example mixes the parameters of m whole models.

        It has no base model, and nothing to train or to save.

        Args:
            models: What to load for each objective: "tiny", a path or a hub name.
            conditioning: "full", "attention" or "head": see clp_kernels.mix_models.

        Raises:
            ValueError: no models, one that cannot be loaded, tokenizers with different
                vocabularies, a device that is not here, or anything that clp_kernels.mix_models
                refuses.
        """
        if not isinstance(models, Mapping) or not models:
            raise ValueError(f"models must map objectives to at least one model, got {models!r}")
        device = torch_device(device)
        loaded = {name: load_base(source, dtype) for name, source in models.items()}
        first, *others = loaded
        vocabulary = loaded[first][1].get_vocab()
        for name in others:
            if differ := vocabulary.items() ^ loaded[name][1].get_vocab().items():
                raise ValueError(
                    f"models must share a tokenizer: the vocabularies of {first} and {name} "
                    f"differ, first in {min(differ)[0]!r}"
                )
        model: Any = clp_kernels.mix_models(
            [model for model, _ in loaded.values()], list(loaded), conditioning=conditioning
        )
        return cls(model.to(device), loaded[first][1], list(loaded), model_location(models[first]))

    def save(self, directory: str | Path) -> None:
        """Writes adapters/<objective>/ as PEFT folders, then clp.json, which names their digests.

        clp.json comes last and each file is replaced by a rename: a reader sees a whole policy,
        or the digests tell it that it does not.

        Raises: ValueError for a mixture of whole models: they are what there is to save.
        """
        if not steered_layers(self.model):
            raise ValueError(
                f"the experts of this policy ({', '.join(self.objectives)}) are whole models; "
                "save those, and load them with Policy.from_models"
            )
        directory = Path(directory)
        base = model_path(self.base_model)
        clp_kernels.save_adapters(self.model, directory / "adapters", base_model=base)
        card = {
            "format": 1,
            "base_model": self.base_model,
            "objectives": list(self.objectives),
            "rewards": list(self.rewards),
            "adapters": {n: _digest(directory / "adapters" / n) for n in self.objectives},
        }
        temporary = directory / ".clp.json.tmp"
        try:
            temporary.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
            temporary.replace(directory / "clp.json")
        finally:
            temporary.unlink(missing_ok=True)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        device: torch.device = self.model.device
        return device

    @property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end a completion."""
        return end_ids(self.model, self.tokenizer)

    @property
    def context_length(self) -> int:
        """Prompt and completion tokens that fit."""
        return context_length(self.model)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: token ids are below it."""
        return vocab_size(self.model)

    @property
    def drawable_ids(self) -> int:
        """Token ids that are drawn are below it: the tokenizer has them."""
        return min(vocab_size(self.model), token_count(self.tokenizer))

    @property
    def networks(self) -> list[Network]:
        """The one model that runs for every token (clp.policies.interface.Steerable)."""
        return [Network(self.model, self.steer)]

    mode = "geometric"  # unused: there is one network

    def logit_weights(self, rows: Tensor) -> None:
        """None: the weights mix parameters, not logits."""
        return None

    def cache_key(self, row: Tensor) -> bytes:
        """The row's bytes: keys and values depend on the weights (-0.0 counts as 0.0)."""
        return (row + 0.0).numpy().tobytes()

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name: every lora_A and lora_B."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def steer(self, weights: Tensor) -> clp_kernels.steer:
        """Context in which example b of a batch runs with row b of weights [B, m]."""
        return clp_kernels.steer(self.model, weights)

    @contextmanager
    def base(self) -> Iterator[None]:
        """Context in which the model is its base model, without gradients.

        Raises: ValueError for a mixture of whole models, which has none.
        """
        with torch.no_grad(), clp_kernels.steer(self.model, None):
            yield

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states [B, S, d] before the head; padding may stand on either side."""
        output = self.model.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask),
            use_cache=False,
        )
        return output.last_hidden_state  # type: ignore[no-any-return]

    def head(self) -> tuple[Tensor, Tensor | None, float]:
        """(weight [V, d], bias, temperature) with logits = (h W^T + bias) / temperature.

        V is `drawable_ids`: what the sampler draws from. A head may be padded beyond it. The
        temperature is that of models which scale their logits (Granite, Cohere); 1 elsewhere.

        Raises: ValueError where the logits are not that, such as a soft cap (Gemma 2).
        """
        layer = self.model.get_output_embeddings()
        if layer is None or isinstance(layer, SteeredLayer):
            raise ValueError(f"{self.base_model} has no frozen linear output head to train on")
        probe = torch.tensor([[0, 1, 2]], device=self.device)
        with self.base():
            hidden = self.hidden_states(probe, torch.ones_like(probe))
            plain = F.linear(hidden, layer.weight, layer.bias).float()
            actual = self.model(input_ids=probe).logits.float()
        if not actual.isfinite().all():
            raise ValueError(f"the logits of {self.base_model} are not finite: are its weights?")
        scale = float((plain * actual).sum() / (plain * plain).sum())
        error = float((actual - scale * plain).abs().max())
        if not error <= 0.02 * float(actual.abs().max()):
            raise ValueError(
                f"the logits of {self.base_model} are not a linear function of its last hidden "
                "state (a soft cap?); training needs that"
            )
        # A ratio within the rounding of the model's dtype is 1.
        temperature = 1.0 if abs(scale - 1) < 0.01 else 1 / scale
        ids = slice(self.drawable_ids)
        return layer.weight[ids], None if layer.bias is None else layer.bias[ids], temperature


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Token ids that end a completion: all that the configurations and the tokenizer name."""
    found: set[Any] = set()
    configs = (model.generation_config, model.config, model.config.get_text_config())
    for ids in (getattr(config, "eos_token_id", None) for config in configs):
        found |= set(ids) if isinstance(ids, (list, tuple)) else {ids}
    # An end token that the vocabulary lacks has the id of the unknown token.
    if tokenizer.eos_token_id != tokenizer.unk_token_id or (
        tokenizer.eos_token == tokenizer.unk_token
    ):
        found.add(tokenizer.eos_token_id)
    return frozenset(i for i in found if type(i) is int and 0 <= i < vocab_size(model))


def context_length(model: Any) -> int:
    """Tokens that this model can see.

    For LongRoPE (Phi-3's long contexts) those of its short factors: transformers takes the long
    ones for a whole batch as soon as one row of it is longer.
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
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count from 0 at the first real token of each row."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def torch_device(name: str | torch.device) -> torch.device:
    """The device: "cpu", "cuda", "cuda:1" ..., or "auto": CUDA if there is one, else the CPU.

    Raises: ValueError for a name that is none, or a device that PyTorch does not find here.
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
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if here is None or here.type != device.type:
        found = "none but the CPU" if here is None else f"the CPU and {here.type}"
        raise ValueError(
            f"device {str(device)!r} is not here: PyTorch {torch.__version__} finds {found}"
        )
    count = torch.accelerator.device_count()
    if device.index is not None and device.index >= count:
        raise ValueError(f"device {str(device)!r} is not here: there are {count}, counted from 0")
    return device


def model_path(name: str) -> str:
    """What transformers and PEFT load: the name itself (a path or hub name), or "tiny"'s folder."""
    return str(TINY) if name == "tiny" else name


class loading:
    """Context in which what transformers raises on a bad folder is a ValueError with `problem`.

    A class, because the library tokenizers raises Exception itself, which an except clause cannot
    tell from everything else.
    """

    def __init__(self, problem: str) -> None:
        self.problem = problem

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
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
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        model, report = loaded
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    # transformers drops what it does not know, and takes the numbers as they are stored.
    if getattr(config, "quantization_config", None) and not getattr(model, "hf_quantizer", None):
        method = config.quantization_config.get("quant_method")
        raise ValueError(f"model {name!r} is quantised by {method!r}, which transformers lacks")
    # transformers makes an empty tokenizer where the files are missing.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"model {name!r} comes without its tokenizer")
    if report["missing_keys"]:
        raise ValueError(f"model {name!r} lacks weights: {sorted(report['missing_keys'])[:5]}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    model.requires_grad_(False)
    return model.eval(), tokenizer


def read_card(directory: Path) -> dict[str, Any]:
    """clp.json of a folder written by Policy.save. Raises: ValueError where it is malformed."""
    path = directory / "clp.json"
    try:
        card = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        unfinished = any(directory.glob("checkpoint-*/clp.json"))
        hint = "; the training has not ended: name one of its checkpoints" if unfinished else ""
        raise ValueError(f"{directory} holds no policy: {path} is missing{hint}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    want = {"base_model": str, "objectives": list, "rewards": list, "adapters": dict}
    if not isinstance(card, dict) or card.get("format") != 1:
        raise ValueError(f"{path} must be an object with format 1")
    for key, kind in want.items():
        if not isinstance(card.get(key), kind):
            raise ValueError(f"{path}: {key} must be a {kind.__name__}, got {card.get(key)!r}")
    if not all(isinstance(spec, str) for spec in card["rewards"]):
        raise ValueError(f"{path}: rewards must be a list of texts, got {card['rewards']!r}")
    names = card["objectives"]
    good = all(isinstance(n, str) and n.isidentifier() for n in names)
    if not names or not good or len(set(names)) != len(names):
        raise ValueError(
            f"{path}: objectives must be a list of names, all different, got {names!r}"
        )
    return card


def _digest(folder: Path) -> str:
    """SHA-256 over the two files of an adapter folder."""
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        path = folder / name
        if not path.is_file():
            raise ValueError(f"adapter {folder} lacks {name}")
        digest.update(path.read_bytes())
    return digest.hexdigest()
