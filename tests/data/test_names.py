import pytest

from clp.data.names import closest

KNOWN = ("r", "learning_rate", "beta", "save_steps", "joy")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("lr", "learning_rate"),
        ("learning_rat", "learning_rate"),
        ("ss", "save_steps"),
        ("Joy", "joy"),
    ],
)
def test_the_closest_name_is_suggested(name: str, found: str) -> None:
    assert closest(name, KNOWN) == f"; did you mean {found!r}?"


@pytest.mark.parametrize("name", ["rr", "xr", "j", "", "something_else"])
def test_nothing_is_suggested_where_nothing_is_close(name: str) -> None:
    assert closest(name, KNOWN) == ""


def test_without_known_names_nothing_is_suggested() -> None:
    assert closest("joy", []) == ""
