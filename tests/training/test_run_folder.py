"""A run's folder: one training at a time, and a resumed run is the same run or refused."""

import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from argparse import Namespace
from array import array
from collections import ChainMap, Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
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
from tiny_runs import config, metrics

from clp.data.json_lines import parse_json
from clp.data.paths import TINY
from clp.data.prompts import TRAIN_PROMPTS
from clp.policies.loading import load_base
from clp.rewards import brevity, sentiment
from clp.training.config import CLPConfig
from clp.training.function_identity import insides_of
from clp.training.run_folder import Inputs, RunLock
from clp.training.trainer import CLPTrainer

ROWS = [{"prompt": f"Tom had {i} red kites.", "mood": i} for i in range(5)]


def mood(prompts, completions, mood, **columns):
    return [float(value) for value in mood]


FUNCTIONS = {"tone": sentiment, "mood": mood}


def resumed(folder, functions=None, rows=None, **changes):
    args = CLPConfig.of_run(folder, **changes)
    return CLPTrainer(reward_funcs=functions, args=args, train_dataset=rows)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the default rewards, and one of Python functions, each with its metrics."""
    root = tmp_path_factory.mktemp("finished")
    CLPTrainer(args=config(root / "specs")).train()
    CLPTrainer(reward_funcs=FUNCTIONS, args=config(root / "python"), train_dataset=ROWS).train()
    return root


@pytest.fixture
def stopped(finished, tmp_path):
    """Copies of the two runs, stopped at step 2."""
    shutil.copytree(finished, tmp_path / "runs")
    for name in ("specs", "python"):
        shutil.rmtree(tmp_path / "runs" / name / "checkpoint-000004")
        (tmp_path / "runs" / name / "clp.json").unlink()
    return tmp_path / "runs"


def test_reward_functions_in_another_order_go_to_their_own_adapters(finished, stopped):
    trainer = resumed(stopped / "python", dict(reversed(FUNCTIONS.items())), ROWS)
    assert list(trainer.reward_funcs) == list(trainer.policy.objectives) == ["tone", "mood"]
    trainer.train()
    assert metrics(stopped / "python") == metrics(finished / "python")


def test_rewards_in_another_order_go_to_their_own_adapters(finished, stopped):
    specs = ["brief=brevity", "joy=sentiment"]
    trainer = resumed(stopped / "specs", rewards=specs)
    assert list(trainer.reward_funcs) == ["joy", "brief"]
    trainer.train()
    assert metrics(stopped / "specs") == metrics(finished / "specs")
    assert CLPConfig.of_run(stopped / "specs").rewards == specs[::-1]


def test_built_in_functions_given_in_python_are_the_specifications(finished, stopped):
    resumed(stopped / "specs", {"brief": brevity, "joy": sentiment}).train()
    assert metrics(stopped / "specs") == metrics(finished / "specs")


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["joy=sentiment", "short=brevity"],
         "run with the objectives joy, brief; resume gives joy, short"),
        (["joy=sentiment"], "run with the objectives joy, brief; resume gives joy"),
        (["joy=brevity", "brief=sentiment"],
         "run with sentiment as the reward of joy; resume gives brevity"),
        (["joy=sentiment", "brief=readability"],
         "run with brevity as the reward of brief; resume gives readability"),
    ],
)  # fmt: skip
def test_other_rewards_are_refused(stopped, specs, message):
    before = files(stopped)
    with pytest.raises(ValueError, match=message):
        resumed(stopped / "specs", rewards=specs)
    assert files(stopped) == before


def test_other_functions_are_refused(stopped):
    for name, message in (
        ("brevity", "objectives tone, mood; resume gives tone, brevity"),
        ("mood", "run with function:mood as the reward of mood; .* brevity"),
    ):
        with pytest.raises(ValueError, match=message):
            resumed(stopped / "python", {"tone": sentiment, name: brevity}, ROWS)


def test_prompts_are_compared_by_content(finished, stopped, tmp_path):
    changed = [ROWS[0] | {"mood": 9}, *ROWS[1:]]
    for rows in (changed, ROWS[::-1], ROWS[1:], [r | {"more": 1} for r in ROWS]):
        with pytest.raises(ValueError, match="other prompts"):
            resumed(stopped / "python", FUNCTIONS, rows)
    # From a file, with another order of the columns: the same content.
    lines = [json.dumps({"mood": r["mood"], "prompt": r["prompt"]}) + "\n" for r in ROWS]
    (tmp_path / "p.jsonl").write_text("".join(lines))
    resumed(stopped / "python", FUNCTIONS, prompts=str(tmp_path / "p.jsonl")).train()
    assert metrics(stopped / "python") == metrics(finished / "python")
    # A file that changes under the same name.
    (tmp_path / "p.jsonl").write_text("".join(lines).replace("kites", "boats"))
    with pytest.raises(ValueError, match="other prompts"):
        resumed(stopped / "python", FUNCTIONS)


def calm(completions, value=1.0, **columns):
    return [value for _ in completions]


def test_a_base_model_that_has_moved_is_named(tmp_path):
    model, tokenizer = load_base("tiny")
    for saved in (tokenizer, model):
        saved.save_pretrained(tmp_path / "base")
    CLPTrainer(args=config(tmp_path / "r", model=str(tmp_path / "base"), max_steps=1)).train()
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"neither a folder .* model \(--model\) says where it is"):
        resumed(tmp_path / "r", max_steps=2)
    resumed(tmp_path / "r", max_steps=2, model=str(tmp_path / "moved")).train()
    assert [row["step"] for row in metrics(tmp_path / "r")] == [1, 2]
    assert json.loads((tmp_path / "r/clp.json").read_text())["base_model"].endswith("moved")


@dataclass
class Judge:
    words: set


def test_what_a_partial_binds_is_the_same_in_another_process():
    """The order of a set of texts changes with the process."""
    script = """
