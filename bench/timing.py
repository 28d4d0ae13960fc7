"""The one timing protocol, for every subject.

Each provider first runs once on the inputs that will be timed, and its output must pass the error
gate; what fails is refused: it gets a reason instead of a time. Then rounds: every provider once a
round (A B A B, not A then B), in an order shuffled anew each round, so that drift of the machine
and whatever the neighbour left in the caches hit all alike. The first rounds are warm-up.

CPU times are wall-clock. GPU times lie between two events, after a write that pushes the inputs
out of the L2 cache; with `graph`, what is timed is the replay of a captured CUDA graph, so that
launch gaps are not. Peak GPU memory is taken in a call of its own.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

FLUSH_BYTES = 256 * 2**20  # larger than any GPU's L2 (B200: 126 MB)


@dataclass(frozen=True)
class Provider:
    """One way to do the work. A name that starts with "torch" is a baseline.

    run: does the work once, gives the output.
    check: the error gate: the share of the error budget that an output uses (0 to 1), or
        AssertionError.
    graph: whether it can be captured in a CUDA graph (it never reads the GPU on the host).
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[Any], float]
    graph: bool = True


@dataclass(frozen=True)
class Protocol:
    """How often: `repeats` rounds after `warmup`, less where a provider has used its seconds.

    A slow provider leaves after `seconds`, but never with fewer than `least` times.
    """

    warmup: int = 2
    repeats: int = 100
    least: int = 5
    seconds: float = 0.5


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: median, 20th and 80th percentile; the gate's result; peak GPU bytes."""

    p20_us: float
    p50_us: float
    p80_us: float
    max_err_ratio: float
    peak_bytes: int | None = None


def measure(
    providers: Sequence[Provider],
    device: torch.device,
    protocol: Protocol,
    *,
    graph: bool = False,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times of the providers that pass their gate, and the reasons of those that do not."""
    runs: dict[str, Callable[[], Any]] = {}
    shares: dict[str, float] = {}
    refused: dict[str, str] = {}
    for provider in providers:
        if graph and not provider.graph:
            continue
        try:
            run = _captured(provider.run) if graph else provider.run
            shares[provider.name] = provider.check(run())
            runs[provider.name] = run
        except AssertionError as error:
            refused[provider.name] = str(error) or "the error gate failed"
    samples = _rounds(runs, stopwatch(device), protocol)
    on_gpu = device.type == "cuda"
    peaks = {p.name: _peak_bytes(p.run, device) for p in providers if on_gpu and p.name in runs}
    times = {}
    for name, seconds in samples.items():
        p20, p50, p80 = _quantiles(seconds)
        times[name] = Timing(p20, p50, p80, shares[name], peaks.get(name))
    return times, refused


def _rounds(
    runs: dict[str, Callable[[], Any]],
    watch: Callable[[Callable[[], Any]], float],
    protocol: Protocol,
) -> dict[str, list[float]]:
    """Seconds of each call. A fixed seed shuffles, so that two runs have the same schedule."""
    shuffle = random.Random(0).shuffle
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(protocol.warmup + protocol.repeats):
        names = [
            name
            for name, times in samples.items()
            if len(times) < protocol.least or sum(times) < protocol.seconds
        ]
        shuffle(names)
        for name in names:
            seconds = watch(runs[name])
            if number >= protocol.warmup:
                samples[name].append(seconds)
    return samples


def stopwatch(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """A function that times one call in seconds: wall-clock, or events after an L2 flush."""

    def on_cpu(run: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    if device.type == "cpu":
        return on_cpu
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def on_gpu(run: Callable[[], Any]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()  # also keeps the GPU busy while the host enqueues what follows
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return on_gpu


def _captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """The replay of a CUDA graph of `run`; gives the same (overwritten) output each time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries and compilers set themselves up outside the capture
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> Any:
        graph.replay()
        return output

    return replay


def _peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """GPU memory that one call takes beyond what is held before it, its outputs included."""
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - held


def _quantiles(seconds: list[float]) -> list[float]:
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    microseconds = torch.tensor(seconds, dtype=torch.float64) * 1e6
    return [float(q) for q in microseconds.quantile(levels)]


def copy_bandwidth(device: torch.device, size: int = 512 * 2**20) -> float:
    """Bytes a second of a large copy, read plus written: the roof of whatever moves bytes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    provider = Provider("copy", lambda: target.copy_(source), lambda _: 0.0)
    protocol = Protocol(warmup=2, repeats=9, seconds=float("inf"))
    times, _ = measure([provider], device, protocol)
    return 2 * size / (times["copy"].p50_us * 1e-6)
