"""Reward functions are called as TRL calls them; what they return is checked."""

import array
import asyncio
import collections
import functools
import itertools
import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from unittest.mock import AsyncMock, Mock

import numpy as np
import pytest
import torch
from transformers import TrainerState

from clp.data import scoring
from clp.data.scoring import RewardLog, dry_call
from clp.rewards import brevity, rouge


def score(reward_funcs, prompts, completions, columns, **changes):
    options = {
        "completion_ids": [[1]] * len(completions), "trainer_state": TrainerState(),
        "log": RewardLog(),
    }  # fmt: skip
    return scoring.score(reward_funcs, prompts, completions, columns, **(options | changes))


# The reward matrix


def constant(values):
    return lambda prompts, completions, **columns: values


def test_score():
    def listener(completions, topic, **columns):
        assert columns["prompts"] == ["p", "q"] and columns["reference"] == ["b", "c d"]
        return [len(text) + len(name) for text, name in zip(completions, topic, strict=True)]

    funcs = {"talk": listener, "brief": brevity, "match": rouge}
    columns = {"reference": ["b", "c d"], "topic": ["xx", "y"]}
    matrix = score(funcs, ["p", "q"], ["a b", "c d"], columns)
    assert matrix.dtype == torch.float32 and matrix.is_contiguous()
    expected = [[5, math.exp(-0.1), 2 / 3], [4, math.exp(-0.1), 1]]
    torch.testing.assert_close(matrix, torch.tensor(expected))
    swapped = score(dict(reversed(funcs.items())), ["p", "q"], ["a b", "c d"], columns)
    assert torch.equal(swapped, matrix.flip(1))
    assert score(funcs | {"talk": brevity}, [], [], {"reference": []}).shape == (0, 3)