from functools import partial, wraps
from test_run_folder import Judge, calm
from clp.training.run_folder import Inputs
judged = partial(calm, judge=Judge({"a", "b", "c", "d"}))
rows = [{"prompt": "x", "sets": {frozenset("abc"), frozenset("de")}}]
print(Inputs.of({"calm": judged}, None, rows))
"""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    printed = {python("-c", script, PYTHONPATH=path, PYTHONHASHSEED=seed).stdout for seed in "123"}
    assert len(printed) == 1 and "Judge" in printed.pop()


def test_a_base_model_that_has_changed_is_refused(tmp_path):
    """In the same folder, by less than the adapters' own start would show."""
    model, tokenizer = load_base("tiny")
    tokenizer.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    args = config(tmp_path / "r", model=str(tmp_path / "base"), max_steps=1)
    CLPTrainer(args=args).train()
    before = files(tmp_path / "r")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 1e-3
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="was run with another base model: its parameters"):
        resumed(tmp_path / "r", max_steps=2)
    assert files(tmp_path / "r") == before


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
         "wraps", "wrapped lambdas", "defaults", "objects in closures", "objects in partials",
         "lambdas in partials", "methods", "objects", "modules in closures", "slots", "classes",
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
def test_functions_that_have_changed_places_are_refused(tmp_path, one, other):
    """Under each other's name, the adapter of one would train on the other."""
    CLPTrainer(reward_funcs={"a": one, "b": other}, args=config(tmp_path / "r"), train_dataset=ROWS)
    resumed(tmp_path / "r", {"b": other, "a": one}, ROWS)
    with pytest.raises(ValueError, match="as the reward of a"):
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
        return insides_of(held(pandas.DataFrame({column: [value]}, index=[index])))

    assert table() == table()
    assert len({table(), table(2), table(column="b"), table(index="y")}) == 4


def test_values_that_functions_hold_are_the_same_in_another_process():
    script = """
from test_run_folder import BY_NUMBER, held
from clp.training.function_identity import insides_of
for name, make in BY_NUMBER.items():
    print(name, insides_of(held(make(1))))
"""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    first, *others = (
        python("-c", script, PYTHONPATH=path, PYTHONHASHSEED=seed).stdout.splitlines()
        for seed in "123"
    )
    assert len(first) == len(BY_NUMBER)
    assert [first, first] == others


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


