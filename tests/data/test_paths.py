"""What is recorded is found from any folder; what looks like a path is no hub name."""

from pathlib import Path

import pytest

from clp.data.paths import (
    absolute,
    check_folder,
    classifier_source,
    home_expanded,
    model_location,
    reward_locations,
)
from clp.training.config import CLPConfig, located


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """A working folder with models/one, and a home folder with two."""
    (tmp_path / "project/models/one").mkdir(parents=True)
    (tmp_path / "home/two").mkdir(parents=True)
    (tmp_path / "project/file").write_text("")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("name", ["tiny", "gpt2", "org/model", "Org-1/model_2.5", "two"])
def test_names_stay(name):
    assert model_location(name) == name


def test_folders_become_absolute(tmp_path):
    one, two = str(tmp_path / "project/models/one"), str(tmp_path / "home/two")
    for name in ("models/one", "./models/one", "models/one/", "../project/models/one", one):
        assert model_location(name) == one
    assert model_location("~/two") == two
    # The links of an absolute path are the user's: they may be all that another machine shares.
    (tmp_path / "link").symlink_to(one)
    assert model_location(str(tmp_path / "link")) == str(tmp_path / "link")
    (tmp_path / "project/tiny").mkdir()
    assert model_location("tiny") == "tiny"
    assert model_location("./tiny") == str(tmp_path / "project/tiny")


@pytest.mark.parametrize(
    "name",
    ["", "./none", "../none", "./gpt2", "../org/model", "/none", "/org/model", "~/none",
     "~nobody/x", "a/b/c", "models/none", "file", "org/model/", "org//model", "org/..", "a b",
     "héllo/x"],
)  # fmt: skip
def test_paths_that_are_not_there_are_never_hub_names(name):
    with pytest.raises(ValueError, match="is neither a folder nor a hub name"):
        model_location(name)


def test_what_is_there_instead_is_said():
    with pytest.raises(ValueError, match=r"'file' .*: it is a file"):
        model_location("file")
    with pytest.raises(ValueError, match="the folder 'models' is here and does not hold it"):
        model_location("models/none")


def test_classifiers_of_rewards(tmp_path):
    clf = f"{tmp_path}/project/clf"
    assert reward_locations(
        ["sentiment", "joy=brevity", "a=classifier:clf", "a=classifier:clf#toxic",
         "a=classifier:~/x#1", f"a=classifier:{clf}#b"]
    ) == ["sentiment", "joy=brevity", f"a=classifier:{clf}", f"a=classifier:{clf}#toxic",
          f"a=classifier:{tmp_path}/home/x#1", f"a=classifier:{clf}#b"]  # fmt: skip
    # Malformed ones stay, for load_rewards to name.
    for spec in ("a=classifier:", "a=classifier:#b", "classifier:clf", "nonsense"):
        assert reward_locations([spec]) == [spec]


def test_a_folder_with_a_number_sign(tmp_path):
    (tmp_path / "project/c#").mkdir()
    assert classifier_source("c#") == ("c#", None)
    assert classifier_source("c##pos") == ("c#", "pos")
    assert classifier_source("clf#pos") == ("clf", "pos")
    assert classifier_source("clf") == ("clf", None)


def test_a_configuration(tmp_path, monkeypatch):
    config = CLPConfig(
        model="models/one", rewards=["a=classifier:clf#x"], prompts="p.jsonl",
        eval_prompts="~/e.jsonl", output_dir="~/runs",
    )  # fmt: skip
    found = located(config)
    assert found == CLPConfig(
        model=f"{tmp_path}/project/models/one", rewards=[f"a=classifier:{tmp_path}/project/clf#x"],
        prompts=f"{tmp_path}/project/p.jsonl", eval_prompts=f"{tmp_path}/home/e.jsonl",
        output_dir=f"{tmp_path}/home/runs", learning_rate=2e-3,
    )  # fmt: skip
    monkeypatch.chdir("/")
    assert located(found) == found
    assert located(CLPConfig()) == CLPConfig(learning_rate=2e-3)
    assert located(CLPConfig(conditioning="full")).learning_rate == 1e-3


def test_a_home_that_nobody_has():
    assert absolute("~nobody-here/x") == str(Path("~nobody-here/x").resolve())


def test_folders_to_write():
    check_folder(Path("models"))
    for folder in ("models/one", "new", "new/er", "models/one/new"):
        check_folder(Path(folder), empty=True)
    with pytest.raises(ValueError, match="models must be missing or empty"):
        check_folder(Path("models"), empty=True)
    for inside in ("file", "file/a/b"):
        with pytest.raises(ValueError, match=rf"^{inside} cannot be a folder: .*file is a file"):
            check_folder(Path(inside))
    assert not Path("new").exists()


def test_a_folder_that_may_not_be_written(monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ValueError, match="new cannot be written: no permission in"):
        check_folder(Path("new"))


def test_paths_that_could_be_written_and_not_read():
    """safetensors reads no file whose path is not UTF-8; Linux has such names."""
    for path, message in (("a\0b", "NUL"), ("r\udcff", "is not UTF-8"), ("", "is empty")):
        with pytest.raises(ValueError, match=message):
            home_expanded(path)
        with pytest.raises(ValueError, match=message):
            located(CLPConfig(output_dir=path))


def test_links_to_nothing_are_no_folders(tmp_path):
    Path("circle").symlink_to("circle")
    Path("dangling").symlink_to("none")
    for name in ("circle", "dangling", "dangling/in"):
        with pytest.raises(ValueError, match="a link to nothing"):
            check_folder(Path(name))
    assert absolute("circle") == str(tmp_path / "project/circle")


def test_a_folder_that_stands_where_a_file_belongs():
    check_folder(Path("models"), ["two"])
    with pytest.raises(ValueError, match="models cannot be written: one in it is a folder"):
        check_folder(Path("models"), ["two", "one"])
