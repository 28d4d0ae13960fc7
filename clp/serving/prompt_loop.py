"""A prompt loop: what is typed is continued token by token; lines with / first are commands."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from typing import Any, TextIO

from clp.data.condition import Condition
from clp.data.conversation import Messages, user_message
from clp.data.json_lines import parse_json
from clp.data.weights import WeightSpec
from clp.engine.requests import SamplingParams
from clp.engine.sampler import Sampler
from clp.engine.sequence import Request

HELP = """\
a text                        is continued; one that begins with / is typed with //
/weights joy=0.7,brief=0.3    the weights of what follows (/w for short)
/kl 0.05                      the KL strength, if the policy has a range of them
/set temperature 0.7          a sampling parameter; /set temperature none: its default
/show                         the weights and the parameters
/new                          a new conversation; /new TEXT: with this system message
/quit                         ends, as Ctrl-D does
Ctrl-C                        stops a completion; at the prompt it ends the loop
"""
_WORDS = {"true": True, "false": False}


def prompt_loop(
    sampler: Sampler,
    params: SamplingParams | None = None,
    weights: str | None = None,
    *,
    kl: float | None = None,
    simplex: bool = True,
    chat: bool = False,
    read: Callable[[str], str] = input,
    out: TextIO | None = None,
) -> None:
    """Reads prompts and commands until the end; a bad one gives one line of error.

    Args:
        params, weights, kl: To begin with; weights of None: equal for all objectives; a kl of
            None: the geometric mean of the policy's range, if it has one.
        simplex: Refuse weights off the simplex.
        chat: What is typed is the next message of a conversation; the first of n completions is the
            answer that the next one follows.
        read: Takes the text to show before the line, returns the line; EOFError or
            KeyboardInterrupt end the loop.
        out: Where everything is shown; default: standard output.

    Raises: ValueError for bad `weights` or `kl`.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lines can be edited and called back
    out = sys.stdout if out is None else out
    loop = _Loop(sampler, params or SamplingParams(), weights, kl, simplex, chat, out)
    out.write(f"{loop.shown()}; /help lists the commands\n")
    while True:
        out.flush()
        try:
            line = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            out.write("\n")
            return
        if line.split()[:1] in (["/quit"], ["/q"]):
            return
        if not line:
            continue
        request = None
        try:
            if line.startswith("/") and not line.startswith("//"):
                loop.command(*_split(line[1:]))
            else:
                request = loop.submit(line.removeprefix("/"))
        except (ValueError, TypeError) as error:
            loop.show_error(str(error))
        if request is not None:
            loop.complete(request)