def test_another_function_that_draws_the_weights_is_refused(tmp_path):
    def even(count, generator):
        return torch.full((count, 2), 0.5)

    def corner(count, generator):
        return torch.tensor([[1.0, 0.0]]).repeat(count, 1)

    CLPTrainer(args=config(tmp_path / "r"), draw_weights=even).lock.release()
    args = CLPConfig.of_run(tmp_path / "r")
    CLPTrainer(args=args, draw_weights=even).lock.release()
    with pytest.raises(ValueError, match=r"even as draw_weights; resume gives .*corner"):
        CLPTrainer(args=args, draw_weights=corner)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("config.json", '"rope_theta": 10000.0', '"rope_theta": 500.0', "rope_parameters of its"),
        ("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5', "rms_norm_eps of its conf"),
        ("generation_config.json", '"eos_token_id": 2', '"eos_token_id": [2, 5]', "other ids, or"),
        ("tokenizer.json", '"he": 2', '"eh": 2', "other ids, or"),
        ("tokenizer_config.json", "{", '{"chat_template": "{{ messages[0].content }}.",', None),
    ],
)
def test_a_base_model_of_other_files_is_refused(tmp_path, file, old, new, message):
    """A chat template counts if a prompt is a conversation."""
    shutil.copytree(TINY, tmp_path / "base", ignore=shutil.ignore_patterns("*.jsonl"))
    args = config(tmp_path / "r", model=str(tmp_path / "base"), max_steps=1)
    CLPTrainer(args=args).train()
    path = tmp_path / "base" / file
    if file == "tokenizer.json":
        vocabulary = json.loads(path.read_text())["model"]["vocab"]
        a, b = [token for token, i in vocabulary.items() if i in (300, 301)]
        old, new = f'"{a}": 300', f'"{b}": 300'
    text = path.read_text()
    flat = text if old in text else json.dumps(json.loads(text))
    assert old in flat
    changed = flat.replace(old, new, 1)
    if file == "tokenizer.json":
        changed = changed.replace(f'"{b}": 301', f'"{a}": 301', 1)
    path.write_text(changed)
    if message is None:
        resumed(tmp_path / "r", max_steps=2)
        return
    with pytest.raises(ValueError, match=message):
        resumed(tmp_path / "r", max_steps=2)


def test_a_chat_template_that_has_changed_is_refused(tmp_path):
    shutil.copytree(TINY, tmp_path / "base", ignore=shutil.ignore_patterns("*.jsonl"))
    path = tmp_path / "base/tokenizer_config.json"
    given = json.loads(path.read_text())
    rows = [{"prompt": [{"role": "user", "content": "Mia"}]}]
    for template, fails in (("{{ messages[0].content }}", False), ("{{ messages[0].role }}", True)):
        path.write_text(json.dumps(given | {"chat_template": template}))
        if not fails:
            args = config(tmp_path / "r", model=str(tmp_path / "base"), max_steps=1)
            CLPTrainer(args=args, train_dataset=rows).train()
            continue
        with pytest.raises(ValueError, match="another tokenizer, chat template or end tokens"):
            CLPTrainer(args=CLPConfig.of_run(tmp_path / "r", max_steps=2), train_dataset=rows)


