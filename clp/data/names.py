"""What an error about an unknown name suggests."""

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str]) -> str:
    """The end of an error's message that names the closest known name; empty if none is close.

    Initials of several words are close (lr and learning_rate). A known name of one letter is not:
    it is half of many names of two.
    """
    words = [candidate for candidate in known if len(candidate) > 1]
    found = [c for c in words if "_" in c and "".join(w[:1] for w in c.split("_")) == name]
    found = found or difflib.get_close_matches(name, words, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
