"""The prompt loop, as it is typed and shown."""

import io
import os
import signal
import threading

import pytest
from steered_policies import policy_of

from clp.data.condition import Condition
from clp.engine.requests import SamplingParams
from clp.engine.sampler import Sampler
from clp.policies.policy import Policy
from clp.serving.prompt_loop import HELP, prompt_loop

PARAMS = SamplingParams(max_tokens=8, seed=1)
LONG = SamplingParams(max_tokens=100, seed=1, ignore_eos=True)


@pytest.fixture(scope="module")
def sampler():
    return Sampler(Policy.create("tiny", ["joy", "brief"], r=2), max_batch_size=4)


def typed(sampler, *lines, params=PARAMS, out=None, **options):
    """What is shown, without the greeting; the end of the lines is Ctrl-D."""
    left = list(lines)

    def read(prompt):
        assert prompt == "> "
        if not left:
            raise EOFError
        line = left.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    out = out or io.StringIO()
    prompt_loop(sampler, params, read=read, out=out, **options)
    assert not sampler.unfinished
    return out.getvalue().splitlines()


def expected(sampler, prompt, weights, **changes):
    params = SamplingParams(**({"max_tokens": 8, "seed": 1} | changes))
    return [c.text for c in sampler.generate([prompt], weights, params)]


def test_a_prompt_is_continued_with_equal_weights(sampler):
    shown = typed(sampler, "", "Tom had a red kite.", "  ")
    assert shown[0] == "weights joy=0.5,brief=0.5; /help lists the commands"
    assert shown[1:-1] == expected(sampler, "Tom had a red kite.", [0.5, 0.5])


def test_the_strength_is_set_and_shown(sampler):
    own = Sampler(policy_of("lora", kl_range=(0.05, 0.4)), max_batch_size=4)
    shown = typed(own, "/kl 0.1", "/w 1,0", "/kl 2", "/kl low", "/kl", "Tom", kl=0.05)
    assert shown[0] == "weights joy=0.5,brief=0.5; kl 0.05; /help lists the commands"
    assert shown[1:3] == ["weights joy=0.5,brief=0.5; kl 0.1", "weights joy=1,brief=0; kl 0.1"]
    assert shown[3].startswith("error: kl must be in [0.05, 0.4]")
    assert shown[4] == "error: /kl needs a number, such as /kl 0.05, got 'low'"
    assert shown[5] == shown[2]
    assert shown[6:-1] == expected(own, "Tom", Condition([1, 0], 0.1))
    assert typed(sampler, "/kl 0.1")[1].startswith("error: kl must be left out")


def test_tokens_are_shown_as_they_are_drawn(sampler):
    class Watched(io.StringIO):
        drawn: list = []  # noqa: RUF012

        def write(self, text):
            if text.strip() and "weights" not in text:
                self.drawn.append(sampler.tokens_drawn - begin)
            return super().write(text)

    begin = sampler.tokens_drawn
    out = Watched()
    typed(sampler, "Tom had a red kite.", out=out, params=SamplingParams(max_tokens=5, seed=1))
    assert len(set(out.drawn)) >= 4


def test_weights_and_parameters_are_set_and_shown(sampler):
    shown = typed(
        sampler, "/weights joy=1", "/w 0.2,0.8", "/w", "/set temperature 0.7", "/set stop .",
        '/set stop ["a", "b"]', "/set stop 5", "/set stop none", "/set ignore_eos True",
        "/set stop_token_ids [3, 4]", "/set seed none", "/show",
    )  # fmt: skip
    assert shown[1:12] == [
        "weights joy=1,brief=0", "weights joy=0.2,brief=0.8", "weights joy=0.2,brief=0.8",
        "temperature 0.7", "stop ['.']", "stop ['a', 'b']", "stop ['5']", "stop []",
        "ignore_eos True", "stop_token_ids [3, 4]", "seed none",
    ]  # fmt: skip
    assert "weights joy=0.2,brief=0.8" in shown[12:] and "temperature 0.7" in shown[12:]


def test_what_is_set_holds_for_the_next_prompt(sampler):
    shown = typed(sampler, "/w joy=1", "/set seed 9", "/set max_tokens 3", "Mia was sad.")
    assert shown[4:5] == expected(sampler, "Mia was sad.", [1, 0], seed=9, max_tokens=3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/fly", "unknown command '/fly'"),
        ("/", "unknown command '/'"),
        ("/w joi=1", "unknown objective 'joi'"),
        ("/w joy=2", "sum to 1"),
        ("/w [", "is not a number"),
        ("/set", "takes one of max_tokens"),
        ("/set temprature 1", "got 'temprature'"),
        ("/set temperature", "needs a value, such as 1.0"),
        ("/set temperature hot", "temperature must be a number"),
        ("/set temperature NaN", "temperature must be a number"),
        ("/set n 0", "n must be"),
        ("/set stop [1]", "stop must be a list of"),
        ("/set stop " + "[" * 100_000, "stop must hold"),
    ],
)
def test_a_bad_command_is_one_line_of_error_and_changes_nothing(sampler, line, message):
    shown = typed(sampler, "/show", line, "/show")
    at = next(i for i, text in enumerate(shown) if text.startswith("error: "))
    assert message in shown[at]
    assert shown[1:at] == shown[at + 1 : -1]