def classifier_folder(folder):
    """A small sequence classifier with the embedded model's tokenizer."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    settings = transformers.BertConfig(
        vocab_size=1024, intermediate_size=8, pad_token_id=0, **sizes
    )
    transformers.BertForSequenceClassification(settings).save_pretrained(folder)
    load_base("tiny")[1].save_pretrained(folder)


def test_a_classifier_that_has_moved_is_found_there_from_then_on(tmp_path):
    classifier_folder(tmp_path / "clf")
    spec = f"joy=classifier:{tmp_path / 'clf'}#1"
    CLPTrainer(args=config(tmp_path / "r", rewards=["brief=brevity", spec], max_steps=1)).train()
    (tmp_path / "clf").rename(tmp_path / "new")
    moved = [f"joy=classifier:{tmp_path / 'new'}#1", "brief=brevity"]
    resumed(tmp_path / "r", rewards=moved, max_steps=2).train()
    card = json.loads((tmp_path / "r/clp.json").read_text())
    assert card["rewards"] == moved[::-1] == CLPConfig.of_run(tmp_path / "r").rewards


@pytest.mark.parametrize("text", [b"caf\xe9".decode("utf-8", "surrogateescape"), "[" * 500])
def test_what_a_reward_logs_stays_when_a_run_is_resumed(tmp_path, text):
    """Values that a strict reader refuses: half a surrogate pair, deep nesting, huge integers."""
    deep = []
    for _ in text[:300]:
        deep = [deep]

    def logs(completions, log_extra, log_metric, **columns):
        log_extra("text", [text] * len(completions))
        log_extra("deep", [deep] * len(completions))
        log_extra("huge", [10**5000] * len(completions))
        return [float(len(text)) for text in completions]

    args = config(tmp_path / "r", max_steps=2)
    CLPTrainer(reward_funcs=logs, args=args, train_dataset=ROWS).train()
    table = tmp_path / "r/completions.jsonl"
    before = table.read_bytes()
    assert len(before.splitlines()) == 2 * 4
    for line in before.splitlines():
        parse_json(line)  # the strict reader
    resumed(tmp_path / "r", logs, ROWS).train()
    assert table.read_bytes() == before


def test_messages_with_their_keys_in_another_order_are_the_same_prompts():
    """As columns are: a file that is written again may have them so."""
    rows = [[{"prompt": [dict(pairs)]}] for pairs in (
        (("role", "user"), ("content", "Hi")), (("content", "Hi"), ("role", "user")),
        (("role", "system"), ("content", "Hi")),
    )]  # fmt: skip
    first, same, other = (Inputs.of({}, [], one) for one in rows)
    assert first == same
    assert first != other


@pytest.mark.parametrize(
    ("one", "other"),
    [(Fraction(1, 2), Fraction(1, 3)), (date(2026, 1, 2), date(2026, 1, 3)), (b"x", b"y"),
     ({1, 2}, {1, 3})],
)  # fmt: skip
def test_values_of_columns_that_json_lacks_count(one, other):
    """Answers of mathematics are fractions, say."""
    first, same, second = (
        Inputs.of({}, [], [{"prompt": "a", "answer": value}]) for value in (one, one, other)
    )
    assert first == same
    assert first != second


def test_a_classifiers_files_are_part_of_the_reward(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"1")
        (tmp_path / name / "config.json").write_bytes(b"{}")
        (tmp_path / name / "README.md").write_bytes(name.encode())

    def of(*specs):
        return Inputs.of({}, specs, ROWS).rewards

    first = of(f"x=classifier:{tmp_path / 'a'}#1", "brevity")
    assert re.fullmatch("classifier:[0-9a-f]{64}#1", first["x"]) and first["brevity"] == "brevity"
    assert of(f"x=classifier:{tmp_path / 'b'}#1", "brevity=brevity") == first
    assert of(f"x=classifier:{tmp_path / 'a'}#2") != of(f"x=classifier:{tmp_path / 'a'}#1")
    (tmp_path / "a/model.safetensors").write_bytes(b"2")
    assert of(f"x=classifier:{tmp_path / 'a'}#1", "brevity") != first


def test_values_that_json_lacks_do_not_stop_a_training():
    np = pytest.importorskip("numpy")
    rows = [{"prompt": "a", "x": object(), "y": np.arange(3), "z": {(1, 2): 3, None: {1}}}]
    same = [{"z": {None: {1}, (1, 2): 3}, "prompt": "a", "x": object(), "y": [0, 1, 2]}]
    assert Inputs.of({}, [], rows) == Inputs.of({}, [], same)
    assert Inputs.of({}, [], rows) != Inputs.of({}, [], [rows[0] | {"y": np.arange(1, 4)}])


def test_a_run_that_is_older_than_run_json_is_resumed_with_a_warning(finished, stopped):
    for name in ("specs", "python"):
        (stopped / name / "run.json").unlink()
    with pytest.warns(UserWarning, match=r"no run\.json"):
        resumed(stopped / "python", dict(reversed(FUNCTIONS.items())), ROWS).train()
    assert metrics(stopped / "python") == metrics(finished / "python")
    specs = stopped / "specs"
    for rewards, message in [
        (["joy=brevity", "brief=sentiment"], "run with sentiment as the reward of joy"),
        (["joy=sentiment", "short=brevity"], "objectives joy, brief; resume gives joy, short"),
    ]:
        with pytest.warns(UserWarning), pytest.raises(ValueError, match=message):
            resumed(specs, rewards=rewards)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="run with prompts=None"):
        resumed(specs, prompts=str(TRAIN_PROMPTS))


def test_max_steps_may_grow_and_nothing_is_lost(finished, stopped):
    specs = stopped / "specs"
    with pytest.raises(ValueError, match="max_steps=4; resume asks for 3, and max_steps may only"):
        resumed(specs, max_steps=3)
    resumed(specs).train()
    resumed(specs, max_steps=6, save_steps=3).train()
    rows = metrics(specs)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[:4] == metrics(finished / "specs")
    # A linear decay to zero over six steps, the first of which warms up.
    assert rows[4]["learning_rate"] == pytest.approx(2e-3 * (1 - 3 / 5))
    saved = CLPConfig.of_run(specs)
    assert (saved.max_steps, saved.save_steps) == (6, 3)


def test_what_changes_no_bit_may_change(finished, stopped):
    held = stopped / "held.jsonl"
    held.write_text('{"prompt": "Mia"}\n')
    free = {"eval_prompts": str(held), "save_steps": 1, "save_total_limit": 5, "device": "cpu"}
    resumed(stopped / "specs", gradient_checkpointing=True, **free).train()
    assert metrics(stopped / "specs") == metrics(finished / "specs")
    with pytest.raises(ValueError, match="micro_batch_size=128; resume asks for 2"):
        resumed(stopped / "specs", micro_batch_size=2)


def files(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != ".lock"
    }


@pytest.mark.parametrize(
    "changes",
    [{"model": "no/such/model"}, {"device": "nope"}, {"rewards": ["nope"]},
     {"prompts": "none.jsonl"}, {"target_modules": ["nope"]}],
)  # fmt: skip
def test_a_start_that_fails_leaves_the_folder_as_it_was(tmp_path, changes):
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path / "new", tmp_path):
        with pytest.raises((ValueError, RuntimeError)):
            CLPTrainer(args=config(folder, **changes))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    CLPTrainer(args=config(tmp_path))


def test_a_resume_that_fails_leaves_the_folder_free_and_as_it_was(stopped):
    before = files(stopped)
    shutil.move(stopped / "specs/checkpoint-000002/adapters/joy", stopped / "joy")
    for _ in range(2):  # and the lock is free again
        with pytest.raises(ValueError, match="joy"):
            resumed(stopped / "specs")
    shutil.move(stopped / "joy", stopped / "specs/checkpoint-000002/adapters/joy")
    assert files(stopped) == before


def test_a_disk_that_is_full_at_the_start_leaves_no_run(tmp_path, monkeypatch):
    real = os.replace
    for failing in ("run.json", "config.yaml"):

        def full(self, target, failing=failing):
            if Path(target).name == failing:
                raise OSError(28, "No space left on device")
            real(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", full)
            with pytest.raises(OSError, match="No space"):
                CLPTrainer(args=config(tmp_path / "r"))
        assert not (tmp_path / "r/config.yaml").exists()
        assert not list((tmp_path / "r").glob("*.tmp")) + list((tmp_path / "r").glob(".*.tmp"))
    CLPTrainer(args=config(tmp_path / "r"))


def test_two_trainings_in_one_folder(tmp_path):
    first = CLPTrainer(args=config(tmp_path / "r", max_steps=1))
    refused = rf"in use by another training \(process {os.getpid()} on .* since 20"
    with pytest.raises(ValueError, match=refused):
        resumed(tmp_path / "r")
    first.train()
    second = resumed(tmp_path / "r", max_steps=2)
    with pytest.raises(ValueError, match="in use by another training"):
        first.train()
    second.train()
    with pytest.raises(ValueError, match="trained further, to checkpoint-000002"):
        first.train()
    assert [row["step"] for row in metrics(tmp_path / "r")] == [1, 2]


def test_of_two_new_trainings_one_gets_the_folder(tmp_path, monkeypatch):
    """Both find it free, and load their models; the second to be ready is refused."""
    real = CLPTrainer.prepare
    won = []

    def prepare(self, *args):
        measured = real(self, *args)
        if not won:
            won.append(1)
            won.append(CLPTrainer(args=config(tmp_path / "r")))
        return measured

    monkeypatch.setattr(CLPTrainer, "prepare", prepare)
    with pytest.raises(ValueError, match="in use by another training"):
        CLPTrainer(args=config(tmp_path / "r"))
    won.pop().lock.release()
    with pytest.raises(ValueError, match="holds another run"):
        CLPTrainer(args=config(tmp_path / "r"))


def test_a_lock_ends_with_its_process_however_it_ends(tmp_path):
    script = f"""
