"""CLPConfig: YAML, unknown keys, types and ranges."""

import pytest

from clp.config import CLPConfig, config_from, load_config


def test_yaml_round_trip(tmp_path):
    config = CLPConfig(alpha=0.25, rewards=["a=sentiment"], max_steps=7)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "c.yaml") == config


def test_unknown_key_names_the_closest_match(tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rat: 0.1\n")
    with pytest.raises(ValueError, match=r"c.yaml: unknown key 'learning_rat'; did you mean "
                                         r"'learning_rate'"):  # fmt: skip
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("text", ["- 1\n", "a: [", "", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"c\.yaml"):
        load_config(tmp_path / "c.yaml")


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_yaml_cannot_name_code(tmp_path):
    (tmp_path / "c.yaml").write_text("model: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ValueError, match="cannot be read"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_steps", "10", "max_steps must be int"),
        ("max_steps", 2.5, "max_steps must be int"),
        ("max_steps", True, "max_steps must be int"),
        ("max_steps", 0, "at least 1"),
        ("num_generations", 1, "at least 2"),
        ("seed", -1, "at least 0"),
        ("learning_rate", "fast", "learning_rate must be a number"),
        ("learning_rate", float("nan"), "learning_rate must be a number"),
        ("learning_rate", 0, "finite and positive"),
        ("alpha", 1.0, r"alpha must be in \[0, 1\)"),
        ("corner_probability", 1.5, "corner_probability"),
        ("weight_decay", -1, "weight_decay"),
        ("scale_rewards", "all", "must be one of 'none', 'batch', 'group'"),
        ("rewards", "sentiment", "list of strings"),
        ("rewards", [], "list of strings"),
        ("exclude_modules", "router", "exclude_modules must be a list of strings"),
        ("resume", 1, "resume must be bool"),
        ("prompts", 3, "prompts must be"),
        ("model", None, "model must be"),
    ],
)
def test_bad_values_are_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        config_from({key: value})


def test_an_integer_is_a_number():
    assert config_from({"learning_rate": 1}).learning_rate == 1
