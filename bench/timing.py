"""The one timing protocol, for every subject.

Each provider first runs once on the inputs that will be timed, and its output must pass the error
gate; one that fails is refused: it gets a reason instead of a time. Then rounds: every provider
once per round (A B A B, not A then B), in a new random order each round, so that drift of the
machine and the state of the caches affect all equally. The first rounds are warm-up.

If one provider is called "base", it runs in every round, and the others are also compared with it
round by round: the median of (own time - base's time of the same round), which a drift of the
machine does not change, and which is far smaller than either time.

CPU times are wall-clock. GPU times lie between two events, after a write that pushes the inputs
out of the L2 cache; with `graph`, what is timed is the replay of a captured CUDA graph, so that
launch gaps are not. Peak memory is taken in a separate call.
"""

import ctypes
import gc
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BASE = "base"
FLUSH_BYTES = 256 * 2**20  # larger than any GPU's L2 (B200: 126 MB)


@dataclass(frozen=True)
class Provider:
    """One way to do the work. "base" is a part of it; rows.BASELINES names the baselines.

    run: does the work once, gives the output.
    check: the error gate: the share of the error budget that an output uses (0 to 1), or
        AssertionError.
    graph: whether it can be captured in a CUDA graph (it never reads the GPU on the host).
    peak: takes the peak bytes if a plain call of `run` would not show them (what the provider keeps
        between its calls); None if they are unknown.
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[Any], float]
    graph: bool = True
    peak: Callable[[], int | None] | None = None


@dataclass(frozen=True)
class Protocol:
    """How often: `repeats` rounds after `warmup`, fewer if a provider has used its seconds.

    A slow provider leaves after `seconds`, but never with fewer than `least` times.
    """

    warmup: int = 2
    repeats: int = 100
    least: int = 5
    seconds: float = 0.5


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median, 20th and 80th percentile; the gate's result; peak bytes.

    extra_us and over_base: medians over the rounds of own time - base's, and own time / base's.
    ttft_us, ttft_p95_us: of whole generation runs, the time to a request's first token.
    """

    p20_us: float
    p50_us: float
    p80_us: float
    max_err_ratio: float
    peak_bytes: int | None = None
    extra_us: float | None = None
    over_base: float | None = None
    ttft_us: float | None = None
    ttft_p95_us: float | None = None