from pathlib import Path
from clp.training.run_folder import RunLock
lock = RunLock(Path({str(tmp_path)!r}))
lock.acquire()
print("locked", flush=True)
input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", script], **pipes)
    assert process.stdout.readline() == "locked\n"
    lock = RunLock(tmp_path)
    with pytest.raises(ValueError, match=f"process {process.pid} on"):
        lock.acquire()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with lock:
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
        with pytest.raises(ValueError, match="in use"):
            RunLock(tmp_path).acquire()
    RunLock(tmp_path).acquire()  # and with its object
    RunLock(tmp_path).acquire()
    (tmp_path / "odd" / ".lock").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"odd cannot be locked: .* directory"):
        RunLock(tmp_path / "odd").acquire()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "rewards": [1]}', "[" * 200_000]
)
def test_a_damaged_run_json_is_refused_by_name(stopped, text):
    (stopped / "specs/run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json"):
        resumed(stopped / "specs")


def test_another_name_of_the_folder_is_the_same_folder(tmp_path, monkeypatch):
    first = CLPTrainer(args=config(tmp_path / "r", max_steps=1))
    (tmp_path / "link").symlink_to("r")
    monkeypatch.chdir(tmp_path / "r")
    for name in (tmp_path / "link", ".", "../link"):
        with pytest.raises(ValueError, match="in use by another training"):
            resumed(name)
    first.train()
    resumed(".", max_steps=2).train()
    assert [row["step"] for row in metrics(tmp_path / "r")] == [1, 2]


