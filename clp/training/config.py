"""CLPConfig: every setting of a training run; YAML and command line; unknown keys are errors."""

import os
import re
import sys
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from clp.data.kl_range import KLRange
from clp.data.names import closest
from clp.data.paths import absolute, home_expanded, model_location, reward_locations

# What clp_kernels.load_adapters reads: a larger adapter could be trained, but not loaded.
LARGEST_R, LARGEST_LORA_ALPHA = 4096, 1_000_000
# What the sampler takes.
LARGEST_BATCH = 2**20
# Settings that a conditioning has no use for.
_UNUSED = {
    "full": ("r", "lora_alpha"),
    "attention": ("r", "lora_alpha", "target_modules"),
    # No gradient passes the layers that would recompute.
    "head": (
        "r",
        "lora_alpha",
        "target_modules",
        "exclude_modules",
        "gradient_checkpointing",
    ),
}


@dataclass
class CLPConfig:
    """Settings of `clp train`. The docstring under a field is its help on the command line."""

    model: str = "tiny"
    """Base model: "tiny" (the embedded one), or a path or hub name of a transformers causal LM."""
    rewards: list[str] = field(default_factory=lambda: ["joy=sentiment", "brief=brevity"])
    """One per objective: a built-in reward, `objective=built-in`, or
    `objective=classifier:PATH#label`."""
    prompts: str | None = None
    """JSONL of training prompts ({"prompt": ..., columns for rewards}); default: the embedded
    story openings."""
    eval_prompts: str | None = None
    """JSONL of held-out prompts for `clp eval`; default: the embedded held-out story openings."""
    max_prompt_length: int | None = None
    """Leave out prompts of more tokens than this, and say how many. By default a prompt that does
    not fit the model's context together with max_completion_length is an error."""
    output_dir: str = "runs/train"
    """Folder of this run; one that holds another run is refused."""
    resume: bool = False
    """Continue the run in output_dir from its last complete checkpoint, with the settings in its
    config.yaml. A larger max_steps trains on; from there the learning rate is what it would be at
    that step of a run of so many steps."""

    # Parameters that control what the weights change
    conditioning: Literal["lora", "full", "attention", "head", "prompt"] = "lora"
    """What the weights of an example mix: "lora", one adapter per objective; "full", one difference
    from the base model's parameters per objective (embeddings and norms included); "attention",
    that of the linear layers of attention alone; "head", that of the output head alone. "prompt":
    the weights stand in the prompt, and one adapter serves all of them."""
    r: int = 8
    """LoRA rank of each objective's adapter, at most 4096."""
    lora_alpha: float = 16.0
    """LoRA alpha, at most 1,000,000; the update is scaled by lora_alpha / r."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Modules that carry adapters: "all-linear", or names as in PEFT. With conditioning "full": the
    modules whose parameters are mixed; "all-linear" then means all of them."""
    exclude_modules: list[str] = field(default_factory=list)
    """Names of target modules that carry none, such as routers."""

    # Parameters that control the weights and the objective
    alpha: float = 0.12
    """KL strength in [0, 1): the objective is E[(1 - alpha) w.R - alpha KL(pi || pi_ref)], KL
    summed over the tokens of a completion, in nats."""
    kl_range: list[float] | None = None
    """LOW HIGH: draws alpha log-uniformly from [LOW, HIGH] for each prompt group, in place of
    alpha, so that the policy can be steered by it too (--kl of `clp sample` and `clp eval`)."""
    kl_gradient: Literal["exact", "tokens", "sequence"] = "exact"
    """How the gradient of KL is estimated, without bias: "exact", from the whole distribution of
    each next token; "tokens" and "sequence", from the log-ratios of the sampled tokens alone, to
    come and in all, as methods without the distributions do. These vary more: use them to compare
    with such methods."""
    baseline: Literal["leave-one-out", "value"] = "leave-one-out"
    """What the return of a completion is compared with: "leave-one-out", the mean of the others of
    its prompt group; "value", what a value head expects of the prompt, the tokens so far and the
    weights, as in the paper. Both leave the gradient unbiased. Use "value" where a second
    completion of a prompt costs much: num_generations may then be 1, and each prompt of a batch may
    be another one. It has to be learned first, and leaves more variance where it is not yet."""
    weight_draws: Literal["dirichlet", "faces", "grid", "function"] = "dirichlet"
    """Where each prompt group's weights come from: "dirichlet", see the next two options; "faces",
    a corner of the simplex (50 %), an edge (35 %) or all of it (15 %), made for three objectives or
    more; "grid", the weights that `clp eval` sweeps; "function", one given to CLPTrainer."""
    dirichlet: float = 1.0
    """Concentration of the Dirichlet; 1: uniform, smaller: nearer to the corners."""
    corner_probability: float = 0.2
    """Probability that a group trains a single objective (a corner of the simplex) instead."""
    scale_rewards: Literal["reference", "none", "batch", "group"] = "reference"
    """What each objective's rewards are divided by before they are weighted: "reference", their
    standard deviation under the base model, measured on 512 completions before the first step.
    "none": nothing. With both the objective is the one under alpha, in these units. "batch" and
    "group", their standard deviation over the step's batch or over the prompt group, change the
    objective during the training: where the policy narrows, rewards grow and KL counts less."""

    # Parameters that control generation
    num_prompts: int = 24
    """Prompt groups per step; each group has one prompt and its own weights."""
    num_generations: int = 4
    """Completions per group. At least 2, the others being the baseline of each (leave-one-out); 1
    is enough with baseline="value"."""
    max_completion_length: int = 48
    """Tokens per completion, at most."""
    temperature: float = 1.0
    """Sampling temperature, and that of the trained policy's log-probabilities."""

    # Parameters that control optimisation
    max_steps: int = 150
    """Optimiser steps. One whose gradient is not finite changes nothing but counts."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW; default: 2e-3, and 1e-3 with conditioning "full"."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    """Decay of the learning rate to zero at max_steps after the warm-up."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm, those of a value head apart from the policy's."""
    num_iterations: int = 1
    """Updates per step with the same completions. From the second on, the policy is not the one
    that was sampled, and the loss is PPO's, clipped with epsilon: it is not unbiased. Use 2 to 4
    where sampling or rewards cost much more than an update, with fewer steps."""
    epsilon: float = 0.2
    """From the second update on, a token counts no further once its probability has become 1 +
    epsilon or 1 - epsilon times what it was, in the direction of its advantage."""
    micro_batch_size: int = 128
    """Completions in one forward and backward; gradients accumulate over a step's completions."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the base model; the adapters are float32."""
    device: str = "auto"
    """ "auto" (CUDA if there is one), "cpu", "cuda", "cuda:1", ..."""

    # Parameters that control saving
    save_steps: int = 50
    """Steps between checkpoints."""
    save_total_limit: int = 2
    """Checkpoints kept; older ones are deleted."""
    seed: int = 0
    """Seed of adapters, prompt order, weights and sampling: an integer from 0 on, of any size."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = _plain(getattr(self, item.name))
            _check_type(item.name, value, _HINTS[item.name])
            setattr(self, item.name, value)
            if item.type in (float, float | None) and value is not None:
                setattr(self, item.name, _as_float(item.name, getattr(self, item.name)))
        values = vars(self)
        fewest = 1 if self.baseline == "value" else 2
        at_least = {"r": 1, "num_prompts": 1, "num_generations": fewest, "max_completion_length": 1,
                    "max_steps": 1, "warmup_steps": 0, "micro_batch_size": 1, "save_steps": 1,
                    "save_total_limit": 1, "seed": 0, "num_iterations": 1}  # fmt: skip
        if self.max_prompt_length is not None:
            at_least["max_prompt_length"] = 1
        for name, low in at_least.items():
            if values[name] < low:
                hint = ""
                if name == "num_generations" and values[name] == 1:
                    hint = ', or 1 with baseline="value"'
                raise ValueError(f"{name} must be at least {low}{hint}, got {values[name]}")
        for name in ("num_prompts", "num_generations", "micro_batch_size"):
            if values[name] > LARGEST_BATCH:
                raise ValueError(f"{name} must be at most {LARGEST_BATCH}, got {values[name]}")
        for name, high in (("r", LARGEST_R), ("lora_alpha", LARGEST_LORA_ALPHA)):
            if values[name] > high:
                raise ValueError(
                    f"{name} must be at most {high}, got {values[name]:g}: what is larger "
                    "cannot be loaded again"
                )
        positive = ["lora_alpha", "dirichlet", "temperature", "max_grad_norm"]
        for name in positive if self.learning_rate is None else [*positive, "learning_rate"]:
            if not 0 < values[name] < float("inf"):
                raise ValueError(f"{name} must be finite and positive, got {values[name]}")
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha must be in [0, 1), got {self.alpha}")
        if self.kl_range is not None:
            self.kl_range = list(KLRange.parse(self.kl_range))
            if self.alpha != type(self).alpha:
                raise ValueError(
                    f"alpha must be left out with kl_range, which replaces it, got {self.alpha}"
                )
        if not 0 <= self.corner_probability <= 1:
            raise ValueError(f"corner_probability must be in [0, 1], got {self.corner_probability}")
        for name in _UNUSED.get(self.conditioning, ()):
            item = type(self).__dataclass_fields__[name]
            default = item.default if item.default_factory is MISSING else item.default_factory()
            if values[name] != default:
                raise ValueError(
                    f"{name} must be left out with conditioning={self.conditioning!r}, which does "
                    f"not use it, got {values[name]}"
                )
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon must be in (0, 1), got {self.epsilon}")
        if self.num_iterations == 1 and self.epsilon != type(self).epsilon:
            raise ValueError(
                "epsilon must be left out with num_iterations=1, which clips nothing, got "
                f"{self.epsilon}"
            )
        if self.num_generations == 1 and self.scale_rewards == "group":
            raise ValueError(
                "scale_rewards='group' needs num_generations of at least 2: one completion has no "
                "standard deviation"
            )
        for name in ("dirichlet", "corner_probability"):
            if self.weight_draws != "dirichlet" and values[name] != getattr(type(self), name):
                raise ValueError(
                    f"{name} must be left out with weight_draws={self.weight_draws!r}, which does "
                    f"not use it, got {values[name]}"
                )
        # Less would divide the logits to infinity in float32, and more the sampler refuses.
        if not 1e-6 <= self.temperature <= 1e6:
            raise ValueError(f"temperature must be in [1e-06, 1e+06], got {self.temperature:g}")
        # Their product is a float32 in the optimizer.
        for name, most in (("learning_rate", 1e30), ("weight_decay", 1e6)):
            if (values[name] or 0) > most:
                raise ValueError(f"{name} must be at most {most:g}, got {values[name]:g}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")

    @property
    def peak_learning_rate(self) -> float:
        """learning_rate, or the conditioning's own."""
        own = 1e-3 if self.conditioning == "full" else 2e-3
        return own if self.learning_rate is None else self.learning_rate

    @classmethod
    def of_run(cls, output_dir: str | Path, **changes: Any) -> "CLPConfig":
        """The configuration that continues the run in output_dir: its config.yaml with resume=True.

        Args:
            output_dir: The run's folder.
            **changes: Settings that are to differ. CLPTrainer says which may.

        Raises:
            ValueError: no readable config.yaml there, or a change that CLPConfig refuses.
        """
        path = Path(output_dir) / "config.yaml"
        own = {"output_dir": str(output_dir), "resume": True}
        return config_from(asdict(load_config(path)) | own | changes)

    def to_yaml(self) -> str:
        """The configuration as YAML, in the order of the fields."""
        return yaml.dump(asdict(self), Dumper=_Dumper, sort_keys=False)


