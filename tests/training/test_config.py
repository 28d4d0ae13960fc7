"""CLPConfig: YAML, unknown keys, types and ranges."""

from dataclasses import replace

import numpy as np
import pytest

from clp.training.config import LARGEST_LORA_ALPHA, LARGEST_R, CLPConfig, config_from, load_config
from clp_kernels.nn.mixed_lora import MAX_ALPHA, MAX_RANK


@pytest.fixture
def load(tmp_path):
    """load(text) reads the text as a file c.yaml."""

    def read(text):
        (tmp_path / "c.yaml").write_text(text)
        return load_config(tmp_path / "c.yaml")

    return read


def test_yaml_round_trip(load):
    config = CLPConfig(alpha=0.25, rewards=["a=sentiment"], max_steps=7)
    assert load(config.to_yaml()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", r"c\.yaml"),
        ("a: [", r"c\.yaml"),
        ("", r"c\.yaml"),
        ("\x00", r"c\.yaml"),
        ("r: 2\nalpha: 0.1\nr: 3\n", r"c\.yaml.*'r' stands there twice"),
        ("r: 2\nr: 2\n", "'r' stands there twice"),
        ("model: " + "[" * 5000, r"c\.yaml"),
        ("exclude_modules: &a [*a]", r"c\.yaml.* recursive"),
        ("target_modules: &a {b: [*a]}", r"c\.yaml.* recursive"),
        ("seed: " + "9" * 5000, r"c\.yaml"),
        ("{[1]: 2}", r"c\.yaml"),
        ("seed: !!timestamp soon", r"c\.yaml"),
        ("resume: !!bool maybe", r"c\.yaml"),
        ("seed: !!int ''", r"c\.yaml"),
        ("model: !!python/object/apply:os.getcwd []\n", "cannot be read"),
        ("learning_rat: 1\n", "c.yaml: unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ("max_steps: 1e3\n", r"max_steps must be int, got 1000\.0"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(load, text, message):
    with pytest.raises(ValueError, match=message):
        load(text)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_steps", "10", "max_steps must be int"),
        ("max_steps", 2.5, "max_steps must be int"),
        ("max_steps", True, "max_steps must be int"),
        ("max_steps", 0, "at least 1"),
        ("num_generations", 1, "at least 2"),
        ("num_iterations", 0, "num_iterations must be at least 1"),
        ("epsilon", 0.1, r"epsilon must be left out with num_iterations=1.*got 0\.1"),
        ("epsilon", 0, r"epsilon must be in \(0, 1\), got 0"),
        ("baseline", "values", "baseline must be one of .*did you mean 'value'"),
        ("num_prompts", 10**30, "num_prompts must be at most 1048576"),
        ("micro_batch_size", 2**20 + 1, "micro_batch_size must be at most 1048576"),
        ("seed", -1, "at least 0"),
        ("learning_rate", "fast", "learning_rate must be a number"),
        ("learning_rate", float("nan"), "learning_rate must be a number"),
        ("learning_rate", 0, "finite and positive"),
        ("alpha", 1.0, r"alpha must be in \[0, 1\)"),
        ("corner_probability", 1.5, "corner_probability"),
        ("weight_decay", -1, "weight_decay"),
        ("scale_rewards", "all", "must be one of 'reference', 'none', 'batch', 'group'"),
        ("rewards", "sentiment", "list of strings"),
        ("rewards", [], "list of strings"),
        ("exclude_modules", "router", "exclude_modules must be a list of strings"),
        ("resume", 1, "resume must be bool"),
        ("prompts", 3, "prompts must be"),
        ("model", None, "model must be"),
        ("max_prompt_length", 0, "max_prompt_length must be at least 1"),
        ("max_prompt_length", True, "max_prompt_length must be int"),
        ("max_prompt_length", 2.0, "max_prompt_length must be int"),
        ("r", 4097, "r must be at most 4096, got 4097"),
        ("lora_alpha", 1_000_001, "lora_alpha must be at most 1000000"),
        ("learning_rate", 10**400, "range of a float"),
        ("max_grad_norm", float("inf"), "finite and positive"),
    ],
)
def test_bad_values_are_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        config_from({key: value})


def test_one_completion_per_prompt_needs_a_value_head_and_no_scale_of_a_group():
    config = CLPConfig(baseline="value", num_generations=1)
    with pytest.raises(ValueError, match="num_generations must be at least 1, got 0"):
        replace(config, num_generations=0)
    with pytest.raises(ValueError, match="scale_rewards='group' needs num_generations of at least"):
        replace(config, scale_rewards="group")


def test_epsilon_goes_with_several_iterations():
    assert CLPConfig(num_iterations=2, epsilon=0.1).epsilon == 0.1


