"""The subject `sampler`: whole generation runs of requests with unequal lengths.

Requests have log-normal prompts and completions (bench/engine/workload.py); `ignore_eos` and
temperature 1, so that each completion has exactly its length. Tokens per second count only those,
whatever else a provider computes. Requests have 1, 4, 16 or 64 distinct weights (`weight_rows`)
over two adapters of rank 8 with random B.

Providers. Those with adapters are timed for each number of distinct weights. The base model does
not depend on it: its one time is in each case.
    clp                    the project's sampler, all weights in one batch
    clp_no_adapters        the same engine over the bare base model
    torch_generate_base    transformers' generate on the base model, one padded batch
    peft_merged_generate   for all distinct weights PEFT's `cat` adapter, merged, and generate for
                           their requests; making, merging and removing it are in the time
    transformers_cb        transformers' continuous batching over the base model
    vllm                   vLLM over the base model, on a GPU where it is installed

Every run has new prompts of the same lengths (those of one number of distinct weights are the same
for every provider), so that what an engine keeps of earlier prompts is of no use. Time to first
token: from the first request's submission to the request's first token on the host; in
peft_merged_generate the requests of later weights wait for those of earlier ones. What engines keep
between runs (allocated caches, captured CUDA graphs) is there before the timed runs; the gate's run
is the warm-up.

Peak memory: what one more run allocates at most (on a GPU by PyTorch's allocator, on the CPU the
growth of resident memory), plus the keys and values that the provider keeps before it (for
peft_merged_generate, the copy of the base's parameters); vLLM's is that of another process, and
empty. Memory of captured graphs is not included.

Error gate: the number of tokens of each request, and greedy tokens (bench/engine/judge.py).
"""

import copy
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean, median
from typing import Any

import torch
import transformers
from tqdm import tqdm

from bench import peers, timing
from bench.engine import engines
from bench.engine.judge import Judge
from bench.engine.workload import GATE, Batch, Served, Workload, counted, percentile, workload
from bench.report.rows import Row, provenance
from bench.report.rows import rows as rows_of
from bench.report.tables import RANDOM, case_of, rate
from clp.policies.loading import load_base
from clp.policies.policy import Policy
from clp_kernels import inject
from clp_kernels.nn.mixed_lora import steered_layers

OP = "sampler"
PROTOCOL = timing.Protocol(warmup=0, repeats=5, least=2, seconds=60.0)
QUICK_PROTOCOL = timing.Protocol(warmup=0, repeats=2, least=1, seconds=10.0)
GREEDY = 12  # tokens of each completion in the gate
ADAPTERS = ("first", "second")
RANK = 8
STD = 0.05  # of lora_B: the update is a fifth of a layer's output
OURS, BARE = "clp", "clp_no_adapters"
PLAIN, MERGED = "torch_generate_base", "peft_merged_generate"
TRANSFORMERS, VLLM = "transformers_cb", "vllm"


class Ids:
    """Stands in for the tokenizer of a model that has none: a text is its ids."""

    eos_token = unk_token = eos_token_id = unk_token_id = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return self.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(f"{i} " for i in ids)


@dataclass(frozen=True)
class Case:
    """Sizes of a measurement: requests, and the numbers of distinct weights."""

    requests: int
    weight_rows: tuple[int, ...]
    completion_median: int = 64
    completions: tuple[int, int] = (8, 256)


def cases(device: str, quick: bool) -> list[Case]:
    """What is measured on the device."""
    if quick:
        return [Case(16, (1, 4, 16), completion_median=16, completions=(8, 48))]
    counts = (64, 256) if device == "cuda" else (64,)
    return [Case(count, (1, 4, 16, 64)) for count in counts]


