"""What tells functions given in Python apart when a run is resumed."""

import importlib.util
import itertools
import json
import math
import os
import re
import sys
import threading
import time
from argparse import Namespace
from array import array
from collections import ChainMap, Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum, Flag, StrEnum
from fractions import Fraction
from functools import cached_property, lru_cache, partial, update_wrapper, wraps
from operator import itemgetter, methodcaller
from pathlib import Path
from types import MappingProxyType
from unittest.mock import Mock
from xmlrpc.client import ServerProxy

import numpy as np
import pytest
import torch
import transformers
from processes import python
from rapidfuzz import fuzz
from tiny_runs import ROWS, config, resumed

from clp.data.paths import TINY
from clp.rewards import brevity, sentiment
from clp.training.config import CLPConfig
from clp.training.function_identity import distinctive, insides_of, swapped
from clp.training.run_folder import Inputs
from clp.training.trainer import CLPTrainer


def mood(prompts, completions, mood, **columns):
    return [float(value) for value in mood]


def calm(completions, value=1.0, **columns):
    return [value for _ in completions]


@dataclass
class Judge:
    words: set


def times(factor):
    def scaled(completions, **columns):
        return [factor for _ in completions]

    return scaled


def signed(function, sign):
    @wraps(function)
    def reward(**columns):
        return [sign * value for value in function(**columns)]

    return reward


def scaled_by(factor):
    def reward(completions, factor=factor, **columns):
        return [factor * len(text) for text in completions]

    return reward


class Signed:
    def __init__(self, sign):
        self.sign = sign

    def score(self, completions, **columns):
        return [self.sign * len(text) for text in completions]

    __call__ = score


def judged(completions, judge, **columns):
    return judge(completions)


def matching(pattern):
    """Reads a module in its closure."""
    import re as module

    def reward(completions, **columns):
        return [float(len(module.findall(pattern, text))) for text in completions]

    return reward


class Slotted:
    __slots__ = ("sign",)

    def __init__(self, sign):
        self.sign = sign

    def __call__(self, completions, **columns):
        return [self.sign * len(text) for text in completions]


def made_class(sign):
    class Made:
        def __call__(self, completions, **columns):
            return [sign * len(text) for text in completions]

    return Made()


def negative(text):
    return -len(text)


def judging(judge):
    """A class whose call is inherited, and whose other methods read the closure."""

    class Judging(Signed):
        @property
        def longest(self):
            return max(map(judge, "ab"))

        @cached_property
        def judged(self):
            return judge

        def score(self, completions, **columns):
            return list(map(self.judged, completions))

    return Judging(1)


def with_attributes(sign):
    def reward(completions, **columns):
        return [float(reward.sign * len(text)) for text in completions]

    reward.sign = sign
    return reward


def of_a_file(sign):
    """As frameworks load the file of a reward, under a name of their own."""
    values = {"__name__": "custom_module", "SIGN": sign}
    text = "def score(completions, **_): return [float(SIGN == 0) for text in completions]"
    exec(text, values)
    return values["score"]


def by_a_helper(expression):
    values = {"__name__": "custom_module"}
    exec(
        f"def helper(text): return {expression}\n"
        "def score(completions, **_): return [helper(text) for text in completions]",
        values,
    )
    return values["score"]


class Decorated:
    def __init__(self, function, factor):
        update_wrapper(self, function)
        self.function, self.factor = function, factor

    def __call__(self, **columns):
        return [self.factor * value for value in self.function(**columns)]


class Sign(torch.nn.Module):
    def __init__(self, sign):
        super().__init__()
        self._sign = sign

    def forward(self, completions, **columns):
        return [self._sign * len(text) for text in completions]


def local_module(judge):
    class Local(torch.nn.Module):
        def forward(self, completions, **columns):
            return list(map(judge, completions))

    return Local()


def by_class_method(judge):
    class Judged(Signed):
        @classmethod
        def longest(cls, completions):
            return list(map(judge, completions))

        def score(self, completions, **columns):
            return self.longest(completions)

    return Judged(1)


def called_words(judge):
    class Words(UserList):
        def __call__(self, completions, **columns):
            return list(map(judge, completions))

    return Words(["a"])


def scaled_class(factor):
    class Scaled(Signed):
        weight = factor

    return Scaled(1)


class Beside(Signed):
    """Holds what changes by itself, and what has no numbers to read."""

    def __init__(self, sign):
        super().__init__(sign)
        self.thread, self.pool = threading.Thread(target=print), ThreadPoolExecutor(1)
        self.pool.submit(int).result()
        self.odd = [torch.eye(3).to_sparse(), torch.empty(2, device="meta"), 1 << 20_000, self]
        self.keys = {(1, (2,)): 3, Signed(1): 4}


