"""Measures which path of `mixed_lora` is fastest on this CPU, for sizes of layers.

`Sampler` and `CLPTrainer` have the layers of their model measured at the first use (`ensure`), and
`python -m clp_kernels.selftest --tune` has common sizes measured (`tune`). Each path is timed
through the public op, without gradients, over weights that are not in the caches. On a GPU nothing
is measured.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from clp_kernels import native, trust
from clp_kernels.files import cache_folder, locked
from clp_kernels.ops import choices
from clp_kernels.ops.mixed_lora.cpu import (
    ANY,
    Limits,
    Size,
    choose,
    fast_path,
    forget,
    product_dtype,
)
from clp_kernels.ops.mixed_lora.op import mixed_lora

TOKENS = tuple(2**k for k in range(12))
# In smaller matrices there are at most 5 us per call to win.
SMALLEST = 2**18
# Bytes of weights that a call is measured over, more than the caches of most processors hold.
ROTATED = 2**26
# Seconds that `ensure` may take.
LIMIT = 20.0
# What the kernel and PyTorch run: the limits that send a call there.
_PATHS = {"whole": Limits(1, ANY, 0), "adapters": Limits(1, 0, ANY), "products": Limits(1, 0, 0)}
Times = dict[str, float]


class Layer(Protocol):
    """What is read of a layer, a clp_kernels.nn.mixed_lora.MixedLoRALinear."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    @property
    def weight(self) -> Tensor:
        """The base layer's."""


def ensure(layers: Iterable[Layer], *, progress: bool = True) -> None:
    """Measures layers on the CPU whose size has not been measured on this machine yet.

    It takes at most about 20 s, once per processor, size, number of threads, PyTorch and version of
    the kernels; what is left then is measured the next time. Small layers are not measured, and
    nothing is with CLP_KERNELS_TUNE=0, or with CLP_KERNELS_TRUST=all or =none. Of several processes
    one measures, and the others wait for it.

    Raises:
        BackendError: CLP_KERNELS_TUNE or CLP_KERNELS_TRUST is none of its values.
    """
    sizes = {_size_of(layer) for layer in layers if layer.weight.device.type == "cpu"}
    tune([s for s in sorted(sizes, key=str) if _is_measured(s)], progress=progress, limit=LIMIT)


def common_sizes() -> list[Size]:
    """Square layers of 768 to 4096 features with two adapters of rank 8 or four of rank 16."""
    widths = [(768, 16), (768, 64), (1024, 64), (1536, 64), (2048, 16), (2048, 64), (3072, 64),
              (4096, 64)]  # fmt: skip
    threads = torch.get_num_threads()
    return [
        Size(dtype, dtype, width, width, rank, threads)
        for dtype in (torch.float32, torch.bfloat16)
        for width, rank in widths
    ]


def tune(
    sizes: Iterable[Size], *, anew: bool = False, progress: bool = True, limit: float = math.inf
) -> dict[Size, Limits]:
    """Measures these sizes, those that are known already only if `anew`, and keeps the results.

    limit: seconds after which no other size is begun, and the one that is measured is cut short.
    """
    wanted = list(sizes)
    if not wanted or not choices.is_on() or native.cpu_missing():
        return {}
    if trust.distrust("mixed_lora", "cpu", torch.device("cpu")):
        return {}
    found: dict[Size, Limits] = {}
    with ExitStack() as stack:
        left = wanted if anew else _unknown(wanted)
        if not left:
            return {}
        # Two processes at once would measure each other; `keep` warns if there is no folder.
        with contextlib.suppress(OSError):
            cache_folder().mkdir(parents=True, exist_ok=True)
            waiting = "another process measures the kernels; waiting for its results"
            stack.enter_context(locked(cache_folder() / "measuring.lock", waiting))
        choices.known.cache_clear()  # what another process has measured
        forget()
        left = wanted if anew else _unknown(wanted)
        end = time.monotonic() + limit
        bar = stack.enter_context(
            tqdm(left, desc="measuring the kernels", unit="size", disable=not progress)
        )
        for size in bar:
            if time.monotonic() > end:
                break
            bar.set_postfix_str(str(size), refresh=False)
            has_gemm = product_dtype(size.dtype, size.lora_dtype) == size.dtype
            found[size] = limits_of(measure(size, end), has_gemm)
            choices.keep("mixed_lora", str(size), list(found[size]))
        forget()
    return found


def _unknown(sizes: Sequence[Size]) -> list[Size]:
    known = choices.known("mixed_lora")
    return [size for size in sizes if str(size) not in known]