def models(name: str, device: torch.device) -> tuple[Policy, Any]:
    """(a policy with random adapters, its bare base model), float32 on the CPU, else bfloat16.

    Args:
        name: As for clp.policies.loading.load_base, or RANDOM.

    Raises: ValueError as load_base.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if name == RANDOM:
        config = transformers.LlamaConfig(
            hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
            intermediate_size=8192, vocab_size=128_256, max_position_embeddings=2048,
        )  # fmt: skip
        tokenizer: Any = Ids(config.vocab_size)
        torch.manual_seed(0)
        with device:
            base: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    else:
        base, tokenizer = load_base(name, dtype)
        base = base.to(device)
    model = copy.deepcopy(base)
    generator = torch.Generator(device).manual_seed(0)
    inject(model, ADAPTERS, r=RANK, generator=generator)
    with torch.no_grad():
        for layer in steered_layers(model).values():
            layer.lora_B.normal_(0, STD, generator=generator)
    return Policy(model, tokenizer, ADAPTERS, name), base


@dataclass(frozen=True)
class Way:
    """A provider: its engine, and whether weights change what it does."""

    name: str
    engine: engines.Engine
    weighted: bool


def ways(policy: Policy, base: Any, work: Workload) -> tuple[list[Way], dict[str, str]]:
    """Everything that can serve here, and why the others cannot."""
    device = policy.device
    count = len(work.prompts)
    longest = max(p + c for p, c in zip(work.prompts, work.completions, strict=True))
    bare = engines.Bare(base, policy.tokenizer)
    made: dict[str, tuple[Callable[[], engines.Engine], bool]] = {
        OURS: (partial(engines.Clp, policy, count), True),
        BARE: (partial(engines.Clp, bare, count, weighted=False), False),
        PLAIN: (partial(engines.Generate, base), False),
        MERGED: (partial(engines.PeftMerged, policy, base), True),
        TRANSFORMERS: (partial(engines.ContinuousBatching, base, count, longest), False),
        VLLM: (partial(peers.Vllm, base, count, longest), False),
    }
    absent = {
        MERGED: None if importlib.util.find_spec("peft") else "peft is not installed",
        VLLM: peers.vllm_missing(device),
    }
    missing = {name: reason for name, reason in absent.items() if reason is not None}
    found = [Way(n, make(), weighted) for n, (make, weighted) in made.items() if n not in missing]
    return found, missing


class Runner:
    """Runs one way with a number of distinct weights, each time on the next run's prompts."""

    def __init__(self, way: Way, work: Workload, weight_rows: int, judge: Judge, bar: Any) -> None:
        self.way, self.work, self.weight_rows = way, work, weight_rows
        self.judge, self.bar = judge, bar
        self.firsts: list[list[float]] = []  # of every run

    def batch(self) -> Batch:
        """The requests of the next run."""
        return self.work.batch(len(self.firsts), self.weight_rows)

    def run(self) -> Served:
        """One whole generation run."""
        self.bar.set_postfix_str(f"{self.way.name}, {self.weight_rows} rows", refresh=False)
        served = self.way.engine.serve(self.batch(), greedy=False)
        self.firsts.append(served.first)
        self.bar.update()
        return served

    def check(self, served: Served) -> float:
        """The error gate; gives the share of the budget."""
        vocab_size = self.work.vocab_size
        counted(served, self.batch(), vocab_size)
        asked = self.work.batch(GATE, self.weight_rows)
        short = asked._replace(lengths=[min(n, GREEDY) for n in asked.lengths])
        greedy = self.way.engine.serve(short, greedy=True)
        counted(greedy, short, vocab_size)
        return self.judge.share(short, greedy, weighted=self.way.weighted)

    def peak(self, device: torch.device) -> int | None:
        """Bytes, as the module's text says."""
        kept = self.way.engine.kept_bytes()
        take = timing.peak_bytes_gpu if device.type == "cuda" else timing.resident_growth
        grown = take(self.run) if kept is not None else None
        return None if kept is None or grown is None else kept + grown


def measure(
    case: Case, name: str, policy: Policy, base: Any, protocol: timing.Protocol, bandwidth: float
) -> tuple[list[Row], dict[str, str], dict[str, str]]:
    """(rows, refusals by provider and number of weights, missing providers and the reasons).

    All providers and numbers of weights take turns in one measurement, so that their ratios are
    from the same minutes.
    """
    device = policy.device
    context, vocab_size = policy.context_length, policy.vocab_size
    work = workload(case.requests, context, vocab_size, case.completion_median, case.completions)
    found, missing = ways(policy, base, work)
    judge = Judge(policy, base)
    each = {way.name: case.weight_rows if way.weighted else case.weight_rows[:1] for way in found}
    most = sum(map(len, each.values())) * (protocol.warmup + protocol.repeats + 2)
    runners: dict[str, Runner] = {}
    try:
        often = 0.1 if sys.stderr.isatty() else 10
        what = f"{case.requests} requests"
        with tqdm(total=most, unit="run", desc=what, mininterval=often) as bar:
            for way in found:
                for count in each[way.name]:
                    runners[_label(way, count)] = Runner(way, work, count, judge, bar)
            providers = [
                timing.Provider(label, r.run, r.check, peak=partial(r.peak, device))
                for label, r in runners.items()
            ]
            times, refused = timing.measure(providers, device, protocol)
    finally:
        for way in found:
            way.engine.close()
    for label, timed in times.items():
        # The first run was the gate's, and the last, where memory is known, the peak's.
        last = None if timed.peak_bytes is None else -1
        rounds = runners[label].firsts[1 + protocol.warmup : last]
        mean = median(fmean(first) for first in rounds) * 1e6
        p95 = median(percentile(first, 0.95) for first in rounds) * 1e6
        times[label] = replace(timed, ttft_us=mean, ttft_p95_us=p95)
    shared, rows = provenance(device), []
    weight_bytes = sum(p.nbytes for p in base.parameters())
    floor = max(work.completions) * weight_bytes / bandwidth * 1e6
    for count in case.weight_rows:
        fields = {
            "model": name.rstrip("/").rpartition("/")[2],
            "dtype": str(base.dtype).removeprefix("torch."),
            "N": case.requests,
            "tokens": work.tokens,
            "weight_rows": count,
        }
        own = {w.name: times[t] for w in found if (t := _label(w, count)) in times}
        rows += rows_of(shared, OP, fields, own, {"floor": floor})
    return rows, refused, missing


def _label(way: Way, weight_rows: int) -> str:
    return f"{way.name}, {weight_rows} weight rows" if way.weighted else way.name


def ratios(rows: Sequence[Row]) -> list[str]:
    """The three ratios of tokens per second that matter, as lines of text, for rows of one case."""
    rates = {(case_of(row)["weight_rows"], row["provider"]): rate(row) for row in rows}
    few, most = min(count for count, _ in rates), max(count for count, _ in rates)
    pairs = [(most, MERGED), (most, PLAIN), (few, OURS)]
    lines = []
    for count, name in pairs:
        words = f"{OURS} with {most} rows / {name}"
        words += f" with {count} rows" if name in (OURS, MERGED) else ""
        ours, other = rates.get((most, OURS)), rates.get((count, name))
        if ours is None or other is None:
            lines.append(f"{words}: not measured")
        else:
            lines.append(f"{words}: {ours / other:.3f}")
    return lines