class Scorer(torch.nn.Module):
    def __init__(self, sign):
        super().__init__()
        self.register_buffer("sign", torch.tensor(sign))

    def forward(self, completions):
        return [float(self.sign) * len(text) for text in completions]


class Table(Signed):
    def __init__(self, sign):
        self.table = torch.full((100, 100), float(sign))
        self.sign = 1


class Topic(Enum):
    JOY = "a"
    SAD = "e"


def pooled(completions, pool, **columns):
    return [float(pool([len(word) for word in text.split()] or [0])) for text in completions]


def held(value):
    """A function that reads `value` in its closure."""

    def reward(completions, **columns):
        assert value is not None
        return [float(len(text)) for text in completions]

    return reward


def by_judge(judge):
    return lambda completions, **columns: [float(bool(judge(c))) for c in completions]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (mood, calm),
        (partial(calm, value=1.0), partial(calm, value=2.0)),
        (times(1.0), times(-1.0)),
        (lambda completions, **_: [1.0] * len(completions),
         lambda completions, **_: [2.0] * len(completions)),
        (lambda completions, **_: [len(c) for c in completions],
         lambda completions, **_: [c.count("e") for c in completions]),
        (lambda completions, **_: [len(c) for c in completions],
         lambda completions, **_: [-len(c) for c in completions]),
        (lambda completions, joy, **_: list(map(float, joy)),
         lambda completions, brief, **_: list(map(float, brief))),
        (signed(sentiment, 1), signed(sentiment, -1)),
        (signed(lambda completions, **_: [1.0] * len(completions), 1),
         signed(lambda completions, **_: [2.0] * len(completions), 1)),
        (scaled_by(1.0), scaled_by(2.0)),
        (by_judge(Signed(1)), by_judge(Signed(-1))),
        (partial(judged, judge=Signed(1)), partial(judged, judge=Signed(-1))),
        (partial(judged, judge=lambda c: [1.0] * len(c)),
         partial(judged, judge=lambda c: [2.0] * len(c))),
        (Signed(1).score, Signed(-1).score),
        (Signed(1), Signed(-1)),
        (matching("a"), matching("b")),
        (Slotted(1), Slotted(-1)),
        (made_class(1), made_class(-1)),
        (judging(len), judging(negative)),
        (judging(lambda text: text.count("a")), judging(lambda text: -len(text))),
        (scaled_class(1), scaled_class(2)),
        (with_attributes(1), with_attributes(-1)),
        (of_a_file(1), of_a_file(-1)),
        (of_a_file(["a", "b"]), of_a_file(["a", "c"])),
        (of_a_file({"a": {"e": 1}}), of_a_file({"a": {"e": 2}})),
        (by_a_helper("len(text)"), by_a_helper("-len(text)")),
        (Decorated(brevity, 1), Decorated(brevity, -1)),
        (held(lru_cache(held(1))), held(lru_cache(held(2)))),
        (Sign(1), Sign(-1)),
        (held(torch.nn.Sequential(Sign(1))), held(torch.nn.Sequential(Sign(-1)))),
        (local_module(len), local_module(negative)),
        (by_class_method(len), by_class_method(negative)),
        (called_words(len), called_words(negative)),
        (held(judging(len)), held(judging(negative))),
        (held(type(judging(len))), held(type(judging(negative)))),
        (Beside(1), Beside(-1)),
        (Scorer(1), Scorer(-1)),
        (Table(1), Table(-1)),
        (partial(pooled, pool=max), partial(pooled, pool=min)),
        (by_judge("Is {} joyful?".format), by_judge("Is {} brief?".format)),
        (held(Namespace(sign=1)), held(Namespace(sign=-1))),
        (held(UserList([1, 2, 1])), held(UserList([1, 2, 2]))),
        (held({"words": [f"w{i}" for i in range(20_000)], "more": [{"sign": 1}]}),
         held({"words": [f"w{i}" for i in range(20_000)], "more": [{"sign": -1}]})),
        (held(itemgetter(1)), held(itemgetter(2))),
        (held({Topic.JOY: 1}), held({Topic.SAD: 1})),
        (held({Path("a"): 1}), held({Path("e"): 1})),
        (held({Path("a"), Path("b"), frozenset({Topic.JOY})}),
         held({Path("a"), Path("e"), frozenset({Topic.JOY})})),
        (held(math), held(json)),
        (held(torch.nn.Sequential(torch.nn.ReLU())), held(torch.nn.Sequential(torch.nn.GELU()))),
    ],
    ids=["other functions", "other parameters", "closures", "constants", "lambdas", "operators",
         "columns", "wraps", "wrapped lambdas", "defaults", "objects in closures",
         "objects in partials", "lambdas in partials", "methods", "objects", "modules in closures",
         "slots", "classes",
         "functions in classes", "lambdas in classes", "numbers in classes",
         "attributes of functions", "constants of files", "lists of files",
         "dicts of files", "helpers of files", "decorators that are objects",
         "cached functions", "private attributes of modules",
         "modules in modules", "modules of classes", "class methods", "lists that are called",
         "objects of classes in closures", "classes in closures",
         "objects with threads", "buffers", "large tensors", "built-in functions",
         "methods of texts", "namespaces", "lists", "behind a large list", "getters", "enum keys",
         "path keys", "sets of paths", "modules",
         "modules of PyTorch"],
)  # fmt: skip
def test_functions_that_have_changed_places_are_told_apart(one, other):
    """Under each other's name, the adapter of one would train on the other."""
    then = distinctive({"a": insides_of(one), "b": insides_of(other)})
    assert swapped(then, {"b": insides_of(other), "a": insides_of(one)}) is None
    assert swapped(then, {"b": insides_of(one), "a": insides_of(other)}) == ("a", "b")