def test_a_bad_prompt_is_one_line_of_error(sampler):
    shown = typed(sampler, "/set max_tokens 100000", "Tom", "/set max_tokens 2", "Tom")
    assert shown[2].startswith("error: prompt has") and "context" in shown[2]
    assert shown[4:5] == expected(sampler, "Tom", [0.5, 0.5], max_tokens=2)


def test_a_failed_forward_is_one_line_of_error(sampler, failing):
    with failing(sampler.policy.model):
        shown = typed(sampler, "Tom")
    assert any(text == "error: RuntimeError: no memory" for text in shown)


def test_a_fault_of_the_sampler_is_raised(monkeypatch):
    """It is no line of error, after which the loop would go on."""
    own = Sampler(Policy.create("tiny", ["joy", "brief"], r=2), max_batch_size=4)
    monkeypatch.setattr(own.scheduler, "prefilled", lambda batch: None + 1)
    with pytest.raises(TypeError, match="NoneType"):
        typed(own, "Tom had a red kite.")


def test_several_completions_stand_below_each_other(sampler):
    texts = expected(sampler, "Tom had a red kite.", [0.5, 0.5], n=3)
    shown = typed(sampler, "/set n 3", "Tom had a red kite.")
    assert shown[2:5] == [f"{i}: {text}" for i, text in enumerate(texts, start=1)]


def test_two_slashes_are_a_prompt_with_one(sampler):
    shown = typed(sampler, "//x")
    assert shown[1:2] == expected(sampler, "/x", [0.5, 0.5])


def test_ends(sampler):
    for end in ("/quit", "/q", EOFError(), KeyboardInterrupt()):
        assert len(typed(sampler, end, "/fly")) <= 2
    assert typed(sampler, "/help")[1 : 1 + HELP.count("\n")] == HELP.splitlines()


class Interrupting(io.StringIO):
    """Ctrl-C, once or more, while the n-th piece is shown."""

    def __init__(self, pieces, times=1):
        super().__init__()
        self.left, self.times = pieces, times

    def write(self, text):
        self.left -= 1
        for _ in range(self.times if self.left == 0 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


def test_ctrl_c_stops_the_completion_and_the_loop_goes_on(sampler):
    begin, before = sampler.tokens_drawn, signal.getsignal(signal.SIGINT)
    shown = typed(sampler, "Tom had a red kite.", "/w", params=LONG, out=Interrupting(5))
    assert sampler.tokens_drawn - begin < 20
    assert shown[1].endswith(" [stopped]") and shown[2] == "weights joy=0.5,brief=0.5"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_does_not_wait_for_the_step(sampler):
    shown = typed(sampler, "Tom", "/w", params=LONG, out=Interrupting(4, 2))
    assert shown[1].endswith(" [stopped]") and shown[2].startswith("weights")


def test_outside_the_main_thread(sampler):
    """Where no signal handler can be set."""
    shown = []
    thread = threading.Thread(target=lambda: shown.extend(typed(sampler, "Tom")))
    thread.start()
    thread.join()
    assert shown[1:2] == expected(sampler, "Tom", [0.5, 0.5])


def test_first_weights(sampler):
    assert typed(sampler, weights="joy=2", simplex=False)[0].startswith("weights joy=2,brief=0;")
    with pytest.raises(ValueError, match="sum to 1"):
        typed(sampler, weights="joy=2")


# Conversations


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def chatting(chat_model):
    return Sampler(Policy.create(chat_model, ["joy", "brief"], r=2), max_batch_size=4)


def test_a_conversation_goes_on_until_it_is_ended(chatting):
    """The model gets all messages before; what the loop shows is what it answers."""
    shown = typed(chatting, "Tom had a kite.", "Mia", "/new Be kind.", "Sam", chat=True)[1:-1]
    first = expected(chatting, [user("Tom had a kite.")], [0.5, 0.5])
    talk = [user("Tom had a kite."), answer(first[0]), user("Mia")]
    second = expected(chatting, talk, [0.5, 0.5])
    system = {"role": "system", "content": "Be kind."}
    third = expected(chatting, [system, user("Sam")], [0.5, 0.5])
    assert shown == [*first, *second, *third]
    alone = expected(chatting, [user("Mia")], [0.5, 0.5])
    assert second != alone  # or the test could not fail
    assert typed(chatting, "Tom had a kite.", "/new", "Mia", chat=True)[1:-1] == [*first, *alone]


def test_the_first_of_several_answers_is_the_one_that_is_followed(chatting):
    shown = typed(chatting, "/set n 2", "Tom had a kite.", "/set n 1", "Mia", chat=True)[1:-1]
    two = expected(chatting, [user("Tom had a kite.")], [0.5, 0.5], n=2)
    talk = [user("Tom had a kite."), answer(two[0]), user("Mia")]
    assert [line.removeprefix("1: ").removeprefix("2: ") for line in shown[1:3]] == two
    assert shown[4:] == expected(chatting, talk, [0.5, 0.5])


def test_a_message_that_is_refused_is_not_part_of_the_conversation(chatting):
    long = "Tom " * 300
    shown = typed(chatting, "Tom had a kite.", long, "Mia", chat=True)[1:-1]
    first = expected(chatting, [user("Tom had a kite.")], [0.5, 0.5])
    assert "exceeds the context of" in shown[1]
    talk = [user("Tom had a kite."), answer(first[0]), user("Mia")]
    assert shown[2:] == expected(chatting, talk, [0.5, 0.5])


def test_new_is_for_conversations(sampler):
    assert typed(sampler, "/new")[1] == "error: /new is for conversations (--chat)"