@pytest.mark.parametrize(
    "values",
    [
        [True, False],
        (1, 0.0),
        [Fraction(1), np.float32(0)],
        [np.bool_(True), np.int64(0)],
        [torch.tensor(1.0), torch.tensor(False)],
        np.array([1, 0]),
        torch.tensor([1.0, 0.0], dtype=torch.bfloat16),
        pytest.param(map(float, "10"), id="map"),  # its own id has its address
        np.array([1, 0], dtype=object),
        [Decimal("1.0"), Decimal(0)],
        pytest.param({"a": 1.0, "b": 0.0}.values(), id="values of a dict"),
        pytest.param(collections.deque([1.0, 0.0]), id="deque"),
        pytest.param(array.array("d", [1, 0]), id="array.array"),
        torch.tensor([1.0, 0.0], requires_grad=True),
        np.ma.masked_array([1.0, 0.0]),
        torch.tensor([[1.0], [0.0]]),  # logits of a reward model, which TRL 1.16 takes
        [torch.tensor([1.0]), torch.tensor([[0.0]])],
        torch.tensor([1.0, 0.0]).to_sparse(),
    ],
    ids=str,
)
def test_score_accepts_numbers(values):
    matrix = score({"x": constant(values)}, ["p"] * 2, ["a"] * 2, {})
    assert matrix.dtype == torch.float32 and matrix.tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ("0.5", TypeError, "'0.5', a str"),
        (1j, TypeError, "1j, a complex"),
        ([0.5], TypeError, "a list"),
        (torch.zeros((), device="meta"), TypeError, "a tensor that has none: .*meta"),
        (torch.ones(2), TypeError, "a Tensor"),
        ((1.0,), TypeError, "a tuple"),
        (b"1", TypeError, "a bytes"),
        (np.str_("x"), TypeError, "'x', a str_"),
        (math.nan, ValueError, "nan, not finite"),
        (-math.inf, ValueError, "-inf, not finite"),
        (np.float64("nan"), ValueError, "nan, not finite"),
        (1e39, ValueError, r"1e\+39, not finite in float32"),
        (10**400, ValueError, "not finite in float32"),
    ],
    ids=str,
)
def test_score_refuses_values(bad, error, message):
    funcs = {"good": constant([0, 0, 0]), "bad": constant([0, 1.0, bad])}
    expected = f"^reward 'bad', row 2: expected a finite number, got .*{message}"
    with pytest.raises(error, match=expected):
        score(funcs, ["p"] * 3, ["a"] * 3, {})


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([0, 0], ValueError, "list of 3 numbers, got 2$"),
        ([0] * 4, ValueError, "got 4$"),
        (np.zeros(2), ValueError, "got 2$"),
        (0.5, TypeError, "got 0.5$"),
        (torch.tensor(0.5), TypeError, "got 0.5$"),
        (torch.zeros(2, 1), ValueError, "got 2$"),
        (torch.zeros(3, device="meta"), TypeError, "got a tensor that has no list: .*meta"),
        (torch.nested.nested_tensor([torch.ones(1)] * 3), TypeError, "got a tensor that has no"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8), TypeError, "no list: "),
        (None, TypeError, "got None$"),
        ("abc", TypeError, "got 'abc'$"),
        ({0: 1, 1: 1, 2: 1}, TypeError, "got {"),
        ((x for x in range(4)), ValueError, "got 4$"),
        (itertools.repeat(1.0), ValueError, "got 4$"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_score_refuses_lists(values, error, message):
    with pytest.raises(error, match=f"^reward 'bad' must return .*{message}"):
        score({"good": brevity, "bad": constant(values)}, ["p"] * 3, ["a"] * 3, {})


def test_score_refuses_uneven_columns():
    with pytest.raises(ValueError, match=r"'completion_ids' must have .* got 1 values for 2"):
        score({"x": brevity}, ["p", "q"], ["a", "b"], {}, completion_ids=[[1]])
    with pytest.raises(ValueError, match=r"'prompts' must have .* got 1 values for 2 completions"):
        score({"x": brevity}, ["p"], ["a", "b"], {})
    with pytest.raises(ValueError, match=r"'topic' must have .* got 3 values for 2 completions"):
        score({"x": brevity}, ["p", "q"], ["a", "b"], {"topic": [1, 2, 3]})
    with pytest.raises(ValueError, match="reward_funcs is empty"):
        score({}, ["p"], ["a"], {})


class CustomError(Exception):
    pass


def test_one_bad_reward_leaves_nothing_behind():
    def vandal(prompts, completions, topic, **columns):
        for rows in (prompts, completions, topic):
            rows.clear()
        return [1.0, 1.0]

    def failing(prompts, completions, **columns):
        raise CustomError("out of order")

    prompts, completions, columns = ["p", "q"], ["a", "b c"], {"topic": ["x", "y"]}
    funcs = {"vandal": vandal, "brief": brevity, "failing": failing}
    matrix = None
    with pytest.raises(CustomError, match="out of order"):
        matrix = score(funcs, prompts, completions, columns)
    assert matrix is None
    assert (prompts, completions, columns) == (["p", "q"], ["a", "b c"], {"topic": ["x", "y"]})
    del funcs["failing"]
    matrix = score(funcs, prompts, completions, columns)
    assert matrix[:, 1].tolist() == pytest.approx(brevity(prompts, completions))
    assert matrix[:, 0].tolist() == [1, 1]


def test_what_a_function_raises_names_the_objective():
    def failing(**kwargs):
        raise CustomError("out of order")

    async def failing_later(**kwargs):
        raise CustomError("out of order")

    for function in (failing, failing_later):
        with pytest.raises(CustomError) as caught:
            score({"brief": brevity, "odd": function}, ["p"], ["a"], {})
        assert caught.value.__notes__ == ["raised by reward 'odd', called on 1 completions"]


# The arguments

STATE = TrainerState(global_step=3, max_steps=9)


def call(function, prompts=("p", "q"), **changes):
    options = {"completion_ids": [[5, 6], [7]], "trainer_state": STATE}
    return score({"it": function}, prompts, ["a b", "c"], {"topic": ["x", "y"]},
                 **(options | changes))[:, 0].tolist()  # fmt: skip


def test_a_function_with_keywords_gets_all_that_trl_passes():
    seen, log = {}, RewardLog()

    def function(**kwargs):
        seen.update(kwargs)
        return [1, 2]

    assert call(function, log=log) == [1, 2]
    assert seen.pop("log_extra")("c", [3, 4]) is None and log.extra == {"it": {"c": [3, 4]}}
    assert seen == {
        "prompts": ["p", "q"], "completions": ["a b", "c"], "completion_ids": [[5, 6], [7]],
        "topic": ["x", "y"], "trainer_state": STATE, "log_metric": log.log_metric,
    }  # fmt: skip


class Named:
    def __call__(self, completions, *, completion_ids):
        return [len(ids) for ids in completion_ids]


class Module(torch.nn.Module):
    def forward(self, completion_ids):
        return torch.tensor([float(len(ids)) for ids in completion_ids])


def counts(completion_ids, least):
    return [max(least, len(ids)) for ids in completion_ids]


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize(
    "function",
    [
        lambda completion_ids: [len(ids) for ids in completion_ids],
        Named(),
        Named().__call__,
        Module(),
        functools.partial(counts, least=0),
        decorated(lambda completion_ids: [len(ids) for ids in completion_ids]),
    ],
    ids=["lambda", "class", "method", "module", "partial", "decorated"],
)  # fmt: skip
def test_a_function_without_keywords_gets_what_it_names(function):
    assert call(function) == [2, 1]


def test_a_decorators_own_arguments_count():
    """functools.wraps names another function, which may take other arguments, or fewer."""

    def per_example(function):
        @functools.wraps(function)
        def wrapper(prompts, completions, **columns):
            return [function(*pair) for pair in zip(prompts, completions, strict=True)]

        return wrapper

    @per_example
    def longer(prompt, completion):
        return float(len(completion))

    assert call(longer) == [3, 1]

    def least(function):
        @functools.wraps(function)
        def wrapper(completions, topic=None, log_metric=None):
            assert topic == ["x", "y"] and log_metric is not None
            return function(completions)

        return wrapper

    assert call(least(lambda completions: [len(c) for c in completions])) == [3, 1]

    @functools.wraps(longer.__wrapped__)
    def bare(*args, **kwargs):
        return [len(text) for text in kwargs["completions"]]

    assert call(bare) == [3, 1]


def test_functions_of_two_arguments_work_with_columns():
    assert call(lambda prompts, completions: [len(c) for c in completions]) == [3, 1]


def test_a_missing_column_is_python_s_own_error():
    with pytest.raises(TypeError, match="mood"):
        call(lambda completions, mood: [0, 0])


@pytest.mark.parametrize("name", scoring.ARGUMENTS)
def test_a_column_with_the_name_of_an_argument_is_refused(name):
    with pytest.raises(ValueError, match=f"column '{name}' has the name of an argument"):
        score({"x": brevity}, ["p"], ["a"], {name: [1]})


def test_conversations():
    prompts = [[{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Ho"}]]
    seen = []

    def vandal(prompts, completions, completion_ids, topic, **kwargs):
        seen.extend(zip(prompts, completions, strict=True))
        for one in (*prompts, *completions):
            one[0]["content"] = "changed"
        completion_ids[0].clear()
        topic[0]["a"].append(1)
        return [0, 0]

    topic, ids = [{"a": []}, {"a": []}], [[5, 6], [7]]
    matrix = score(
        {"vandal": vandal, "brief": brevity, "count": Named()}, prompts, ["a b", "c"],
        {"topic": topic}, completion_ids=ids,
    )  # fmt: skip
    assert [c for _, c in seen] == [[{"role": "assistant", "content": "changed"}]] * 2
    assert prompts[0] == [{"role": "user", "content": "Hi"}]
    assert topic[0] == {"a": []} and ids == [[5, 6], [7]]
    assert matrix[:, 1].tolist() == pytest.approx(brevity([], ["a b", "c"]))
    assert matrix[:, 2].tolist() == [2, 1]


# Rewards that do not apply


def test_none_is_nan_and_none_of_all_is_an_error():
    some = constant([None, 2.0, 0])
    matrix = score({"some": some, "other": constant([1, None, 1])}, ["p"] * 3, ["a"] * 3, {})
    assert matrix.isnan().tolist() == [[True, False], [False, True], [False, False]]
    assert matrix.nan_to_num(9).tolist() == [[9, 1], [2, 9], [0, 1]]
    both = {"some": some, "other": constant([1, 1, None]), "third": constant([None, None, None])}
    assert score(both, ["p"] * 3, ["a"] * 3, {}).shape == (3, 3)
    never = {"some": some, "third": constant([None, None, None])}
    with pytest.raises(ValueError, match=r"every reward \(some, third\) returned None for row 0: "
                                         r"prompt 'why', completion 'so'"):  # fmt: skip
        score(never, ["why", "p", "p"], ["so", "a", "a"], {})


# Async functions


def test_async_functions_run_beside_each_other_and_beside_the_others():
    """Each waits until all have started: one after the other, they would wait for ever."""
    started = {name: threading.Event() for name in ("a", "b", "plain")}

    async def wait(name, completions):
        started[name].set()
        while not all(event.is_set() for event in started.values()):
            await asyncio.sleep(0.001)
        return [1.0] * len(completions)

    async def a(completions, **kwargs):
        return await asyncio.wait_for(wait("a", completions), 20)

    class B:
        async def __call__(self, completions, **kwargs):
            return await asyncio.wait_for(wait("b", completions), 20)

    def plain(completions, **kwargs):
        started["plain"].set()
        assert started["a"].wait(20) and started["b"].wait(20)
        return [2.0] * len(completions)

    funcs = {"plain": plain, "a": a, "b": functools.partial(B(), extra=1)}
    assert score(funcs, ["p"], ["x"], {}).tolist() == [[2, 1, 1]]


def test_async_functions_keep_one_event_loop_between_calls():
    loops = []

    async def later(completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    for _ in range(2):
        score({"later": later, "lambda": lambda **kw: later(**kw)}, ["p"], ["a"], {})
    assert len(loops) == 4 and len(set(loops)) == 1 and not loops[0].is_closed()


def test_async_functions_run_where_a_loop_runs_already():
    async def later(completions, **kwargs):
        return [float(len(text)) for text in completions]

    async def notebook():
        return score({"later": later}, ["p"], ["abc"], {})

    assert asyncio.run(notebook()).tolist() == [[3]]


def test_a_failure_ends_the_async_functions_that_still_run():
    ended = threading.Event()

    async def endless(**kwargs):
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    def failing(**kwargs):
        time.sleep(0.05)
        raise CustomError

    with pytest.raises(CustomError):
        score({"endless": endless, "failing": failing}, ["p"], ["a"], {})
    assert ended.wait(20)


@pytest.mark.parametrize("value", [[1.0, 2.0], None, [math.nan]])
def test_results_of_async_functions_are_checked(value):
    async def odd(**kwargs):
        return value

    with pytest.raises((ValueError, TypeError), match="reward 'odd'"):
        score({"odd": odd}, ["p"], ["a"], {})


class Judge:
    """Rewards as methods of an object, with a client that they share."""

    def __init__(self):
        self.calls = 0

    async def later(self, completion_ids, *, scale=1):
        self.calls += 1
        await asyncio.sleep(0)
        return np.array([scale * len(ids) for ids in completion_ids])

    @staticmethod
    async def fixed(completion_ids, **kwargs):
        return torch.tensor([float(len(ids)) for ids in completion_ids])

    @classmethod
    def of_class(cls, completion_ids, missing="default", /, **kwargs):
        return [len(ids) for ids in kwargs.get("completion_ids", completion_ids)]


@pytest.mark.parametrize(
    "function",
    [
        Judge().later,
        functools.partial(Judge().later, scale=1),
        Judge.fixed,
        AsyncMock(return_value=[2, 1]),
        Mock(return_value=(2.0, 1.0)),
        lambda completion_ids, absent=None: [len(ids) for ids in completion_ids],
        functools.partial(lambda topic, completion_ids: [len(i) for i in completion_ids], topic=9),
    ],
    ids=["async method", "partial of it", "async static", "AsyncMock", "Mock", "default",
         "partial of a column"],
)  # fmt: skip
def test_more_that_can_be_called(function):
    """The first three are awaited, and all get what they name."""
    assert call(function) == [2, 1]


def test_logs_from_threads_and_from_async_functions():
    async def later(completions, log_extra, log_metric, **kwargs):
        await asyncio.sleep(0)
        log_extra("tokens", torch.tensor([[1], [2]]))
        log_metric("cost", np.float32(3))
        return [0, 0]

    def threads(completions, log_metric, **kwargs):
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda text: log_metric("cost", len(text)), completions))
        return [0, 0]

    log = RewardLog()
    score({"later": later, "threads": threads}, ["p", "q"], ["a", "bb"], {}, log=log)
    assert log.extra == {"later": {"tokens": [[1], [2]]}} and log.means() == {"cost": 2.0}


@pytest.mark.parametrize("error", [asyncio.CancelledError, TimeoutError, CustomError])
def test_async_functions_that_end_themselves_are_named(error):
    """As a client with a deadline of its own does."""

    async def late(**kwargs):
        await asyncio.sleep(0)
        raise error

    with pytest.raises(Exception) as caught:
        score({"brief": brevity, "late": late}, ["p"], ["a"], {})
    assert caught.value.__notes__ == ["raised by reward 'late', called on 1 completions"]
    assert score({"brief": brevity}, ["p"], ["a"], {}).shape == (1, 1)


# What functions log


@pytest.mark.parametrize("value", [None, "much", [1], 10**400])
def test_a_metric_that_is_no_number_is_named(value):
    with pytest.raises((TypeError, ValueError), match="log_metric: 'cost' must be a number, got"):
        RewardLog().log_metric("cost", value)


@pytest.mark.parametrize("values", [None, 3, "abc", torch.tensor(1.0), np.array(3)])
def test_a_column_that_is_no_list_is_named(values):
    log = RewardLog()
    with pytest.raises(TypeError, match="log_extra: 'size' needs a list, one value per completion"):
        log.log_extra("joy", "size", values)
    assert log.extra == {}


def test_logs():
    def function(completions, log_extra, log_metric, **kwargs):
        log_extra("size", np.array([1.5, math.nan]))
        log_extra("first", ["x"])
        log_extra("first", [{"set": {1}, "object": Fraction(1, 2)}])
        log_metric("judge/cost", 1)
        log_metric("judge/cost", torch.tensor(2.0))
        log_metric("nothing", math.nan)
        return [0, 0]

    log = RewardLog()
    score({"x": function, "y": function}, ["p", "q"], ["a", "b"], {}, log=log)
    own = {"size": [1.5, None], "first": ["x", {"set": [1], "object": "1/2"}]}
    assert log.extra == {"x": own, "y": own}
    assert log.means() == {"judge/cost": 1.5, "nothing": None}
    json.dumps([log.extra, log.means()], allow_nan=False)


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda extra, metric: extra("c", [1]), ValueError, r"log_extra\('c', values\) needs"),
        (lambda extra, metric: extra(3, [1, 2]), TypeError, "column must be a string"),
        (lambda extra, metric: metric("loss", 1), ValueError, "'loss' is a metric of"),
        (lambda extra, metric: metric(3, 1), TypeError, "name must be a string"),
    ],
)
def test_bad_logs(use, error, message):
    def function(log_extra, log_metric, **kwargs):
        use(log_extra, log_metric)
        return [0, 0]

    log = RewardLog(frozenset({"loss"}))
    with pytest.raises(error, match=message):
        score({"x": function}, ["p", "q"], ["a", "b"], {}, log=log)