@pytest.mark.parametrize(
    ("one", "other"),
    [(times(1.0), times(-1.0)), (Signed(1), Signed(-1))],
    ids=["closures", "objects"],
)
def test_functions_that_have_changed_places_are_refused(tmp_path, one, other):
    CLPTrainer(reward_funcs={"a": one, "b": other}, args=config(tmp_path / "r"), train_dataset=ROWS)
    resumed(tmp_path / "r", {"b": other, "a": one}, ROWS)
    with pytest.raises(ValueError, match="as the reward of a; resume gives what was that of b"):
        resumed(tmp_path / "r", {"a": other, "b": one}, ROWS)


class Lexicon(dict):
    def __init__(self, words, sign):
        super().__init__(words)
        self.sign = sign


class Words(list):
    def __init__(self, sign):
        super().__init__(["a"])
        self.sign = sign


class Hidden(list):
    """Shows none of what it holds."""

    __slots__ = ("__sign",)

    def __init__(self, sign):
        super().__init__([sign])
        self.__sign = sign

    def __iter__(self):
        return iter(())


class Pair(tuple):
    pass


class Bag(set):
    pass


class Text(str):
    """Prints as nothing."""

    def __repr__(self):
        return "..."


class Real(float):
    pass


class Whole(int):
    pass


class Bound(partial):
    pass


class Part(np.ndarray):
    pass


class Grade(StrEnum):
    LOW = "low"
    HIGH = "high"


@dataclass(frozen=True)
class Point:
    name: str
    sign: int


class AnyName:
    """Answers to names that it knows, and raises a KeyError for others."""

    def __init__(self, sign):
        self._known = {"sign": sign}

    def __getattr__(self, name):
        return self.__dict__["_known"][name]


class Asked:
    """Answers to any name, and must not be called."""

    def __init__(self, sign):
        self.sign = sign

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse

    def _refuse(self, *args):
        raise AssertionError("it was called")


class PosingAsDict(Asked):
    __class__ = dict


def attributed(value, sign):
    value.sign = sign
    return value


def hooked(sign, pre=False):
    layer = torch.nn.Identity()
    register = layer.register_forward_pre_hook if pre else layer.register_forward_hook
    register(lambda module, inputs, *output: sign)
    return layer


def settable(sign):
    class Settable:
        value = property(len, lambda self, value: sign)

    return Settable()


# Values that differ by a number, 1 or 2.
def weighted(n):
    module = torch.nn.Linear(2, 2, bias=False)
    module.weight.data.fill_(n)
    return module


def quantised(n):
    return torch.quantize_per_tensor(torch.tensor([1.0 * n]), 0.1, 0, torch.qint8)


def with_sparse(n):
    module = torch.nn.Module()
    module.register_buffer("table", torch.tensor([0.0, n]).to_sparse())
    return module


def times_tensor(n):
    return lambda x: x * n


def tokenizer_with(n):
    made = transformers.AutoTokenizer.from_pretrained(TINY)
    made.add_tokens([f"word{n}"])
    return made


def local_dataclass(n):
    """Its text has the members of a set, in an order of this process."""

    @dataclass
    class Reward:
        words: frozenset = frozenset({"the", "a", "once", "day"})
        sign: float = 1.0 * n

    return Reward()


def local_model(n):
    """Its schema has addresses."""

    class Reward(importlib.import_module("pydantic").BaseModel):
        sign: float = 1.0 * n

    return Reward()


class Modules:
    def __init__(self, modules, value=None):
        self._modules, self.value = modules, value


def causal(n):
    """Its generation configuration keeps a hash of this process."""
    sizes = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=1)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.fill_(n)
    return model