def test_an_integer_is_a_number():
    value = config_from({"learning_rate": 1}).learning_rate
    assert value == 1 and type(value) is float


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.1e-2", "10e-4", ".001", "1.0e-3", "+1e-3"])
def test_numbers_are_those_of_yaml_1_2(load, text):
    assert load(f"learning_rate: {text}\n").learning_rate == 1e-3


def test_text_that_looks_like_a_number_elsewhere_stays_text(load):
    config = load('model: "1e-3"\noutput_dir: runs/1e-3\n')
    assert (config.model, config.output_dir) == ("1e-3", "runs/1e-3")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", 1e31, r"learning_rate must be at most 1e\+30, got 1e\+31"),
        ("weight_decay", 1e7, r"weight_decay must be at most 1e\+06, got 1e\+07"),
        ("weight_decay", float("inf"), "weight_decay must be at most"),
        ("temperature", 1e7, r"temperature must be in \[1e-06, 1e\+06\], got 1e\+07"),
        ("temperature", 1e-30, r"temperature must be in \[1e-06, 1e\+06\], got 1e-30"),
    ],
)
def test_what_float32_does_not_hold_is_refused_before_a_run(name, value, message):
    with pytest.raises(ValueError, match=message):
        CLPConfig(**{name: value})


def test_the_bounds_are_those_of_the_loader():
    assert (LARGEST_R, LARGEST_LORA_ALPHA) == (MAX_RANK, MAX_ALPHA)
    CLPConfig(r=LARGEST_R, lora_alpha=LARGEST_LORA_ALPHA)


def test_seeds_of_any_size():
    assert CLPConfig(seed=10**40).seed == 10**40


def test_of_run_is_the_runs_configuration(tmp_path):
    (tmp_path / "config.yaml").write_text(CLPConfig(alpha=0.25, output_dir="moved").to_yaml())
    config = CLPConfig.of_run(tmp_path, max_steps=300)
    assert config == CLPConfig(alpha=0.25, output_dir=str(tmp_path), resume=True, max_steps=300)
    with pytest.raises(ValueError, match="did you mean 'max_steps'"):
        CLPConfig.of_run(tmp_path, max_step=300)
    with pytest.raises(ValueError, match=r"config.yaml cannot be read"):
        CLPConfig.of_run(tmp_path / "none")


def test_whole_numbers_are_those_of_yaml_1_2(load):
    """In YAML 1.1 0100 is 64, and 1:30 is 90."""
    assert load("max_steps: 0100").max_steps == 100
    with pytest.raises(ValueError, match="max_steps must be int, got '1:30'"):
        load("max_steps: 1:30")


@pytest.mark.parametrize("name", ["08", "1e3", "0o17", "-1e5", "1:30", "2026-11-30", "yes", "1.5"])
def test_texts_that_look_like_other_values_stay_texts(load, name):
    config = CLPConfig(output_dir=name, exclude_modules=[name], model=name)
    assert load(config.to_yaml()) == config


def test_a_date_is_a_text(load):
    assert load("output_dir: 2026-11-30").output_dir == "2026-11-30"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("r: 8.0", "r must be int, got 8.0"),
        ("max_steps: 1,000", "max_steps must be int, got '1,000'"),
        ("learning_rate: 2e-3 # ok\nalpha: 12%", "alpha must be a number, got '12%'"),
        ("resume: nope", "resume must be bool, got 'nope'"),
        ("rewards: joy=sentiment", "rewards must be a non-empty list"),
        ("device: off", "device must be .*str.*, got False"),
    ],
)
def test_values_that_are_nearly_right_are_refused_by_name(load, text, message):
    with pytest.raises(ValueError, match=message):
        load(text)


def test_numpys_numbers_are_numbers(load):
    """As a sweep over np.logspace or np.arange gives them."""
    config = CLPConfig(
        learning_rate=np.logspace(-3, -2, 2)[0], alpha=np.float32(0.25), r=np.arange(9)[4],
        seed=np.int64(3), max_steps=np.int32(5),
    )  # fmt: skip
    assert config == CLPConfig(learning_rate=1e-3, alpha=0.25, r=4, seed=3, max_steps=5)
    assert load(config.to_yaml()) == config


def test_paths_may_be_objects(load, tmp_path):
    """As CLPConfig.of_run and Policy.load take them."""
    config = CLPConfig(output_dir=tmp_path / "r", prompts=tmp_path / "p.jsonl")
    assert config == CLPConfig(output_dir=f"{tmp_path}/r", prompts=f"{tmp_path}/p.jsonl")
    assert load(config.to_yaml()) == config


def test_what_a_conditioning_has_no_use_for_is_refused():
    with pytest.raises(ValueError, match="gradient_checkpointing must be left out with conditio"):
        CLPConfig(conditioning="head", gradient_checkpointing=True)