# The call before anything is sampled


def tokenizer(text, add_special_tokens):
    assert not add_special_tokens
    return {"input_ids": [ord(c) for c in text]}


def test_the_dry_call_has_a_row_of_each_kind(tmp_path):
    path = tmp_path / "p.jsonl"
    values = ["a", "b", 7, 8, None, ["x"], ["y", 1], "c"]
    rows = [{"prompt": f"p{i}", "reference": value} for i, value in enumerate(values)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer, seen = Mock(return_value={"input_ids": [1]}), []

    def function(prompts, **columns):
        seen.append((prompts, columns["reference"]))
        return [0.0] * len(prompts)

    dry_call({"x": function}, rows, tokenizer, STATE)
    wanted = [["a", "c"], [7], [None], [["x"]], [["y", 1]]]
    assert [references for _, references in seen] == wanted
    with pytest.raises(TypeError, match=r"p\.jsonl:3: column 'reference', row 0: expected a str"):
        dry_call({"x": rouge}, rows, tokenizer, STATE, path=path)
    with pytest.raises(ValueError, match=r"train_dataset\[1\]: every reward \(x\) returned None"):
        dry_call({"x": rouge}, [rows[0], rows[4], rows[1]], tokenizer, STATE)
    dry_call({"x": rouge, "y": brevity}, [rows[0], rows[4], rows[1]], tokenizer, STATE)


def test_the_dry_call_has_two_rows_and_two_completions():
    seen = []

    def function(prompts, completions, completion_ids, topic, trainer_state, log_extra):
        log_extra("c", [1, 2])
        seen.append((prompts, topic, trainer_state.max_steps))
        assert completion_ids == [[ord(c) for c in text] for text in completions]
        return [1, 2]

    rows = [{"prompt": text, "topic": text.upper()} for text in "abc"]
    dry_call({"x": function}, rows, tokenizer, STATE)
    dry_call({"x": function}, rows[:1], tokenizer, STATE)
    assert seen == [(["a", "c"], ["A", "C"], 9), (["a", "a"], ["A", "A"], 9)]
    with pytest.raises(ValueError, match="list of 2 numbers, got 3"):
        dry_call({"x": constant([1, 2, 3])}, rows, tokenizer, STATE)