BY_NUMBER = {
    "NumPy float32": np.float32,
    "NumPy float64": np.float64,
    "NumPy longdouble": np.longdouble,
    "NumPy complex64": np.complex64,
    "NumPy int64": np.int64,
    "NumPy uint8": np.uint8,
    "NumPy bool": lambda n: np.bool_(n - 1),
    "NumPy str": lambda n: np.str_(n),
    "NumPy bytes": lambda n: np.bytes_(b"x" * n),
    "NumPy datetime64": lambda n: np.datetime64(n, "s"),
    "unit of a datetime64": lambda n: np.datetime64("NaT", "ms" if n == 1 else "s"),
    "NumPy timedelta64": lambda n: np.timedelta64(n, "s"),
    "NumPy record": lambda n: np.array([(n, "a", [n])], "i4,U1,O")[0],
    "NumPy dtype": lambda n: np.dtype(f"i{4 * n}"),
    "NumPy function": lambda n: [np.add, np.subtract][n - 1],
    "NumPy in a list": lambda n: [np.float32(n)],
    "NumPy in a dict": lambda n: {"w": np.int64(n)},
    "NumPy key": lambda n: {np.int64(n): 1},
    "NumPy in a set": lambda n: {np.int64(n)},
    "NumPy attribute": lambda n: Signed(np.float32(n)),
    "NumPy default": lambda n: scaled_by(np.float32(n)),
    "NumPy in a partial": lambda n: partial(calm, judge=[np.float32(n)]),
    "dict with attributes": lambda n: Lexicon({"a": 1}, n),
    "list with attributes": Words,
    "list with a private slot": Hidden,
    "tuple with attributes": lambda n: attributed(Pair("a"), n),
    "set with attributes": lambda n: attributed(Bag("a"), n),
    "str with attributes": lambda n: attributed(Text("a"), n),
    "str that prints less": lambda n: Text(n),
    "float with attributes": lambda n: attributed(Real(1), n),
    "int with attributes": lambda n: attributed(Whole(1), n),
    "partial with attributes": lambda n: attributed(Bound(calm), n),
    "array with attributes": lambda n: attributed(np.zeros(2).view(Part), n),
    "tensor with attributes": lambda n: attributed(torch.zeros(2), n),
    "key with attributes": lambda n: {attributed(Text("a"), n): 1},
    "masked array": lambda n: np.ma.array([1, 2], mask=[n == 1, False]),
    "default of a dict": lambda n: defaultdict(lambda: n, {"a": 1}),
    "order of an OrderedDict": lambda n: OrderedDict.fromkeys(["ab", "ba"][n - 1]),
    "counts": lambda n: Counter("a" * n),
    "length of a deque": lambda n: deque([1], n),
    "chain of dicts": lambda n: ChainMap({}, {"a": n}),
    "dict to read": lambda n: MappingProxyType({"a": n}),
    "dict of an object": lambda n: UserDict(a=n),
    "values of a dict": lambda n: {"a": n}.values(),
    "objects as keys": lambda n: {Signed(n): 1},
    "objects in sets": lambda n: {Point("a", n), Point("b", 1), Point("c", 1)},
    "enumeration": lambda n: [Topic.JOY, Topic.SAD][n - 1],
    "enumeration of texts": lambda n: [Grade.LOW, Grade.HIGH][n - 1],
    "flags": lambda n: [re.I, re.M][n - 1],
    "paths": lambda n: Path(str(n)),
    "decimals": Decimal,
    "fractions": lambda n: Fraction(n, 3),
    "dates": lambda n: datetime(2026, 1, n, tzinfo=timezone(timedelta(hours=n))),
    "time zones": lambda n: timezone(timedelta(hours=n)),
    "patterns": lambda n: re.compile("a" * n),
    "methods to call": lambda n: methodcaller("count", Signed(n)),
    "slices": slice,
    "arrays": lambda n: array("d", [n]),
    "errors": ValueError,
    "types of tensors": lambda n: [torch.float32, torch.float64][n - 1],
    "methods of classes": lambda n: [str.__len__, str.__hash__][n - 1],
    "setters": settable,
    "forward hooks": hooked,
    "forward pre-hooks": lambda n: hooked(n, pre=True),
    "any name": AnyName,
    "any name that is called": Asked,
    "poses as a dict": PosingAsDict,
    "sparse tensors": lambda n: torch.tensor([0.0, n, 0.0]).to_sparse(),
    "sparse matrices": lambda n: torch.tensor([[0.0, n], [0.0, 0.0]]).to_sparse_csr(),
    "sparse matrices by column": lambda n: torch.tensor([[0.0, n], [0.0, 0.0]]).to_sparse_csc(),
    "quantised tensors": quantised,
    "nested tensors": lambda n: torch.nested.nested_tensor([torch.ones(n), torch.ones(3)]),
    "modules with sparse tensors": with_sparse,
    "traced modules": lambda n: torch.jit.trace(weighted(n), torch.ones(1, 2)),
    "traced functions": lambda n: torch.jit.trace(times_tensor(n), torch.ones(2)),
    "functions of Cython": lambda n: (fuzz.ratio, fuzz.partial_ratio)[n - 1],
    "tokenizers": tokenizer_with,
    "views of memory": lambda n: memoryview(bytes([n])),
    "local dataclasses": local_dataclass,
    "objects with their own _modules": lambda n: Modules(["vader", n]),
    "objects that pose as compiled": lambda n: Modules({"_orig_mod": 1}, n),
    "compiled modules": lambda n: torch.compile(weighted(n)),
    "modules that compile themselves": lambda n: (m := weighted(n), m.compile())[0],
    "compiled functions": lambda n: torch.compile(times(n)),
    "causal models": causal,
    "mocks": lambda n: Mock(return_value=n),
    "mocks of a class": lambda n: Mock(spec=dict, return_value=n),
}  # fmt: skip


