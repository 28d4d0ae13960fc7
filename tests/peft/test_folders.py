"""PEFT folders: PEFT's numbers, refusals that leave the model alone, writes that are whole."""

import argparse
import contextlib
import copy
import errno
import json
import math
import os
import resource
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_models import logits_of, plain_logits, small_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from clp_kernels import export_adapter, inject, load_adapters, save_adapters, steer
from clp_kernels.nn.inject import replace_linears
from clp_kernels.nn.mixed_lora import steered_layers
from clp_kernels.peft.write import _FUSED, _fused_names

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
CONV = "base_model.model.conv"
TOKENS = torch.randint(64, (4, 7), generator=torch.Generator().manual_seed(0))


def seeded(model_type: str, **options: Any) -> nn.Module:
    """The same parameters at every call."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return small_model(model_type, **{**sizes, **heads, **options})


llama, gpt2 = partial(seeded, "llama"), partial(seeded, "gpt2")
# As OPT-350m: norms behind the blocks, and a narrower embedding.
opt = partial(seeded, "opt", ffn_dim=48, do_layer_norm_before=False, init_std=0.02)
qwen2_moe = partial(
    seeded, "qwen2_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
    shared_expert_intermediate_size=24,
)  # fmt: skip


class Net(nn.Module):
    """Both kinds of layer, and names that are endings of others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 6)
        self.conv = Conv1D(6, 6)
        self.block = nn.ModuleDict({"fc": nn.Linear(6, 6), "emb": nn.Embedding(3, 6)})

    def forward(self, x: Tensor) -> Tensor:
        return self.block["fc"](self.conv(self.fc(x)).tanh())


def randomise(model: nn.Module, seed: int) -> None:
    """Adapters as after training: neither factor zero, the padding untouched."""
    generator = torch.Generator().manual_seed(seed)
    for layer in steered_layers(model).values():
        for i, r in enumerate(layer.ranks):
            layer.lora_A.data[i, :r].normal_(generator=generator).mul_(0.3)
            layer.lora_B.data[i, :, :r].normal_(generator=generator).mul_(0.3)


def peft_folder(base: nn.Module, folder: Path, seed: int = 0, **fields: Any) -> Path:
    """An adapter that PEFT made and saved."""
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(generator=generator).mul_(0.3)
    model.save_pretrained(folder)
    return folder


def peft_loaded(base: nn.Module, folder: Path, quiet: bool = True) -> nn.Module:
    """What PEFT makes of a folder; any of its warnings fails the test unless quiet is False."""
    with warnings.catch_warnings():
        warnings.simplefilter("error" if quiet else "ignore", UserWarning)
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def logits(model: nn.Module, rows: Any = None) -> Tensor:
    return plain_logits(model, TOKENS) if rows is None else logits_of(model, TOKENS, rows)


@contextlib.contextmanager
def scaled(model: nn.Module, weights: dict[str, float]) -> Iterator[None]:
    """Multiplies PEFT's scaling of each adapter by its weight."""
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    originals = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling.update({k: v * weights.get(k, 1.0) for k, v in layer.scaling.items()})
    yield
    for layer, original in zip(layers, originals, strict=True):
        layer.scaling.update(original)


def one_hot(m: int, i: int) -> list[list[float]]:
    return [[float(j == i) for j in range(m)]] * len(TOKENS)


def same_bits(left: nn.Module, right: nn.Module) -> None:
    pairs = zip(steered_layers(left).items(), steered_layers(right).items(), strict=True)
    for (name, ours), (other, theirs) in pairs:
        assert name == other and ours.adapter_names == theirs.adapter_names
        assert ours.ranks == theirs.ranks and ours.lora_alpha == theirs.lora_alpha
        assert torch.equal(ours.lora_A, theirs.lora_A) and torch.equal(ours.lora_B, theirs.lora_B)
        assert torch.equal(ours.scaling, theirs.scaling)


# --- the same numbers as PEFT ---


def lora(r: int, lora_alpha: float, target_modules: Any, **fields: Any) -> dict[str, Any]:
    return {"r": r, "lora_alpha": lora_alpha, "target_modules": target_modules, **fields}


KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]] = {
    "llama": (llama, lora(4, 8, ["q_proj", "v_proj"]), lora(3, 16, "all-linear")),
    "gpt2": (
        gpt2,
        lora(2, 4, ["c_attn"], fan_in_fan_out=True),
        lora(5, 7, ["c_fc", "c_proj"], fan_in_fan_out=True),
    ),
    "opt": (opt, lora(4, 8, ["fc1", "fc2"]), lora(3, 16, "all-linear")),
    "qwen2_moe": (
        qwen2_moe,
        lora(4, 8, ["shared_expert.up_proj", "q_proj"]),
        lora(3, 16, "all-linear"),
    ),
    "rslora": (llama, lora(8, 5, ["o_proj", "up_proj"], use_rslora=True), lora(2, 3, ["up_proj"])),
    "patterns": (
        llama,
        lora(
            4,
            8,
            ["q_proj", "gate_proj", "down_proj"],
            rank_pattern={"gate_proj": 2, "layers.1.self_attn.q_proj": 6},
            alpha_pattern={"^model.layers.0.mlp.down_proj": 3, "down_proj": 5, "gate_proj": 1},
        ),
        lora(
            3,
            2,
            "all-linear",
            use_rslora=True,
            exclude_modules=["k_proj", "model.layers.0.mlp.up_proj"],
            rank_pattern={"1.mlp.down_proj": 7},
        ),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_pefts_cat(kind: str, tmp_path: Path) -> None:
    make, first, second = KINDS[kind]
    base = make()
    a = peft_folder(base, tmp_path / "a", 1, **first)
    b = peft_folder(base, tmp_path / "b", 2, **second)
    model = copy.deepcopy(base)
    replaced = load_adapters(model, [a, b])
    assert replaced == list(steered_layers(model))
    rows = [[0.3, 0.7], [-1.5, 0.5], [0.0, 2.0], [0.0, 0.0]]
    mixed = logits(model, rows)

    both = peft.PeftModel.from_pretrained(copy.deepcopy(base), a, adapter_name="a").eval()
    both.load_adapter(b, "b")
    for i, row in enumerate(rows):
        if kind in ("llama", "gpt2", "opt", "qwen2_moe"):
            both.add_weighted_adapter(["a", "b"], row, f"mix{i}", combination_type="cat")
            both.set_adapter(f"mix{i}")
            torch.testing.assert_close(mixed[i], logits(both)[i], rtol=0, atol=1e-4)
        # PEFT 0.21.2's "cat" is sqrt(R) too large after rslora, and fails on excluded modules;
        # the adapters active side by side are right.
        both.base_model.set_adapter(["a", "b"])
        with scaled(both, dict(zip("ab", row, strict=True))):
            torch.testing.assert_close(mixed[i], logits(both)[i], rtol=0, atol=1e-4)
    assert (mixed[0] - logits(base)[0]).abs().max() > 1e-2
    assert torch.equal(logits(model, [[0.0, 0.0]] * 4), logits(base))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_folders_load_in_peft_and_here(kind: str, tmp_path: Path) -> None:
    make, *configs = KINDS[kind]
    base = make()
    made = [peft_folder(base, tmp_path / n, **c) for n, c in zip("ab", configs, strict=True)]
    model = copy.deepcopy(base)
    load_adapters(model, made, names=["joy", "brief"])
    folders = save_adapters(model, tmp_path / "saved", base_model="the/base")
    assert folders == [tmp_path / "saved" / "joy", tmp_path / "saved" / "brief"]
    assert sorted(os.listdir(tmp_path / "saved")) == ["brief", "joy"]

    again = copy.deepcopy(base)
    load_adapters(again, folders)
    same_bits(model, again)
    for i, folder in enumerate(folders):
        assert sorted(os.listdir(folder)) == [CONFIG, TENSORS]
        assert json.loads((folder / CONFIG).read_text())["base_model_name_or_path"] == "the/base"
        theirs = load_file(made[i] / TENSORS)
        ours = load_file(folder / TENSORS)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        loaded = peft_loaded(base, folder)
        expected = logits(model, one_hot(2, i))
        torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)


def test_injected_adapters_load_in_peft(tmp_path: Path) -> None:
    base, model = llama(), llama()
    inject(model, ["joy", "brief", "safe"], r=4, lora_alpha=8)
    randomise(model, 1)
    folders = save_adapters(model, tmp_path)
    config = json.loads((folders[0] / CONFIG).read_text())
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == names
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8, "CAUSAL_LM")
    for i, folder in enumerate(folders):
        expected = logits(model, one_hot(3, i))
        assert torch.allclose(logits(peft_loaded(base, folder)), expected, rtol=0, atol=1e-5)


LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
          "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}  # fmt: skip
FUSED: dict[str, dict[str, Any]] = {
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "deepseek_v2": {**LATENT, **ROUTED},
    "deepseek_v3": {**LATENT, **ROUTED},
    "glm4_moe": {**ROUTED, "head_dim": 8},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                  "mlp_only_layers": [0], "head_dim": 8},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                  "shared_expert_intermediate_size": 24},
}  # fmt: skip


def fused(kind: str) -> nn.Module:
    """A model with experts in fused parameters, and dense or shared layers of the same names."""
    model = seeded(kind, **FUSED[kind])
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("kind", FUSED)
def test_layers_beside_fused_experts_load_in_peft(kind: str, tmp_path: Path) -> None:
    """In float64: in float32 these random models make up to 1e-4 of a difference in rounding."""
    base, model = fused(kind).double(), fused(kind).double()
    replaced = inject(model, ["joy", "brief"], r=2)
    assert any(name.endswith("_proj") and ".mlp." in name for name in replaced)
    randomise(model, 1)
    folders = save_adapters(model, tmp_path / "saved")
    export = export_adapter(model, [0.4, 0.6], tmp_path / "export")
    cases = [(folders[0], [1.0, 0.0]), (folders[1], [0.0, 1.0]), (export, [0.4, 0.6])]
    for folder, row in cases:
        expected = logits(model, [row] * 4)
        assert (expected - logits(base)).abs().max() > 1e-2
        in_peft = peft_loaded(base, folder).double()
        torch.testing.assert_close(logits(in_peft), expected, rtol=0, atol=1e-10)
        again = fused(kind).double()
        assert load_adapters(again, [folder]) == replaced
        torch.testing.assert_close(logits(again, [[1.0]] * 4), expected, rtol=0, atol=1e-10)
    again = fused(kind).double()
    load_adapters(again, folders)
    same_bits(model, again)


# PEFT says that of each pattern of a parameter, also of one that it has used.
unmatched = pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")