_HINTS = typing.get_type_hints(CLPConfig)


def load_config(path: str | Path) -> CLPConfig:
    """Reads a YAML file with keys of CLPConfig.

    Raises:
        ValueError: the file is missing or not YAML, an unknown key (with the closest match), or a
            value of the wrong type or range.
    """
    return config_from(read_yaml(path), source=str(path))


def run_config(folder: Path) -> CLPConfig:
    """The settings of the training that made the policy in a folder: a run, a checkpoint or a copy
    of one; the defaults, with a line on standard error, if it has none.

    The settings of the run come before those that a checkpoint of it has, whose run may have been
    continued with others. A checkpoint that was copied into another run has its own.

    Raises: ValueError as load_config.
    """
    parent = folder.resolve().parent
    places = [folder / "config.yaml", folder / "training.yaml"]
    if (parent / "run.json").is_file():
        places.append(parent / "config.yaml")
    found = [load_config(path) for path in places if path.is_file()]
    if found:
        same_run = found[-1].output_dir == found[0].output_dir
        return found[-1] if same_run and not places[0].is_file() else found[0]
    used = CLPConfig()
    print(
        f"{folder} has no settings of a training (config.yaml or training.yaml): dtype "
        f"{used.dtype}, {used.max_completion_length} tokens per completion",
        file=sys.stderr,
    )
    return used


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, with values as they stand there.

    Raises: ValueError: the file is missing or not YAML, has a key twice, or holds no mapping.
    """
    try:
        # A subclass of SafeLoader: no tag can name code.
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except RecursionError:
        raise ValueError(f"config file {path} is nested too deeply") from None
    except (OSError, ValueError, LookupError, AttributeError, yaml.YAMLError) as error:
        # The two in the middle are PyYAML's for a tag that does not fit, as in "!!bool maybe".
        raise ValueError(f"config file {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config file {path} must hold a mapping, got {type(values).__name__}")
    return values


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are those of version 1.2, and whose keys differ.

    1e-3 is a number, 0100 is a hundred, and 1:30 and 2026-11-30 are texts.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        # What holds itself is then an error of PyYAML's.
        return super().construct_object(node, deep=True)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


class _Dumper(yaml.SafeDumper):
    """Quotes texts that are numbers in YAML 1.1, which others read, or 1.2."""


_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "tag:yaml.org,2002:float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}  # in this order: an integer fits the second too
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag not in (*_NUMBERS, _TIMESTAMP)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _form in _NUMBERS.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(_tag, re.compile(f"^({_form})$"), list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def config_from(values: dict[str, Any], source: str = "config") -> CLPConfig:
    """A CLPConfig from a mapping; unknown keys are errors with the closest match."""
    for key in values:
        if key not in _HINTS:
            raise ValueError(f"{source}: unknown key {key!r}{closest(str(key), _HINTS)}")
    return CLPConfig(**values)


def _plain(value: Any) -> Any:
    """A number of numpy's, a path or a tuple as YAML writes it."""
    if getattr(value, "ndim", None) == 0:
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _check_type(name: str, value: Any, hint: Any) -> None:
    origin = typing.get_origin(hint)
    if origin is Literal:
        if value not in typing.get_args(hint):
            known = typing.get_args(hint)
            options, close = ", ".join(map(repr, known)), closest(str(value), known)
            raise ValueError(f"{name} must be one of {options}, got {value!r}{close}")
    elif hint == list[float] | None:
        pass  # KLRange.parse checks it
    elif origin is list:
        may_be_empty = name == "exclude_modules"
        texts = isinstance(value, list) and all(isinstance(v, str) for v in value)
        if not texts or not (value or may_be_empty):
            expected = "list" if may_be_empty else "non-empty list"
            raise ValueError(f"{name} must be a {expected} of strings, got {value!r}")
    elif hint in (float, float | None):
        if hint is not float and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
            raise ValueError(f"{name} must be a number, got {value!r}")
    elif hint is int or hint is bool:
        if type(value) is not hint:
            raise ValueError(f"{name} must be {hint.__name__}, got {value!r}")
    elif isinstance(value, bool) or not isinstance(value, hint):
        shown = hint.__name__ if isinstance(hint, type) else hint
        raise ValueError(f"{name} must be {shown}, got {value!r}")


def _as_float(name: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number in the range of a float") from None


def located(config: CLPConfig) -> CLPConfig:
    """The configuration with whatever it names as it is found from any folder, and its learning
    rate as a number.

    Raises: ValueError as model_location.
    """
    try:
        model = model_location(config.model)
    except ValueError as error:
        if not config.resume:
            raise
        raise ValueError(
            f"{error}; if the run's base model has moved, model (--model) says where it is"
        ) from error
    return replace(
        config,
        model=model,
        rewards=reward_locations(config.rewards),
        prompts=None if config.prompts is None else absolute(config.prompts),
        eval_prompts=None if config.eval_prompts is None else absolute(config.eval_prompts),
        output_dir=str(home_expanded(config.output_dir)),
        learning_rate=config.peak_learning_rate,
    )