if importlib.util.find_spec("pydantic"):  # which nothing here needs
    BY_NUMBER["local models of pydantic"] = local_model


@pytest.mark.parametrize("case", BY_NUMBER)
def test_values_that_functions_hold_are_told_apart(case):
    """Equal ones are equal, or no functions would be seen to have changed places."""
    make = BY_NUMBER[case]
    first, same, other = (insides_of(held(make(n))) for n in (1, 1, 2))
    assert first == same
    assert first != other


def test_tables_that_functions_hold_are_told_apart():
    """By their columns and index too."""
    pandas = pytest.importorskip("pandas")

    def table(value=1, column="a", index="x"):
        return str(insides_of(held(pandas.DataFrame({column: [value]}, index=[index]))))

    assert table() == table()
    assert len({table(), table(2), table(column="b"), table(index="y")}) == 4


def test_what_functions_hold_is_the_same_in_another_process():
    """The order of a set of texts changes with the process."""
    script = """
from functools import partial
from test_function_identity import BY_NUMBER, Judge, calm, held
from clp.training.function_identity import insides_of
from clp.training.run_folder import Inputs
judged = partial(calm, judge=Judge({"a", "b", "c", "d"}))
rows = [{"prompt": "x", "sets": {frozenset("abc"), frozenset("de")}}]
print(Inputs.of({"calm": judged}, None, rows))
for name, make in BY_NUMBER.items():
    print(name, insides_of(held(make(1))))
"""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    first, second = (
        python("-c", script, PYTHONPATH=path, PYTHONHASHSEED=seed).stdout.splitlines()
        for seed in "12"
    )
    assert len(first) == 1 + len(BY_NUMBER) and "Judge" in first[0]
    assert first == second


@pytest.mark.parametrize("make", [AnyName, Asked, PosingAsDict, Mock, ServerProxy])
def test_a_function_may_hold_an_object_that_answers_to_any_name(tmp_path, make):
    """Nothing listens there: a call would fail."""
    value = make("http://127.0.0.1:9")
    funcs = {"a": held(value), "b": partial(calm, judge=value), "c": brevity}
    rows = [{"prompt": "a", "value": value}]
    Inputs.of(funcs, None, rows)
    CLPTrainer(reward_funcs=funcs, args=config(tmp_path / "r"), train_dataset=ROWS)


def test_an_object_that_answers_to_any_name_is_named_by_its_class():
    class Called(AnyName):
        def __call__(self, completions, **columns):
            return [1.0] * len(completions)

    assert Inputs.of({"a": Called(1)}, None, []).rewards["a"].endswith("Called")


def test_what_changes_by_itself_is_the_same(monkeypatch):
    """Hooks of libraries, the environment, and generators of random numbers."""

    def library_hook(module, inputs, output):
        return None

    library_hook.__module__ = "transformers.utils.output_capturing"
    plain, watched = torch.nn.Identity(), torch.nn.Identity()
    watched.register_forward_hook(library_hook)
    watched.register_forward_hook(partial(library_hook))
    assert insides_of(held(plain)) == insides_of(held(watched))
    random = [torch.Generator(), np.random.default_rng(), os.environ, iter([1, 2])]
    before = insides_of(held(random))
    torch.rand(1, generator=random[0]), random[1].random(), next(random[3])
    monkeypatch.setenv("CLP_ANY", "1")
    assert insides_of(held(random)) == before
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    before = insides_of(held(tokenizer))
    tokenizer(["a", "a b"], padding=True, truncation=True, max_length=8)
    assert insides_of(held(tokenizer)) == before
    flag = Flag("flag", ["A", "B"])
    before = insides_of(held(flag.A))
    assert ~flag.A is flag.B
    assert insides_of(held(flag.A)) == before