def test_a_lock_ends_with_its_process_though_a_child_lives_on(tmp_path):
    """Such as a worker of a pool that a reward function has forked."""
    script = f"""
import os, time
from pathlib import Path
from clp.training.run_folder import RunLock
lock = RunLock(Path({str(tmp_path)!r}))
lock.acquire()
child = os.fork()
if child == 0:
    time.sleep(30)
    os._exit(0)
print(child, flush=True)
input()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    try:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()


def test_a_reward_that_fails_while_the_scale_is_measured_leaves_no_folder(tmp_path):
    def late(completions, **kwargs):
        if len(completions) > 4:
            raise ConnectionError("the judge is away")
        return [0.5] * len(completions)

    args = config(tmp_path / "new/er/r", scale_rewards="reference")
    with pytest.raises(ConnectionError) as caught:
        CLPTrainer(reward_funcs={"late": late}, args=args, train_dataset=ROWS)
    assert caught.value.__notes__ == ["raised by reward 'late', called on 512 completions"]
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_that_was_edited_by_hand_is_resumed(finished, stopped):
    """More steps and other spacing; the metrics of before stay."""
    path = stopped / "specs/config.yaml"
    text = path.read_text().replace("max_steps: 4", "max_steps:   6  # a little more")
    path.write_text(f"# mine\n\n{text}")
    resumed(stopped / "specs").train()
    rows = metrics(stopped / "specs")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[:2] == metrics(finished / "specs")[:2]


def test_a_training_whose_folder_was_deleted_leaves_the_next_one_alone(tmp_path):
    """`rm -r run` beside a forgotten training, whose lock is on a file that is gone."""
    first = CLPTrainer(args=config(tmp_path / "r", max_steps=1))
    shutil.rmtree(tmp_path / "r")
    second = CLPTrainer(args=config(tmp_path / "r", max_steps=2))
    with pytest.raises((ValueError, OSError)):
        first.train()
    second.train()
    assert [row["step"] for row in metrics(tmp_path / "r")] == [1, 2]
    assert not (tmp_path / "r/checkpoint-000001").exists()