@unmatched
def test_patterns_of_layers_beside_fused_experts(tmp_path: Path) -> None:
    """Of other ranks and alphas than the rest, and without any other layer."""
    base, model = fused("ernie4_5_moe"), fused("ernie4_5_moe")
    names = [n for n, m in base.named_modules() if n.endswith(("mlp.up_proj", "experts.down_proj"))]
    ranks = {name: [i + 1] for i, name in enumerate(names)}
    layers = replace_linears(model, ["joy"], ranks, {n: [5.0 / r[0]] for n, r in ranks.items()},
                             torch.float32)  # fmt: skip
    assert len(layers) == 2
    randomise(model, 1)
    (folder,) = save_adapters(model, tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    assert config["target_modules"] == []
    assert config["target_parameters"] == sorted(f"{name}.weight" for name in names)
    expected = logits(model, [[1.0]] * 4)
    torch.testing.assert_close(logits(peft_loaded(base, folder)), expected, rtol=0, atol=1e-5)
    again = fused("ernie4_5_moe")
    load_adapters(again, [folder])
    same_bits(model, again)


def test_pefts_names_of_fused_experts() -> None:
    """_FUSED and what is read from transformers are what PEFT goes by."""
    conversion = peft.utils.transformers_weight_conversion
    mapping = conversion._MOE_TARGET_MODULE_MAPPING
    assert {k: set(v) for k, v in mapping.items()} == {k: set(v) for k, v in _FUSED.items()}
    for model_type, kind in conversion._MODEL_TO_CONVERSION_PATTERN.items():
        model = nn.Module()
        model.config = argparse.Namespace(model_type=model_type)
        assert set(_fused_names(model)) == set(mapping.get(kind, ()))


@pytest.mark.parametrize(
    "targets, parameters, message",
    [
        (["q_proj"], ["gate_up_proj"], "names of weights of linear layers"),
        (["q_proj"], ["mlp.gate.weight"], r"others are not implemented\), got .*mlp.gate.weight"),
        (["q_proj"], ["absent.weight"], r"got \['absent.weight'\]"),
        (["q_proj"], "o_proj.weight", "got 'o_proj.weight'"),
        (["q_proj"], ["q_proj.weight"], "other layers than target_modules, which has '.*q_proj'"),
        ([], [], r"target_modules must be .*, got \[\]"),
    ],
)
def test_other_parameters_are_refused(
    targets: list[str], parameters: Any, message: str, tmp_path: Path
) -> None:
    model = fused("ernie4_5_moe")
    folder = peft_folder(model, tmp_path / "a", r=2, target_modules=["q_proj"])
    fields(target_modules=targets, target_parameters=parameters)(folder)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        load_adapters(model, [folder])
    assert_untouched(model, before)


@unmatched
def test_an_adapter_of_weights_that_peft_has_made(tmp_path: Path) -> None:
    """With patterns, which PEFT matches to the names of the parameters; beside a regex too."""
    base = llama()
    weights = ["0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"]
    patterns = {"rank_pattern": {"mlp.up_proj.weight": 2}, "alpha_pattern": {"weight": 5}}
    chosen = {"target_parameters": weights, **patterns}
    for i, targets in enumerate((["q_proj"], [], r".*\.q_proj")):
        folder = peft_folder(base, tmp_path / str(i), r=4, target_modules=targets, **chosen)
        model = llama()
        assert len(load_adapters(model, [folder])) == (2 if targets == [] else 4)
        expected = logits(peft_loaded(base, folder))
        torch.testing.assert_close(logits(model, [[1.0]] * 4), expected, rtol=0, atol=1e-5)


def test_mixed_layer_kinds_and_names_that_end_others(tmp_path: Path) -> None:
    """Conv1D beside Linear, "fc" without "block.fc", and different alphas for the two."""
    base, x = Net(), torch.randn(2, 6)
    first = {"r": 2, "target_modules": ["fc", "conv"], "exclude_modules": ["block.fc"]}
    second = {"r": 3, "target_modules": ["fc", "conv"], "alpha_pattern": {"^fc": 4}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of the second layer kind
        made = [
            peft_folder(base, tmp_path / n, 3, **c)
            for n, c in zip("ab", [first, second], strict=True)
        ]
    model = copy.deepcopy(base)
    assert load_adapters(model, made) == ["fc", "conv", "block.fc"]
    folders = save_adapters(model, tmp_path / "saved")
    again = copy.deepcopy(base)
    load_adapters(again, folders)
    same_bits(model, again)
    for i, folder in enumerate(folders):
        with torch.no_grad(), steer(model, one_hot(2, i)[:2]):
            torch.testing.assert_close(peft_loaded(base, folder, quiet=False)(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_cast_on_load_and_kept_on_save(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = peft_folder(Net(), tmp_path / "a", r=2, target_modules=["fc"])
    narrow = {key: value.to(dtype) for key, value in load_file(folder / TENSORS).items()}
    save_file(narrow, folder / TENSORS)
    model = Net()
    load_adapters(model, [folder])
    layer = steered_layers(model)["fc"]
    assert layer.lora_A.dtype == torch.float32
    assert torch.equal(layer.lora_A[0], narrow["base_model.model.fc.lora_A.weight"].float())

    model = Net().to(dtype)
    load_adapters(model, [folder], dtype=dtype if dtype != torch.float64 else torch.float32)
    (saved,) = save_adapters(model, tmp_path / "saved")
    stored = load_file(saved / TENSORS)
    assert all(torch.equal(stored[key], narrow[key]) for key in narrow)


def test_names_inside_wrappers_are_the_models_own(tmp_path: Path) -> None:
    model = Net()
    inject(model, ["a"], r=2)
    randomise(model, 0)
    save_adapters(model, tmp_path / "plain")
    model.block = torch.compile(model.block)
    save_adapters(torch.compile(nn.DataParallel(model)), tmp_path / "wrapped")
    for file in (CONFIG, TENSORS):
        plain, wrapped = (tmp_path / kind / "a" / file for kind in ("plain", "wrapped"))
        assert plain.read_bytes() == wrapped.read_bytes()


CHOSEN: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "a regex": (llama, {"target_modules": r".*\.(q|v)_proj"}),
    "a regex of one layer": (llama, {"target_modules": r"model\.layers\.1\..*(up|down)_proj"}),
    "regexes of ranks": (
        llama,
        {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
         "rank_pattern": {r"^model\.layers\.1\.self_attn\.v_proj": 6, "up_proj$": 2,
                          r"layers\.[07]\.self_attn\.q_proj": 7, "q_proj": 3},
         "alpha_pattern": {"1.self_attn.v_proj": 5, "0.mlp.up_proj": 3}},
    ),
    "regexes of ranks, rslora": (
        gpt2,
        {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {r"[h]\.(0|7)\..*": 6, "c_attn": 2},
         "alpha_pattern": {"1.attn.c_attn": 5}, "use_rslora": True, "fan_in_fan_out": True},
    ),
    "one name": (llama, {"target_modules": "model.layers.1.self_attn.o_proj"}),
    "an excluded regex": (
        llama,
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.layers\.0\.mlp.*"},
    ),
    "one layer": (llama, {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1}),
    "layers of a list": (
        gpt2,
        {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h",
         "fan_in_fan_out": True},
    ),
    "layers of two lists": (
        llama,
        {"target_modules": ["q_proj"], "layers_to_transform": [0],
         "layers_pattern": ["h", "layers"]},
    ),
    "layers and a full name": (
        llama,
        {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1]},
    ),
    "all but a regex, rslora": (
        llama,
        {"target_modules": "all-linear", "exclude_modules": r".*\.(k|v)_proj", "use_rslora": True,
         "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"q_proj": 3}},
    ),
    "a list of one name": (
        gpt2,
        {"target_modules": ["h.1.mlp.c_fc"], "fan_in_fan_out": True, "init_lora_weights": False},
    ),
    "a tuple of layers": (
        llama,
        {"target_modules": ["down_proj"], "layers_to_transform": (1,),
         "layers_pattern": "layers"},
    ),
    "layers and experts": (
        qwen2_moe, {"target_modules": ["up_proj", "k_proj"], "layers_to_transform": [1]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHOSEN)
def test_modules_chosen_in_pefts_other_ways(kind: str, tmp_path: Path) -> None:
    """Regexes and layer numbers, as PEFT writes them: the same modules and logits here.

    PEFT sorts the keys of patterns when it writes them, and the first one that matches counts.
    """
    make, chosen = CHOSEN[kind]
    base = make()
    folder = peft_folder(base, tmp_path / "a", 1, r=4, lora_alpha=8, **chosen)
    model = copy.deepcopy(base)
    replaced = load_adapters(model, [folder])
    keys = load_file(folder / TENSORS)
    assert {f"base_model.model.{n}.lora_{x}.weight" for n in replaced for x in "AB"} == set(keys)
    expected = logits(peft_loaded(base, folder))
    torch.testing.assert_close(logits(model, [[1.0]] * 4), expected, rtol=0, atol=1e-5)
    assert (expected - logits(base)).abs().max() > 1e-3
    (saved,) = save_adapters(model, tmp_path / "saved")
    torch.testing.assert_close(logits(peft_loaded(base, saved)), expected, rtol=0, atol=1e-5)


def test_a_regex_is_not_run(tmp_path: Path) -> None:
    """This one would take 2^40 steps for this name."""
    name = "a" * 40 + "b"
    model = nn.ModuleDict({name: nn.Linear(6, 6)})
    folder = peft_folder(model, tmp_path / "a", target_modules=[name], r=2)
    pattern = {"(a+)+$": 2, "(a+)+c": 3}
    fields(target_modules="(a+)+$", exclude_modules="(a+)+$", rank_pattern=pattern)(folder)
    assert load_adapters(model, [folder]) == [name]


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("targets", [r".*(embed_tokens|q_proj)", ["q_proj", "embed_tokens"]])
def test_an_adapter_of_an_embedding_is_refused_as_one(
    tmp_path: Path, targets: str | list[str], saved: bool
) -> None:
    """By a regex or by its name; the file has the embedding's own weight or not."""
    config = peft.LoraConfig(r=4, target_modules=targets)
    model = peft.get_peft_model(llama(), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.save_pretrained(tmp_path / "a", save_embedding_layers=saved)
    refused = "is of an adapter of an embedding, which is not supported"
    with pytest.raises(ValueError, match=refused):
        load_adapters(llama(), [tmp_path / "a"])


def test_adapters_in_folders_of_the_folder_are_named(tmp_path: Path) -> None:
    """PEFT writes an adapter that has a name of its own into a folder of that name."""
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]), "joy")
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"found none; there are adapters in its folders \['joy'\]$"
    ):
        load_adapters(llama(), [tmp_path])
    load_adapters(llama(), [tmp_path / "joy"])
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(ValueError, match=r"not adapter_model\.bin; there are .* \['joy'\]$"):
        load_adapters(llama(), [tmp_path])


def test_saved_embeddings_are_refused_with_what_to_do(tmp_path: Path) -> None:
    base = llama()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    nn.init.normal_(model.get_submodule("base_model.model.lm_head.lora_B.default").weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it saves the embedding
        model.save_pretrained(tmp_path / "a")
        model.save_pretrained(tmp_path / "b", save_embedding_layers=False)
    refused = r"lm_head\.base_layer\.weight.*save_embedding_layers=False"
    with pytest.raises(ValueError, match=refused):
        load_adapters(copy.deepcopy(base), [tmp_path / "a"])
    loaded = copy.deepcopy(base)
    assert "lm_head" in load_adapters(loaded, [tmp_path / "b"])
    torch.testing.assert_close(logits(loaded, [[1.0]] * 4), logits(model), rtol=0, atol=1e-5)


# --- export ---


@pytest.mark.parametrize("row", [[0.25, 0.75], [-1.0, 0.5], [0.0, 0.0], [0.0, 1.5]])
def test_export_equals_the_row(row: list[float], tmp_path: Path) -> None:
    base, model = llama(), llama()
    configs = zip("ab", KINDS["patterns"][1:], strict=True)
    made = [peft_folder(base, tmp_path / n, **c) for n, c in configs]
    load_adapters(model, made)
    (tmp_path / "out").mkdir()
    folder = export_adapter(model, row, tmp_path / "out")
    config = json.loads((folder / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 6 + 7
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    expected = logits(model, [row] * 4)
    torch.testing.assert_close(logits(peft_loaded(base, folder)), expected, rtol=0, atol=1e-5)
    again = llama()
    load_adapters(again, [folder])
    torch.testing.assert_close(logits(again, [[1.0]] * 4), expected, rtol=0, atol=1e-5)


def test_export_takes_tensors_and_names(tmp_path: Path) -> None:
    model = gpt2()
    inject(model, ["joy", "brief"], r=2, dtype=torch.float32)
    randomise(model, 0)
    forms = [torch.tensor([0.0, 0.5]), {"brief": 0.5}, {"brief": 0.5, "joy": 0}, (0.0, 0.5)]
    written = [export_adapter(model, form, tmp_path / str(i)) for i, form in enumerate(forms)]
    assert len({(folder / TENSORS).read_bytes() for folder in written}) == 1
    expected = logits(model, [[0.0, 0.5]] * 4)
    torch.testing.assert_close(logits(peft_loaded(gpt2(), written[0])), expected, rtol=0, atol=1e-5)


def test_export_of_a_narrow_adapter_is_not_rounded_again(tmp_path: Path) -> None:
    model = Net().bfloat16()
    inject(model, ["joy", "brief"], r=2, lora_alpha=3, dtype=torch.bfloat16)
    randomise(model, 0)
    stored = load_file(export_adapter(model, [0.3, -0.7], tmp_path / "out") / TENSORS)
    layer = steered_layers(model)["conv"]
    A, B = layer.lora_A.double(), layer.lora_B.double()
    exact = 1.5 * (0.3 * B[0] @ A[0] - 0.7 * B[1] @ A[1])
    mixed = stored[f"{CONV}.lora_B.weight"].double() @ stored[f"{CONV}.lora_A.weight"].double()
    torch.testing.assert_close(mixed, exact, rtol=1e-6, atol=1e-7)


def test_weights_of_an_export_may_be_tensors_and_arrays(tmp_path: Path) -> None:
    """As a list, or by name; also of 16 bits and of no dimension."""
    model = saved_net(tmp_path / "adapters")
    row = torch.tensor([0.75, 0.25], dtype=torch.bfloat16)
    export_adapter(model, [0.75, 0.25], tmp_path / "0")
    wanted = load_file(tmp_path / "0" / TENSORS)
    given = [row, list(row), {"joy": row[0], "brief": row[1]}, row.float().numpy(),
             [np.array(0.75), np.float32(0.25)]]  # fmt: skip
    for i, weights in enumerate(given, 1):
        export_adapter(model, weights, tmp_path / str(i))
        assert all(
            map(torch.equal, load_file(tmp_path / str(i) / TENSORS).values(), wanted.values())
        )


@pytest.mark.parametrize(
    "weights",
    [
        [1.0],
        [1.0, 2.0, 3.0],
        [math.nan, 1.0],
        [1.0, math.inf],
        {"sad": 1.0},
        {"joy": math.nan},
        ["1", "2"],
        torch.ones(1, 2),
        torch.tensor(1.0),
        torch.tensor([math.nan, 0.0]),
    ],
)
def test_export_refuses_other_weights(weights: Any, tmp_path: Path) -> None:
    model = Net()
    inject(model, ["joy", "brief"])
    with pytest.raises(ValueError, match=r"weights must be 2 finite numbers \(joy, brief\), got"):
        export_adapter(model, weights, tmp_path / "out")
    assert not os.listdir(tmp_path)


def test_what_is_written_can_be_loaded(tmp_path: Path) -> None:
    """Ranks add up in an export."""
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, ["joy", "brief"], r=2049, lora_alpha=1_000_000)
    folders = save_adapters(model, tmp_path)
    load_adapters(nn.Sequential(nn.Linear(4, 4)), folders)
    wanted = "rank 4098 .* the sum of the adapters' ranks .*2049 and 2049.* at most 4096"
    with pytest.raises(ValueError, match=wanted):
        export_adapter(model, [0.5, 0.5], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_refuses_a_directory_in_use(tmp_path: Path) -> None:
    model = Net()
    inject(model, ["joy"])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be missing or empty"):
        export_adapter(model, [1.0], tmp_path)
    with pytest.raises(ValueError, match="found a file"):
        export_adapter(model, [1.0], tmp_path / "notes.txt")
    assert os.listdir(tmp_path) == ["notes.txt"]


# --- refusals ---


def fields(**values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | values))

    return damage


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        stored = load_file(folder / TENSORS)
        change(stored)
        (folder / TENSORS).unlink()  # loaded tensors may still be mapped from the file
        save_file(stored, folder / TENSORS)

    return damage


def file(name: str, data: bytes | None) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        if data is not None:
            (folder / name).write_bytes(data)

    return damage


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
CLASSIC = "base_model.model.model.embed_tokens.weight"


def poison(key: str, value: float) -> Callable[[dict[str, Tensor]], Any]:
    return lambda stored: stored[key][0, 0].fill_(value)


def put(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda stored: stored.update({key: value})


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda stored: stored.update({new: stored.pop(old)})


def drop(*keys: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda stored: [stored.pop(key) for key in keys]


def wrapped(stored: dict[str, Tensor]) -> None:
    for key in list(stored):
        rename(key, key.replace(".layers", ".language_model.layers"))(stored)


def both(*changes: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: [change(folder) for change in changes]


# (field of the configuration, what it must be): values that are not that
WRONG: dict[tuple[str, str], list[Any]] = {
    ("r", "an integer"): [-4, 4097, 4.0, True],
    ("lora_alpha", "a number"): [math.inf, 0, -1.0, 10**400, 1_000_001, "8"],
    ("layers_to_transform", "an integer or"): [[True], "0"],
    ("init_lora_weights", ""): ["pissa_niter_4", "olora", [1]],
    ("exclude_modules", "a list"): [{"a": 1}, [""]],
}
HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{
        f"{field} {value!r:.20}": (fields(**{field: value}), f"{field} must be {kind}")
        for (field, kind), values in WRONG.items()
        for value in values
    },
    "no config": (file(CONFIG, None), rf"{CONFIG} must be a file, found none"),
    "no tensors": (file(TENSORS, None), rf"{TENSORS} must be a file, found none"),
    "pickle": (
        lambda folder: (folder / TENSORS).rename(folder / "adapter_model.bin"),
        "only safetensors are read, not adapter_model.bin",
    ),
    "not JSON": (file(CONFIG, b"{'r': 8}"), "must be valid JSON"),
    "not UTF-8": (file(CONFIG, b'{"r": "\xff"}'), "must be valid JSON"),
    "deep JSON": (file(CONFIG, b"[" * 400_000), "must be valid JSON"),
    "list": (file(CONFIG, b"[1, 2]"), r"must be a JSON object, got \[1, 2\]"),
    "oversized": (file(CONFIG, b" " * 1_000_001), "at most 1000000 bytes"),
    "key twice": (file(CONFIG, b'{"r": 8, "r": 9}'), "the key 'r' comes twice"),
    "inner key twice": (file(CONFIG, b'{"x": {"q": 8, "q": 9}}'), "the key 'q' comes twice"),
    "peft_type": (fields(peft_type="LOHA"), "peft_type must be \"LORA\", got 'LOHA'"),
    "no peft_type": (fields(peft_type=None), "peft_type must be .*, got None"),
    "r zero": (fields(r=0), r"r must be an integer in \[1, 4096\], got 0"),
    "r null": (fields(r=None), "r must be an integer .*, got None"),
    "r other": (fields(r=8), r"q_proj.lora_A.weight must be of shape \[8, 32\], got \[4, 32\]"),
    "alpha NaN": (fields(lora_alpha=math.nan), "lora_alpha must be a number .*, got nan"),
    "alpha by rslora": (fields(lora_alpha=10**6, use_rslora=True), "lora_alpha of model.*number"),
    "rslora string": (fields(use_rslora="no"), "use_rslora must be false or true or null"),
    "fan_in_fan_out": (fields(fan_in_fan_out=3), "fan_in_fan_out must be false or true"),
    "dora": (fields(use_dora=True), r"use_dora must be unset \(it is not implemented\), got True"),
    "qalora": (fields(use_qalora=True), "use_qalora must be unset"),
    "lora_bias": (fields(lora_bias=True), "lora_bias must be unset"),
    "bias": (fields(bias="lora_only"), "bias must be \"none\" or null, got 'lora_only'"),
    "modules_to_save": (fields(modules_to_save=["lm_head"]), "modules_to_save must be unset"),
    "target_parameters": (fields(target_parameters=["w"]), "target_parameters must be unset"),
    "layer_replication": (fields(layer_replication=[[0, 2]]), "layer_replication must be unset"),
    "aLoRA": (fields(alora_invocation_tokens=[1]), "alora_invocation_tokens must be unset"),
    "tokens": (fields(trainable_token_indices=[1]), "trainable_token_indices must be unset"),
    "layers": (fields(layers_to_transform=[0]), r"key '.*layers\.1\..*A.weight' must be lora_A"),
    "layers int": (fields(layers_to_transform=1), r"key '.*layers\.0\..*A.weight' must be lora_A"),
    "layers absent": (
        fields(layers_to_transform=[7]),
        "must be the names of linear layers.*'base_",
    ),
    "layers and regex": (
        fields(layers_to_transform=0, target_modules=".*q_proj"),
        "layers_to_transform must be unset where target_modules is a str, got 0",
    ),
    "layers of a regex": (
        fields(layers_to_transform=0, layers_pattern="(a+)+"),
        "layers_pattern must be names",
    ),
    "layers of another list": (
        fields(layers_to_transform=[0, 1], layers_pattern="h"),
        "must be the names of linear layers",
    ),
    "layers_pattern": (fields(layers_pattern="h"), "layers_pattern must be unset"),
    "megatron": (fields(megatron_config={"x": 1}), "megatron_config must be unset"),
    "bdlora": (fields(use_bdlora={"nblocks": 2}), "use_bdlora must be unset"),
    "arrow": (fields(arrow_config={"top_k": 3}), "arrow_config must be unset"),
    "kasa": (fields(kasa_config={"x": 1}), "kasa_config must be unset"),
    "velora": (fields(velora_config={"x": 1}), "velora_config must be unset"),
    "monteclora": (fields(monteclora_config={"x": 1}), "monteclora_config must be unset"),
    "tying": (fields(ensure_weight_tying=True), "ensure_weight_tying must be unset"),
    "no targets": (fields(target_modules=None), "target_modules must be .*, got None"),
    "empty targets": (fields(target_modules=[]), r"target_modules must be .*, got \[\]"),
    "odd targets": (fields(target_modules=["q_proj", 3]), "target_modules must be .*3"),
    "foreign target": (
        fields(target_modules=["q_proj", "w_q"]),
        r"'w_q' names no linear layer .*first key is '.*q_proj.lora_A.weight', the model's first "
        r"linear layer is 'model\.layers\.0\.self_attn\.q_proj'",
    ),
    "another wrapper": (
        tensors(wrapped),
        r"first key is 'base_model\.model\.model\.language_model\.layers\.0\..*, the model's first "
        r"linear layer is 'model\.layers\.0\.self_attn\.q_proj'",
    ),
    "another wrapper, regex": (
        both(tensors(wrapped), fields(target_modules=".*")),
        r"first key is 'base_model\.model\.model\.language_model.*first linear layer is 'model",
    ),
    "regex without a pair": (
        both(tensors(drop(B)), fields(target_modules=".*q_proj")),
        "q_proj.lora_B.weight must be a tensor .*, got 'no such key'",
    ),
    "regex and a foreign key": (
        both(tensors(put(CLASSIC, torch.zeros(64, 32))), fields(target_modules=".*q_proj")),
        f"key '{CLASSIC}' must be lora_A",
    ),
    "not linear": (fields(target_modules=["q_proj", "norm"]), "'norm' names no linear layer"),
    "no weights": (fields(target_modules=["q_proj", "v_proj"]), "v_proj.lora_A.*no such key"),
    "all excluded": (fields(exclude_modules=["q_proj"]), "target_modules must be the names of"),
    "pattern list": (fields(rank_pattern=[1]), "rank_pattern must be an object"),
    "pattern regex": (fields(r=8, rank_pattern={"(a+)+": 5}), r"shape \[8, 32\], got \[4, 32\]"),
    "pattern regex rank": (
        fields(rank_pattern={"(a+)+": 0}),
        r"rank_pattern of '\(a\+\)\+' must be",
    ),
    "pattern name first": (
        fields(rank_pattern={"q_proj": 5, ".*": 4}),
        r"shape \[5, 32\], got \[4, 32\]",
    ),
    "pattern rank": (fields(rank_pattern={"q_proj": 0}), "rank_pattern of 'q_proj' must be an int"),
    "pattern other": (fields(rank_pattern={"1.self_attn.q_proj": 5}), r"shape \[5, 32\]"),
    "alpha regex": (fields(alpha_pattern={"q|v": 4}), "alpha_pattern .*no regexes"),
    "alpha pattern": (fields(alpha_pattern={"v_proj": math.nan}), "alpha_pattern of 'v_proj' must"),
    "prefix": (tensors(rename(A, A.removeprefix("base_model.model."))), "key 'model.layers.0"),
    "prefix once": (tensors(rename(A, A.replace("base_model.model.", "", 1))), "key 'model.la"),
    "adapter name": (tensors(rename(A, A.replace("A.w", "A.default.w"))), "lora_A.default.weight"),
    "base weight": (tensors(put(CLASSIC, torch.zeros(64, 32))), f"key '{CLASSIC}' must be lora_A"),
    "base_layer": (tensors(put(A.replace("lora_A", "base_layer"), torch.ones(1))), "base_layer"),
    "bias key": (tensors(put(B.replace("weight", "bias"), torch.zeros(32))), "lora_B.bias' must"),
    "untargeted": (tensors(put(A.replace("q_", "k_"), torch.ones(4, 32))), "k_proj.lora_A.weight'"),
    "foreign module": (tensors(put(A.replace("s.0", "s.9"), torch.ones(4, 32))), "layers.9"),
    "control": (tensors(put("\x1b[2J", torch.ones(1))), r"key '\\x1b\[2J' must be"),
    "no lora_B": (tensors(drop(B)), "q_proj.lora_B.weight must be a tensor .*, got 'no such key'"),
    "no lora_A": (tensors(drop(A)), "q_proj.lora_A.weight must be a tensor .*, got 'no such key'"),
    "no pair": (tensors(drop(A, B)), "q_proj.lora_A.weight must be a tensor"),
    "shape": (tensors(put(A, torch.zeros(4, 31))), r"of shape \[4, 32\], got \[4, 31\]"),
    "transposed": (tensors(put(B, torch.zeros(4, 32))), r"of shape \[32, 4\], got \[4, 32\]"),
    "dimensions": (tensors(put(B, torch.zeros(32, 4, 1))), r"shape \[32, 4\], got \[32, 4, 1\]"),
    "integers": (tensors(put(A, torch.zeros(4, 32, dtype=torch.int8))), "one of F16.*'I8'"),
    "complex": (tensors(put(A, torch.zeros(4, 32, dtype=torch.cfloat))), "one of F16.*'C64'"),
    "NaN": (tensors(poison(A, math.nan)), f"{A} must be finite as torch.float32, got 'NaN or inf"),
    "infinity": (tensors(poison(B, -math.inf)), f"{B} must be finite"),
    "overflow": (tensors(put(A, torch.ones(4, 32).double() * 1e200)), f"{A} must be finite as"),
    "truncated": (
        lambda folder: (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-5]),
        rf"{TENSORS} must be a whole safetensors file",
    ),
    "empty": (file(TENSORS, b""), "must be a whole safetensors file"),
    "huge header": (file(TENSORS, b"\xff" * 16), "must be a whole safetensors file"),
    "a pickle inside": (file(TENSORS, b"\x80\x04cos\nsystem\n."), "must be a whole safetensors"),
}


def state(model: nn.Module) -> tuple[Any, ...]:
    bits = [value.view(torch.uint8).clone() for value in model.state_dict().values()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    return bits, flags, [(name, id(module)) for name, module in model.named_modules()]


def assert_untouched(model: nn.Module, before: tuple[Any, ...]) -> None:
    after = state(model)
    assert after[1:] == before[1:]
    assert all(torch.equal(x, y) for x, y in zip(after[0], before[0], strict=True))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft") / "good"
    return peft_folder(llama(), folder, r=4, target_modules=["q_proj"])


@pytest.fixture(scope="module")
def shared_llama() -> nn.Module:
    return llama()


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("error::UserWarning")
def test_refusals_name_the_folder_and_touch_nothing(
    name: str, good: Path, shared_llama: nn.Module, tmp_path: Path
) -> None:
    change, message = HOSTILE[name]
    bad = shutil.copytree(good, tmp_path / "the_bad_one")
    change(bad)
    before = state(shared_llama)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapters(shared_llama, [good, bad])
    assert str(bad) in str(caught.value) and len(str(caught.value)) < 1000
    assert_untouched(shared_llama, before)


def test_refused_arguments(good: Path, shared_llama: nn.Module, tmp_path: Path) -> None:
    before = state(shared_llama)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ([tmp_path / "absent"], {}, "absent.*must be a file, found none"),
        ([good / CONFIG], {}, "must be a file, found none"),
        (str(good), {}, "folders must be a list"),
        (good, {}, "folders must be a list"),
        ([], {}, "at least one"),
        ([good, good], {}, "distinct names .*'good', 'good'"),
        ([good], {"names": ["a", "b"]}, "1 folders and the names"),
        ([good], {"names": ["a.b"]}, "letters, digits"),
        ([good], {"dtype": torch.int8}, "dtype must be"),
        ([good], {"dtype": torch.bfloat16}, "dtype must be"),
    ]
    for folders, options, message in cases:
        with pytest.raises(ValueError, match=message):
            load_adapters(shared_llama, folders, **options)
    assert_untouched(shared_llama, before)
    model = llama()
    load_adapters(model, [good])
    before = state(model)
    with pytest.raises(ValueError, match="adapters already"):
        load_adapters(model, [good])
    assert_untouched(model, before)


def test_a_quantised_layer_is_named(good: Path) -> None:
    model = llama()
    layer = model.model.layers[1].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.data.to(torch.uint8), requires_grad=False)
    before = state(model)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj must be .* not quantised"):
        load_adapters(model, [good])
    assert_untouched(model, before)


def test_repeated_folders_with_names(good: Path) -> None:
    model = llama()
    load_adapters(model, [good, good], names=["a", "b"])
    twice, once = logits(model, [[0.5, 0.5]] * 4), logits(model, [[1.0, 0.0]] * 4)
    torch.testing.assert_close(twice, once, rtol=0, atol=1e-5)


def test_what_is_warned_about(good: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(good, tmp_path / "bad")
    fields(new_in_2027={"x": 1}, also_new=None, lora_dropout=0.5)(bad)
    fields(target_modules=["q_proj"] * 3, fan_in_fan_out=True)(bad)
    model = llama()
    with pytest.warns(UserWarning) as caught:
        load_adapters(model, [bad])
    unknown, flag = (str(warning.message) for warning in caught)
    assert unknown == f"{bad / CONFIG}: unknown fields are ignored: ['new_in_2027']"
    assert flag == f"{bad / CONFIG}: fan_in_fan_out=True fits no target layer; ignored"
    assert {warning.filename for warning in caught} == {__file__}
    assert list(steered_layers(model)) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]


@pytest.fixture(scope="module")
def small() -> tuple[bytes, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        model = Net()
        inject(model, ["a"], r=2, target_modules=["block.fc"])
        randomise(model, 0)
        (saved,) = save_adapters(model, folder)
        return (saved / CONFIG).read_bytes(), (saved / TENSORS).read_bytes()


def load_bytes(config: bytes, data: bytes) -> None:
    """Loads or raises ValueError; nothing else."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Path(folder, CONFIG).write_bytes(config)
        Path(folder, TENSORS).write_bytes(data)
        model = Net()
        before = state(model)
        try:
            load_adapters(model, [folder], names=["a"])
        except ValueError:
            assert_untouched(model, before)
        else:
            assert all(parameter.isfinite().all() for parameter in model.parameters())


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_bytes_never_crash(small: tuple[bytes, bytes], data: st.DataObject) -> None:
    files = [bytearray(part) for part in small]
    for _ in range(data.draw(st.integers(1, 4))):
        part = files[data.draw(st.integers(0, 1))]
        header = data.draw(st.booleans())  # the length and the JSON, rather than the numbers
        end = min(len(part), 300 if header else len(part)) - 1
        start = data.draw(st.integers(0, end))
        text = st.text('0123456789[]{},:"-+.eEaFB_ntl', max_size=3).map(str.encode)
        new = data.draw(text | st.binary(max_size=3))
        part[start : start + data.draw(st.integers(0, 3))] = new
    load_bytes(*map(bytes, files))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_value_in_any_field_never_crashes(
    small: tuple[bytes, bytes], data: st.DataObject
) -> None:
    config = json.loads(small[0])
    names = sorted(set(peft.LoraConfig().to_dict()) | {"unknown"})
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        config[name] = data.draw(JSON_VALUES)
    load_bytes(json.dumps(config).encode(), small[1])


# --- whole writes ---


def snapshot(root: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


def saved_net(root: Path) -> Net:
    """A net with two adapters saved under `root`, then changed."""
    model = Net()
    inject(model, ["joy", "brief"], r=4)
    randomise(model, 0)
    save_adapters(model, root)
    randomise(model, 1)
    return model


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_any_failing_call_changes_nothing(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved_net(tmp_path)
    before = snapshot(tmp_path)
    real, calls = getattr(os, call), []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == fail_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, call, failing)
    # two folders: per folder two files and itself, then the parent; per folder away and into place
    for fail_at in range(1, {"fsync": 8, "rename": 5}[call]):
        calls.clear()
        with pytest.raises(OSError, match="No space left"):
            save_adapters(model, tmp_path)
        assert snapshot(tmp_path) == before
        calls.clear()
        if fail_at <= {"fsync": 4, "rename": 1}[call]:
            with pytest.raises(OSError, match="No space left"):
                export_adapter(model, [0.5, 0.5], tmp_path / "out")
            assert snapshot(tmp_path) == before
    fail_at = 0
    save_adapters(model, tmp_path)
    after = snapshot(tmp_path)
    assert after.keys() == before.keys() and after != before


def test_a_write_that_fails_halfway(tmp_path: Path) -> None:
    """The system refuses to let the second file grow, as on a full disk."""
    model = saved_net(tmp_path)
    before = snapshot(tmp_path)
    size = (tmp_path / "joy" / TENSORS).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 50, hard))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(OSError) as caught:
            save_adapters(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert snapshot(tmp_path) == before


def test_an_interrupt_leaves_no_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved_net(tmp_path)
    before = snapshot(tmp_path)

    interrupted = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr("clp_kernels.peft.write.serialize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_adapters(model, tmp_path)
    assert snapshot(tmp_path) == before


def test_saving_goes_through_links_and_keeps_other_files(tmp_path: Path) -> None:
    model = saved_net(tmp_path / "real")
    (tmp_path / "link").mkdir()
    for name in ("joy", "brief"):
        (tmp_path / "link" / name).symlink_to(tmp_path / "real" / name)
    save_adapters(model, tmp_path / "link")
    assert (tmp_path / "link" / "joy").is_symlink()
    assert sorted(os.listdir(tmp_path / "real")) == ["brief", "joy"]
    again = Net()
    load_adapters(again, [tmp_path / "real" / "joy", tmp_path / "real" / "brief"])
    same_bits(model, again)

    (tmp_path / "real" / "brief" / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"brief must hold an adapter only, found also \['notes"):
        save_adapters(model, tmp_path / "real")
    assert snapshot(tmp_path) == before


def test_what_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no MixedLoRALinear layer"):
        save_adapters(Net(), tmp_path)
    for name in ("a/b", "a\\b", "a\0b", "..", ""):  # a name becomes a folder
        with pytest.raises(ValueError, match="names of letters, digits"):
            inject(Net(), [name])
    model = saved_net(tmp_path)
    before = snapshot(tmp_path)
    model.fc.lora_B.data[1, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"brief: .*\.fc\.lora_B\.weight must be finite"):
        save_adapters(model, tmp_path)
    assert snapshot(tmp_path) == before


def test_the_configuration_of_an_old_peft(
    good: Path, shared_llama: nn.Module, tmp_path: Path
) -> None:
    """As version 0.3 wrote it: fewer fields, and two that are gone."""
    old = {
        "base_model_name_or_path": "huggyllama/llama-7b", "bias": "none", "enable_lora": None,
        "fan_in_fan_out": False, "inference_mode": True, "lora_alpha": 8, "lora_dropout": 0.05,
        "merge_weights": False, "modules_to_save": None, "peft_type": "LORA", "r": 4,
        "target_modules": ["q_proj"], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (tmp_path / CONFIG).write_text(json.dumps(old))
    (tmp_path / TENSORS).write_bytes((good / TENSORS).read_bytes())
    first, second = llama(), llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapters(first, [tmp_path], names=["good"])
    load_adapters(second, [good])
    same_bits(first, second)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings`")
def test_an_adapter_of_a_tied_head(tmp_path: Path) -> None:
    base = seeded("llama", tie_word_embeddings=True)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    nn.init.normal_(model.get_submodule("base_model.model.lm_head.lora_B.default").weight)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    loaded = copy.deepcopy(base)
    assert "lm_head" in load_adapters(loaded, [tmp_path / "a"])
    torch.testing.assert_close(logits(loaded, [[1.0]] * 4), logits(model), rtol=0, atol=1e-5)


def test_an_adapter_of_a_compiled_model_is_named_by_its_first_key(
    good: Path, tmp_path: Path
) -> None:
    """torch.compile puts _orig_mod into the keys."""
    for part in (CONFIG, TENSORS):
        (tmp_path / part).write_bytes((good / part).read_bytes())
    tensors(
        lambda stored: [
            rename(k, k.replace("base_model.model.", "base_model.model._orig_mod."))(stored)
            for k in list(stored)
        ]
    )(tmp_path)
    wanted = r"first key is 'base_model\.model\._orig_mod\..*first linear layer is 'model\.layers"
    with pytest.raises(ValueError, match=wanted):
        load_adapters(llama(), [tmp_path], names=["a"])