def test_what_a_partial_binds_is_compared_by_value_and_texts_are_not_written(tmp_path):
    def keyed(completions, key, n, **columns):
        return [float(len(text)) for text in completions]

    def start(**bound):
        function = partial(keyed, **bound)
        CLPTrainer(reward_funcs={"a": function}, args=args, train_dataset=ROWS).lock.release()

    args = config(tmp_path / "r")
    start(key="sk-SECRET", n=np.int64(1))
    assert "SECRET" not in (tmp_path / "r/run.json").read_text()
    args = CLPConfig.of_run(tmp_path / "r")
    start(n=1, key="sk-SECRET")
    for other in ({"key": "sk-OTHER", "n": 1}, {"key": "sk-SECRET", "n": np.int64(5)}):
        with pytest.raises(ValueError, match="as the reward of a") as caught:
            start(**other)
        assert "sk-" not in str(caught.value)


def test_a_cache_that_fills_does_not_stop_a_resume(tmp_path):
    """Nor does what an object has counted."""

    class Counter(Signed):
        def __call__(self, completions, **columns):
            self.sign += 1
            return super().score(completions)

    def cached(completions, cache, **columns):
        return [cache.setdefault(text, float(len(text))) for text in completions]

    funcs = {"length": partial(cached, cache={}), "a": Counter(1), "b": Counter(2)}
    args = config(tmp_path / "r", max_steps=1)
    CLPTrainer(reward_funcs=funcs, args=args, train_dataset=ROWS).train()
    resumed(tmp_path / "r", funcs, ROWS, max_steps=2).train()
    with pytest.raises(ValueError, match=r"run with function:.*cached with"):
        resumed(tmp_path / "r", funcs | {"length": partial(cached, cache=None)}, ROWS)


class Unsteady:
    """Holds what differs in each process and what changes at each call."""

    def __init__(self, sign, words=()):
        self.started, self.environment = time.time_ns(), dict(os.environ, NOW=str(time.time_ns()))
        self.calls, self.cache, self.table = 0, {}, None
        self.sign, self.words = sign, list({"sun", "joy", *words})  # in another order each time

    def __call__(self, completions, **columns):
        self.calls += 1
        self.table = self.table or {"sign": self.sign}
        return [self.cache.setdefault(text, self.sign * float(len(text))) for text in completions]


def counting(factor):
    def count(completions, **columns):
        count.calls = getattr(count, "calls", 0) + len(completions)
        return [factor * len(text) for text in completions]

    return count


def training(mode):
    model = torch.nn.Dropout(0.5).train(mode)

    def reward(completions, **columns):
        return [float(model(torch.ones(1))) for _ in completions]

    return reward


def ordered(steps):
    def reward(completions, **columns):
        return [float(next((n for s, n in steps.items() if s in t), 0)) for t in completions]

    return reward


def told(text, attribute="__doc__"):
    """As a decorator that gives a judge its rubric."""

    def judge(completions, **columns):
        return [float(len(judge.__doc__ or judge.__name__)) for _ in completions]

    setattr(judge, attribute, text)
    return judge


class Numbered:
    """Has a number by the order in which it was made."""

    numbers = itertools.count()

    def __init__(self, words):
        self.number, self.words = next(self.numbers), words

    def __call__(self, completions, **columns):
        return [float(sum(map(text.count, self.words))) for text in completions]


def numbered(first, second):
    Numbered.numbers = itertools.count()
    return Numbered(first), Numbered(second)


def of_file(line):
    """A function of a file that imports another one under the same name."""
    known = {"__name__": "reward"}
    code = f"{line}\ndef reward(completions, **columns):\n    return [rule(t) for t in completions]"
    exec(code, known)
    return known["reward"]


UNSTEADY = {
    "signs": lambda: (Unsteady(1), Unsteady(-1)),
    "words": lambda: (Unsteady(1, ["kite"]), Unsteady(1, ["boat"])),
    "attributes of functions": lambda: (counting(1), counting(-1)),
    "modes of modules": lambda: (training(True), training(False)),
    "imports of files": lambda: (
        of_file("from html import escape as rule"),
        of_file("from html import unescape as rule"),
    ),
    "modules of files": lambda: (
        of_file("import math as rules; rule = lambda t: rules.e"),
        of_file("import cmath as rules; rule = lambda t: rules.e"),
    ),
    "texts of functions": lambda: (told("How kind?"), told("How short?")),
    "names of functions": lambda: (told("kind", "__name__"), told("short", "__name__")),
    "the order of keys": lambda: (ordered({"on": 1, "once": 2}), ordered({"once": 2, "on": 1})),
}