def measure(
    providers: Sequence[Provider],
    device: torch.device,
    protocol: Protocol,
    *,
    graph: bool = False,
    memory: bool = False,
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times of the providers that pass their gate, and the reasons of those that do not.

    A provider that raises anything (a kernel that does not launch or compile, no memory) is refused
    too, at whichever of its calls. `memory` takes the peak on the CPU as well; on a GPU it is
    always taken.
    """
    refused: dict[str, str] = {}
    runs: dict[str, Callable[[], Any]] = {}
    shares: dict[str, float] = {}
    for provider in providers:
        if graph and not provider.graph:
            continue
        with _Refused(provider.name, refused):
            run = _captured(provider.run) if graph else provider.run
            shares[provider.name] = provider.check(run())
            runs[provider.name] = run
    samples = _rounds(runs, stopwatch(device), protocol, refused)
    peak = {"cuda": peak_bytes_gpu, "cpu": peak_bytes_cpu}[device.type]
    counted = memory or device.type == "cuda"
    peaks: dict[str, int | None] = {}
    for provider in providers:
        if (counted or provider.peak) and provider.name in samples:
            with _Refused(provider.name, refused):
                peaks[provider.name] = provider.peak() if provider.peak else peak(provider.run)
    samples = {name: seconds for name, seconds in samples.items() if name not in refused}
    times = {}
    for name, seconds in samples.items():
        p20, p50, p80 = _quantiles(seconds.values())
        extra = over = None
        if BASE in samples and name != BASE:
            pairs = [(own, samples[BASE][number]) for number, own in seconds.items()]
            extra = _quantiles(own - base for own, base in pairs)[1]
            over = _quantiles(own / base for own, base in pairs)[1] / 1e6
        times[name] = Timing(p20, p50, p80, shares[name], peaks.get(name), extra, over)
    return times, refused


class _Refused:
    """Context of one provider's calls: whatever they raise is its reason in `refused`.

    Any type: baselines are other projects' code, of versions that may lack what is called, and
    Triton's OutOfResources and CompilationError are no RuntimeErrors. One must not end the others.
    """

    def __init__(self, name: str, refused: dict[str, str]) -> None:
        self.name, self.refused = name, refused

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False  # Ctrl-C, and no error
        gate = isinstance(error, AssertionError)
        text = str(error) if gate else f"{type(error).__name__}: {error}"
        self.refused[self.name] = text or "the error gate failed"
        return True


def _rounds(
    runs: dict[str, Callable[[], Any]],
    watch: Callable[[Callable[[], Any]], float],
    protocol: Protocol,
    refused: dict[str, str],
) -> dict[str, dict[int, float]]:
    """Seconds of each call by round. A fixed seed shuffles: two runs have the same schedule."""
    shuffle = random.Random(0).shuffle
    samples: dict[str, dict[int, float]] = {name: {} for name in runs}
    for number in range(protocol.warmup + protocol.repeats):
        names = [
            name
            for name, times in samples.items()
            if len(times) < protocol.least or sum(times.values()) < protocol.seconds
        ]
        if names and BASE in samples and BASE not in names:
            names.append(BASE)
        shuffle(names)
        for name in names:
            with _Refused(name, refused):
                seconds = watch(runs[name])
                if number >= protocol.warmup:
                    samples[name][number] = seconds
        samples = {name: times for name, times in samples.items() if name not in refused}
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


def peak_bytes_gpu(run: Callable[[], Any]) -> int:
    """GPU memory that one call takes beyond what is allocated before it, its outputs included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_bytes_cpu(run: Callable[[], Any]) -> int:
    """CPU memory that one call takes through PyTorch's allocator, its outputs included.

    Exact for tensors, from the allocations and frees that the profiler records in order. What
    libraries allocate past PyTorch (oneDNN's and MKL's scratch, a kernel's own) is not in it.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else two lines on stderr for each call
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    steps = [event for event in events if event["name"] == "[memory]"]
    allocated = peak = 0
    for step in sorted(steps, key=lambda event: event["ts"]):
        allocated += step["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak


def resident_growth(run: Callable[[], Any]) -> int | None:
    """Bytes by which one call raises the process's resident memory at most, read each millisecond.

    For runs too long for the profiler. Whatever allocates is in it; what was freed before is given
    back to the system first, so that it does not hide what the call takes. None outside Linux.
    """
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        run()
        return None
    page = os.sysconf("SC_PAGE_SIZE")

    def resident() -> int:
        return int(statm.read_text(encoding="ascii").split()[1]) * page

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    before = peak = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(1e-3):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
        peak = max(peak, resident())
    finally:
        done.set()
        watcher.join()
    return peak - before


def _quantiles(seconds: Iterable[float]) -> list[float]:
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    microseconds = torch.tensor(list(seconds), dtype=torch.float64) * 1e6
    return [float(q) for q in microseconds.quantile(levels)]


@dataclass(frozen=True)
class Roofs:
    """What the device can do at best: bytes copied per second, FLOP/s of a dtype's GEMM."""

    bandwidth: float
    flops: Mapping[str, float]


def roofs(device: torch.device, dtypes: Iterable[str]) -> Roofs:
    """Both, measured."""
    flops = {dtype: gemm_rate(device, getattr(torch, dtype)) for dtype in dtypes}
    return Roofs(copy_bandwidth(device), flops)


def gemm_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP per second of F.linear with a square matrix: the roof of whatever multiplies."""
    size = size or (8192 if device.type == "cuda" else 1024)
    x = torch.randn(size, size, device=device).to(dtype)  # a GPU draws less power for constants
    provider = Provider("gemm", lambda: torch.nn.functional.linear(x, x), lambda _: 0.0)
    times, _ = measure([provider], device, Protocol(warmup=1, repeats=9, least=3))
    return 2 * size**3 / (times["gemm"].p50_us * 1e-6)


def copy_bandwidth(device: torch.device, size: int = 512 * 2**20) -> float:
    """Bytes per second of a large copy, read plus written: the roof of whatever moves bytes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    provider = Provider("copy", lambda: target.copy_(source), lambda _: 0.0)
    protocol = Protocol(warmup=2, repeats=9, seconds=float("inf"))
    times, _ = measure([provider], device, protocol)
    return 2 * size / (times["copy"].p50_us * 1e-6)


def progress(items: Iterable[Any], total: int, unit: str) -> Iterable[Any]:
    """A bar, where tqdm is installed; in a log a line every ten seconds."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, total=total, unit=unit, mininterval=0.1 if sys.stderr.isatty() else 10)