class _Loop:
    """The current weights, parameters and conversation."""

    def __init__(
        self,
        sampler: Sampler,
        params: SamplingParams,
        weights: str | None,
        kl: float | None,
        simplex: bool,
        chat: bool,
        out: TextIO,
    ) -> None:
        self.sampler, self.params, self.simplex, self.out = sampler, params, simplex, out
        self.messages: Messages | None = [] if chat else None
        self.objectives = sampler.policy.objectives
        m = len(self.objectives)
        spec = [1 / m] * m if weights is None else weights
        self.weights: WeightSpec = spec
        self.kl: float | None = None
        self.asked_for: Any = None
        self.steer_by(spec, kl)

    def steer_by(self, weights: WeightSpec, kl: float | None) -> None:
        """Weights and strength of what follows. Raises: ValueError; they are then as before."""
        row = self.sampler.policy.condition(Condition(weights, kl), simplex=self.simplex)
        self.weights, self.kl, self.row = weights, kl, row.tolist()

    def shown(self) -> str:
        pairs = zip(self.objectives, self.row, strict=False)
        text = "weights " + ",".join(f"{name}={value:.3g}" for name, value in pairs)
        return text + "".join(f"; kl {alpha:.3g}" for alpha in self.row[len(self.objectives) :])

    def command(self, name: str, rest: str) -> None:
        if name in ("weights", "w"):
            if rest:
                self.steer_by(rest, self.kl)
            self.out.write(self.shown() + "\n")
        elif name == "kl":
            if rest:
                self.steer_by(self.weights, _strength(rest))
            self.out.write(self.shown() + "\n")
        elif name == "set":
            self._set(*_split(rest))
        elif name == "show":
            self.out.write(self.shown() + "\n")
            for parameter, value in asdict(self.params).items():
                self.out.write(f"{parameter} {_shown(value)}\n")
        elif name == "new":
            if self.messages is None:
                raise ValueError("/new is for conversations (--chat)")
            self.messages = [{"role": "system", "content": rest}] if rest else []
        elif name == "help":
            self.out.write(HELP)
        else:
            raise ValueError(f"unknown command {'/' + name!r}; /help lists them")

    def _set(self, name: str, text: str) -> None:
        known = [f.name for f in fields(SamplingParams)]
        if name not in known:
            raise ValueError(f"/set takes one of {', '.join(known)}, got {name!r}")
        if name == "logprobs":
            raise ValueError("/set logprobs: log-probabilities are not shown here")
        if not text:
            example = _shown(getattr(self.params, name))
            raise ValueError(f"/set {name} needs a value, such as {example}")
        self.params = replace(self.params, **{name: _value(name, text)})
        self.out.write(f"{name} {_shown(getattr(self.params, name))}\n")

    def show_error(self, error: str) -> None:
        self.out.write(f"error: {' '.join(error.split())}\n")

    def submit(self, prompt: str) -> Request:
        """Raises: ValueError or TypeError for a prompt that the sampler refuses."""
        self.asked_for = prompt
        if self.messages is not None:
            self.asked_for = [*self.messages, user_message(prompt)]
        condition = Condition(self.weights, self.kl)
        return self.sampler.submit(self.asked_for, condition, self.params, simplex=self.simplex)

    def complete(self, request: Request) -> None:
        """Shows the n completions, one below the other, the first of them as it is drawn."""
        n, answer = self.params.n, ""
        waiting: list[list[str]] = [[] for _ in range(n)]
        ended = [False] * n
        errors: list[str] = []
        current = 0
        try:
            with _interrupt() as asked:
                self._begin(0)
                for token in self.sampler.stream(request):
                    waiting[token.index].append(token.text)
                    answer += token.text if token.index == 0 else ""
                    ended[token.index] = token.finish_reason is not None
                    errors += [token.error] if token.error is not None else []
                    while current < n:
                        self.out.write("".join(waiting[current]))
                        waiting[current].clear()
                        if not ended[current]:
                            break
                        self.out.write("\n")
                        current += 1
                        if current < n:
                            self._begin(current)
                    self.out.flush()
                    if asked:
                        break
        except KeyboardInterrupt:
            asked = [True]
        finally:
            self.sampler.cancel(request)  # what is not finished
        if asked and current < n:
            self.out.write(" [stopped]\n")
        if errors:
            self.show_error(errors[0])
        elif self.messages is not None:
            self.messages = [*self.asked_for, {"role": "assistant", "content": answer}]

    def _begin(self, index: int) -> None:
        if self.params.n > 1:
            self.out.write(f"{index + 1}: ")


@contextlib.contextmanager
def _interrupt() -> Iterator[list[bool]]:
    """Ctrl-C fills the list, so that no step is cut in two; a second one is a KeyboardInterrupt."""
    asked: list[bool] = []

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread gets signals
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _split(line: str) -> tuple[str, str]:
    name, *rest = line.split(maxsplit=1) or [""]
    return name, rest[0] if rest else ""


def _strength(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"/kl needs a number, such as /kl 0.05, got {text!r}") from None


def _value(name: str, text: str) -> Any:
    """JSON, or true or false in any case, or none for the default. Anything else is a text."""
    if text.lower() == "none":
        return getattr(SamplingParams(), name)
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        value = parse_json(text)
    except ValueError:
        return text
    if name == "stop" and not isinstance(value, (str, list)):
        return text
    return value


def _shown(value: Any) -> str:
    return "none" if value is None else str(list(value) if isinstance(value, tuple) else value)