@pytest.mark.parametrize("case", UNSTEADY)
@pytest.mark.parametrize("again", ["the same objects", "new objects"])
def test_functions_with_a_state_that_have_changed_places_are_told_apart(case, again):
    """What they have counted, cached or read at their start is no longer what it was."""
    one, other = UNSTEADY[case]()
    then = distinctive({"a": insides_of(one), "b": insides_of(other)})
    for function in (one, other):
        function(completions=["Tom had", "once"])
    if again == "new objects":
        one, other = UNSTEADY[case]()
    now = {"a": insides_of(one), "b": insides_of(other)}
    assert swapped(then, now) is None
    assert swapped(then, {"a": now["b"], "b": now["a"]}) == ("a", "b")


def test_functions_with_a_state_that_have_changed_places_are_refused_after_a_training(tmp_path):
    funcs = {"a": Unsteady(1), "b": Unsteady(-1)}
    args = config(tmp_path / "r", max_steps=1)
    CLPTrainer(reward_funcs=funcs, args=args, train_dataset=ROWS).train()
    with pytest.raises(ValueError, match="as the reward of a; resume gives what was that of b"):
        resumed(tmp_path / "r", {"a": funcs["b"], "b": funcs["a"]}, ROWS, max_steps=2)
    resumed(tmp_path / "r", funcs, ROWS, max_steps=2).train()


def test_functions_that_keep_a_part_of_their_place_are_told_apart():
    one, other = numbered(["sun", "joy"], ["in short", "so"])
    then = distinctive({"a": insides_of(one), "b": insides_of(other)})
    for first, second, found in ((one, other, None), (other, one, ("a", "b"))):
        again = numbered(first.words, second.words)
        assert swapped(then, dict(zip("ab", map(insides_of, again), strict=True))) == found


class Labelled:
    def __init__(self, label, pattern):
        self.label, self.pattern, self.last = label, re.compile(pattern), False

    def __call__(self, completions, **columns):
        return [float(len(self.pattern.findall(text))) for text in completions]


@pytest.mark.parametrize(
    "labels", [(0, 1), ("joy", "brief"), ("http://gpu0:80", "http://gpu1:80")],
    ids=["numbers", "names", "numbered names"],
)  # fmt: skip
def test_functions_that_keep_a_label_of_their_place_are_told_apart(labels):
    def both(*patterns, last=(False, True)):
        made = list(map(Labelled, labels, patterns))
        for function, value in zip(made, last, strict=True):
            function.last = value
        return dict(zip("ab", map(insides_of, made), strict=True))

    then = distinctive(both("e", "o"))
    for last in ((False, False), (True, False), (False, True)):
        assert swapped(then, both("e", "o", last=last)) is None
        assert swapped(then, both("o", "e", last=last)) == ("a", "b")


class Client:
    """As HTTP clients are: the address, and what is made of it."""

    def __init__(self, label):
        self.base = label
        self.session = {"headers": {"Host": label}, "endpoint": f"{label}/v1/chat"}


HOLDERS = {
    "itself": lambda label: label,
    "client": Client,
    "list": lambda label: [label, "v1"],
    "key": lambda label: {label: "ready"},
    "partial": lambda label: partial(calm, server=label),
    "closure": lambda label: lambda text: (label, text),
}


@pytest.mark.parametrize("labels", [(0, 1), ("cuda:0", "cuda:1")], ids=["number", "device"])
@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
def test_labels_given_in_turn_say_nothing_beside_other_texts(labels, holder):
    """Made in another order, functions have other labels; exchanged, they may keep them."""

    def both(*patterns, turned=1):
        made = zip(map(holder, labels[::turned]), patterns, strict=True)
        return dict(zip("ab", (insides_of(Labelled(*of)) for of in made), strict=True))

    then = distinctive(both("e", "o"))
    assert swapped(then, both("e", "o", turned=-1)) is None
    assert swapped(then, both("o", "e")) == ("a", "b")
    assert swapped(then, both("o", "e", turned=-1)) == ("a", "b")


def test_a_correction_to_what_a_third_function_has_is_no_exchange():
    """Two of three judges had the language that one of them has no longer."""
    then = {"a": calm_in("sun", "en"), "b": calm_in("joy", "en"), "c": calm_in("so", "de")}
    told = distinctive(then)
    assert swapped(told, then | {"a": calm_in("sun", "de")}) is None
    assert swapped(told, then | {"a": calm_in("sun", "de"), "c": calm_in("so", "en")}) == ("a", "c")


def calm_in(word, language):
    return insides_of(partial(calm, judge={"word": word, "language": language}))


def test_a_large_cache_of_objects_does_not_hide_a_rule_behind_it():
    def judge(word, verdict, size):
        cache = {f"prompt {i}": {"verdict": [f"{verdict} {i}"]} for i in range(size)}
        return insides_of(partial(calm, cache=cache, rule=[[[[{"words": [word]}]]]]))

    then = distinctive({"a": judge("sun", "yes", 400), "b": judge("so", "no", 400)})
    now = {"a": judge("sun", "yes", 0), "b": judge("so", "no", 0)}
    assert swapped(then, now) is None
    assert swapped(then, {"a": now["b"], "b": now["a"]}) == ("a", "b")