def _size_of(layer: Layer) -> Size:
    found = Size.of(layer.lora_A, layer.lora_A, layer.lora_B.shape[1])
    return found._replace(dtype=layer.weight.dtype)


def _is_measured(size: Size) -> bool:
    large = size.in_features * size.out_features >= SMALLEST
    return large and size.dtype in native.DTYPES and size.lora_dtype in native.DTYPES


@torch.no_grad()
def measure(size: Size, end: float = math.inf) -> dict[int, Times]:
    """Seconds of each path, by number of tokens, from one token up.

    It goes on until PyTorch's products are clearly the fastest twice in a row (or, if there are
    none in x's dtype, until another path is by far), or until the time `end`.
    """
    calls = _calls(size)
    products = product_dtype(size.dtype, size.lora_dtype) == size.dtype
    paths = {name: of for name, of in _PATHS.items() if products or name != "products"}
    found: dict[int, Times] = {}
    before = ""
    try:
        for tokens in TOKENS:
            found[tokens] = _timed(size, paths, calls(tokens))
            best, second = sorted(found[tokens], key=found[tokens].__getitem__)[:2]
            lead = found[tokens][second] / found[tokens][best]
            clear = best if lead > (1.05 if products else 1.3) else ""
            ends = clear == before == ("products" if products else best)
            if ends or time.monotonic() > end:
                break
            before = clear
    finally:
        forget()
    return found


def _timed(size: Size, paths: dict[str, Limits], run: Callable[[], Tensor]) -> Times:
    """Lower quartiles of 3 to 25 calls of each path, in turn; about 0.2 s of them."""
    taken: dict[str, list[float]] = {name: [] for name in paths}
    begin, rounds = time.monotonic(), 0
    while rounds < 3 or (rounds < 25 and time.monotonic() - begin < 0.2):
        rounds += 1
        for name, limits in paths.items():
            choose(size, limits)
            fast_path()
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    return {name: sorted(of)[len(of) // 4] for name, of in taken.items()}


def _calls(size: Size) -> Callable[[int], Callable[[], Tensor]]:
    """For a number of tokens, a call on the next of some layers."""
    dtype, lora_dtype, K, N, rank, _ = size
    count = max(2, -(-ROTATED // (K * N * dtype.itemsize)))
    W = torch.full((count, N, K), 0.01, dtype=dtype)
    A = torch.full((count, 1, rank, K), 0.01, dtype=lora_dtype)
    B = torch.full((count, 1, N, rank), 0.01, dtype=lora_dtype)
    turn = 0

    def calls(tokens: int) -> Callable[[], Tensor]:
        x, weights = torch.full((tokens, K), 0.01, dtype=dtype), torch.ones(tokens, 1)

        def run() -> Tensor:
            nonlocal turn
            turn = (turn + 1) % count
            return mixed_lora(x, W[turn], A[turn], B[turn], weights, backend="cpu")

        return run

    return calls


def limits_of(times: dict[int, Times], has_gemm: bool) -> Limits:
    """The limits with the least time lost, in the geometric mean over the numbers of tokens.

    Between two numbers of tokens the limit is their geometric mean. If a path is the fastest up to
    the last one, that is its limit; without products in x's dtype (has_gemm) it has none.
    """
    tokens = sorted(times)
    ends = range(len(tokens) + 1)

    def limit(end: int) -> int:
        if end == len(tokens):
            return tokens[-1] if has_gemm else ANY
        return math.isqrt(tokens[end - 1] * tokens[end]) if end else 0

    def best(path: str, others: list[float], starts: Iterable[int]) -> tuple[int, int, list[float]]:
        """Between which two numbers the times of `path`, instead of the others, are least in all.

        Of two that differ by less than 2 % in a time, the one with fewer changes.
        """
        rows = {
            (start, end): [
                *others[:start],
                *(times[n][path] for n in tokens[start:end]),
                *others[end:],
            ]
            for start in starts
            for end in ends[start:]
        }
        start, end = min(rows, key=lambda of: sum(map(math.log, rows[of])) + 0.02 * (of[0] > 0))
        return start, end, rows[start, end]

    products = [times[n].get("products", math.inf) for n in tokens]
    _, adapters, least = best("adapters", products, [0])
    start, whole, _ = best("whole", least, ends)
    first = math.isqrt(tokens[start - 1] * tokens[start]) + 1 if 0 < start < whole else 1
    return Limits(first, limit(whole) if start < whole else 0, limit(adapters))