class Judged:
    def __init__(self, rule, state):
        self.rule, self.state, self.calls = rule, state, 0


@pytest.mark.parametrize("rules", [("e{1,3}", "e{4,9}"), ("rm-v1", "rm-v2"), (0.25, 0.75), (3, 7)])
@pytest.mark.parametrize("state", [(0, 9), (0.0, 4.5), ("", "so"), (None, "so"), (False, True)])
def test_a_state_does_not_hide_small_differences(rules, state):
    """One function was tried by hand before the run began, and has its first state again."""

    def both(*rules, state):
        made = map(Judged, rules, state)
        return dict(zip("ab", map(insides_of, made), strict=True))

    for tried in (state, state[::-1]):
        then = distinctive(both(*rules, state=tried))
        assert swapped(then, both(*rules, state=tried)) is None
        for now in ((state[0], state[0]), (state[1], state[1])):
            assert swapped(then, both(*rules, state=now)) is None
            assert swapped(then, both(*rules[::-1], state=now)) == ("a", "b")


def test_a_list_made_of_a_set_has_another_order_in_each_process():
    shared = [f"shared{i}" for i in range(20)]

    def turned(words, by):
        return insides_of(held(words[by:] + words[:by]))

    then = distinctive({"a": turned(["sun", *shared], 1), "b": turned(["so", *shared], 2)})
    for one, other in itertools.product(range(6), repeat=2):
        now = {"a": turned(["sun", *shared], one), "b": turned(["so", *shared], other)}
        assert swapped(then, now) is None
        assert swapped(then, {"a": now["b"], "b": now["a"]}) == ("a", "b")


def test_files_that_are_loaded_under_one_name_are_told_apart(tmp_path, monkeypatch):
    """Whichever of them was loaded last."""
    for name, expression in (("a", "text.count('e')"), ("b", "-len(text)")):
        (tmp_path / f"{name}.py").write_text(
            f"def score(text): return {expression}\n"
            "def reward(completions, **_): return [float(score(text)) for text in completions]\n"
        )

    def load(names):
        made = {}
        for name in names:
            spec = importlib.util.spec_from_file_location("custom_module", tmp_path / f"{name}.py")
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, "custom_module", module)
            spec.loader.exec_module(module)
            made[name] = insides_of(module.reward)
        return made

    then = distinctive(load("ab"))
    for order in ("ab", "ba"):
        now = load(order)
        assert swapped(then, now) is None
        assert swapped(then, {"a": now["b"], "b": now["a"]}) == ("a", "b")


def test_a_full_cache_does_not_hide_what_tells_functions_apart():
    def judge(word, full):
        caches = [{f"{word}{i}{n}": i for i in range(90 * full)} for n in range(3)]
        return insides_of(partial(calm, caches=caches, judge=[[{"words": [word]}]]))

    for full in ((True, False), (True, True), (False, False)):
        then = distinctive({"a": judge("sun", full[0]), "b": judge("so", full[1])})
        now = {"a": judge("sun", False), "b": judge("so", False)}
        assert swapped(then, now) is None
        assert swapped(then, {"a": now["b"], "b": now["a"]}) == ("a", "b")


def test_a_state_that_comes_to_be_that_of_another_function_is_no_swap():
    def levels(one, other):
        return {"a": insides_of(Signed(one)), "b": insides_of(Signed(other))}

    then = distinctive(levels(1, 2))
    assert swapped(then, levels(2, 3)) is None
    assert swapped(then, levels(2, 1)) == ("a", "b")


def test_three_functions_in_a_ring_are_refused_and_a_corrected_one_is_not():
    then = {name: insides_of(times(n)) for n, name in enumerate("abc")}
    told = distinctive(then)
    assert swapped(told, then) is None
    ring = {"a": then["b"], "b": then["c"], "c": then["a"]}
    assert swapped(told, ring) == ("a", "b")
    assert swapped(told, then | {"b": insides_of(times(7))}) is None
    assert swapped(told, then | {"a": then["b"]}) == ("a", "b")  # given twice
    assert swapped({}, then) is None  # of an older run


def test_few_parts_are_kept_and_no_texts(tmp_path):
    words = [held([f"secret{i}{n}" for i in range(5000)]) for n in "ab"]
    args = config(tmp_path / "r")
    funcs = dict(zip("ab", words, strict=True))
    CLPTrainer(reward_funcs=funcs, args=args, train_dataset=ROWS).lock.release()
    text = (tmp_path / "r/run.json").read_text()
    assert "secret" not in text and len(text) < 4000
    with pytest.raises(ValueError, match="was run with another function"):
        resumed(tmp_path / "r", dict(zip("ba", words, strict=True)), ROWS)
