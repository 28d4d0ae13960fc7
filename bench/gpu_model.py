"""A model of the GPU kernels' speed, made from their machine code: no kernel runs, no GPU is used.

    python -m bench.gpu_model            # 4 minutes on two cores
    python -m bench.gpu_model --op sample --no-save

It compiles every variant of the Triton kernels for the H100 and H200 (sm_90) and the B200 (sm_100),
takes those of `_cuda` as they were built, and reads from the disassembly what one iteration of the
main loop issues: instructions, bytes from and to memory, floating point operations of the tensor
cores, float64 and special function instructions. An SM that holds as many blocks as registers and
shared memory allow needs at least, per iteration of all its warps, in cycles:

    memory      bytes / (bandwidth / SMs / clock)
    issue       instructions / 4 schedulers
    shared      bytes of shared memory read and written / 128
    tensor      operations / rate of the tensor cores
    float64     32 x instructions / rate
    special     32 x instructions / 16 (exp2, log2, reciprocal)
    latency     LATENCY / iterations whose loads are under way at the same time

The largest one is the bound, and memory / largest is the share of the bandwidth that the loop can
reach. What the model leaves out: launches, SMs without a block at the end, dependencies between
instructions, bank conflicts, branches (each instruction counts once). It assumes that each byte
comes from memory, or, in loops with more than CACHED operations per byte, from the L2 cache: other
blocks read what tiles that large read. Its numbers order variants and say what limits one; how fast
a kernel is, rows of `bench` say.
"""

import argparse
import csv
import importlib
import io
import multiprocessing
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bench.report import rows
from bench.timing import progress
from clp_kernels.files import write_whole

OPS = ("mixed_lora", "mixed_linear", "mix_logits", "sample", "linear_logprob")
TABLE = rows.RESULTS / "model" / "gpu.csv"
# Cycles from a load to its data while many loads are under way: an assumption.
LATENCY = 800
# Operations per byte: a tile of 64 x 64 bfloat16 numbers makes 32 of each byte it reads.
CACHED = 32


@dataclass(frozen=True)
class GPU:
    """Per SM and cycle where nothing else is said. Bandwidths in bytes per second."""

    name: str
    target: str  # what nvcc calls it
    sms: int
    clock: float  # Hz
    memory: float
    cache: float  # L2 to SMs
    tensor: dict[str, float]  # bfloat16 operations by instruction; TF32 has half
    float64: float = 64
    special: float = 16
    registers: int = 65536
    shared: int = 228 * 1024
    most_warps: int = 64


# SMs, clocks and rates are those of NVIDIA's data sheets, the memory's bandwidth nine tenths of
# theirs (a large copy moves 4.3 TB/s on an H200). Assumptions are the rate of mma.sync (HMMA), for
# which Hopper and Blackwell are not made, as 0.62 of Hopper's, and the L2 caches' bandwidths.
GPUS = (
    GPU("H100", "90a", 132, 1.755e9, 3.0e12, 5.6e12, {"HMMA": 2540, "HGMMA": 4096}),
    GPU("H200", "90a", 132, 1.755e9, 4.3e12, 5.6e12, {"HMMA": 2540, "HGMMA": 4096}),
    GPU("B200", "100", 148, 1.85e9, 7.0e12, 9.0e12, {"HMMA": 2540, "UTCHMMA": 8192}),
)
CAPABILITIES = {"90a": (9, 0), "100": (10, 0)}


@dataclass
class Loop:
    """What one warp issues in one iteration of the main loop."""

    instructions: int = 0
    loaded: int = 0  # bytes, from global memory
    stored: int = 0
    shared_traffic: int = 0  # bytes
    operations: float = 0  # of the tensor cores, in bfloat16's rate: one in TF32 counts as two
    tensor: str = ""  # the instruction that makes them
    float64: int = 0
    special: int = 0
    groups: int = 0  # of asynchronous copies
    depth: float = 1  # iterations whose loads are under way at the same time


@dataclass(frozen=True)
class Kernel:
    """A compiled variant. `shared`: bytes per block."""

    op: str
    backend: str
    name: str
    target: str
    registers: int
    shared: int
    warps: int
    loop: Loop


# --- reading the disassembly ---------------------------------------------------------------------

Instruction = tuple[int, str, str, str]  # address, predicate, name, operands
_FUNCTION = re.compile(r"\s*Function : (\S+)")
_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?(\S+?)(?: (.*?))?\s*;")
_TARGET = re.compile(r"\(?(0x[0-9a-f]+)\)?")
_WIDTH = re.compile(r"\.(8|16|32|64|128|256|U8|S8|U16|S16)(?=\.|$)")


def functions(sass: str) -> dict[str, list[Instruction]]:
    """The instructions of each function in what `cuobjdump -sass` prints."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in sass.splitlines():
        if named := _FUNCTION.match(line):
            current = found.setdefault(named.group(1), [])
        elif match := _LINE.match(line):
            address, predicate, name, operands = match.groups()
            current.append((int(address, 16), predicate or "", name, operands or ""))
    return found


def main_loop(code: Sequence[Instruction]) -> Loop:
    """The innermost loop that loads most, or the whole kernel if no loop loads half of all bytes.

    A loop with asynchronous copies comes before others. Of a whole kernel loads of fewer than 16
    bytes do not count beside those of 16: they are of one value for all lanes, or of rows that are
    not aligned, whose code stands beside that of aligned ones. Subroutines, which stand behind the
    last EXIT, do not count.
    """
    ends = [i for i, (_, _, name, _) in enumerate(code) if name == "EXIT"]
    body = code[: ends[-1] + 1] if ends else code
    spans = []
    for address, _, name, operands in body:
        target = _TARGET.search(operands) if name.split(".")[0] == "BRA" else None
        if target and int(target.group(1), 16) < address:
            spans.append((int(target.group(1), 16), address))
    inner = [s for s in spans if not any(s[0] <= o[0] and o[1] <= s[1] and o != s for o in spans)]
    loops = [count([i for i in body if first <= i[0] <= last]) for first, last in inner]
    whole = count(body)
    best = max(loops, key=lambda loop: (loop.groups > 0, loop.loaded), default=Loop())
    if best.groups or 2 * best.loaded >= whole.loaded > 0:
        return best
    wide = count([i for i in body if i[2].startswith("LDG") and _bytes(i[2]) == 16]).loaded
    whole.loaded = wide or whole.loaded
    return whole


def count(code: Iterable[Instruction]) -> Loop:
    """What one warp issues in these instructions."""
    loop, left = Loop(), None
    for _, _, name, operands in code:
        kind = name.split(".")[0]
        if kind == "NOP":
            continue
        loop.instructions += 1
        size = 32 * _bytes(name)
        if kind == "LDGSTS":
            loop.loaded += size
            loop.shared_traffic += size
        elif kind in ("LDG", "LD"):
            loop.loaded += size
        elif kind in ("STG", "ST", "RED", "ATOMG"):
            loop.stored += size
        elif kind in ("LDS", "STS"):
            loop.shared_traffic += size
        elif kind in ("LDSM", "STSM"):
            loop.shared_traffic += 128 * int(name.split(".")[-1]) if name[-1] in "124" else 128
        elif kind in ("HMMA", "HGMMA", "UTCHMMA"):
            loop.operations += _operations(name)
            loop.tensor = kind
        elif kind in ("DADD", "DMUL", "DFMA", "DSETP"):
            loop.float64 += 1
        elif kind == "MUFU":
            loop.special += 1
        elif kind == "LDGDEPBAR":
            loop.groups += 1
        elif kind == "DEPBAR" and operands.startswith("SB0,"):
            allowed = int(operands.split(",")[1], 16)
            left = allowed if left is None else min(left, allowed)
    if loop.groups and left is not None:
        # The loop waits until `left` groups of copies are under way, then starts `groups` more.
        loop.depth = (left + loop.groups) / loop.groups
    return loop


def _bytes(name: str) -> int:
    """Bytes per lane of a load or store."""
    widths = _WIDTH.findall(name)
    return int(widths[-1].lstrip("US")) // 8 if widths else 4


def _operations(name: str) -> float:
    """Operations of one warp in one instruction, as many as bfloat16 makes in the same time."""
    rate = 2 if "TF32" in name else 1
    if name.startswith("HGMMA"):  # four warps together
        m, n, k = map(int, name.split(".")[1].split("x"))
        return rate * 2 * m * n * k / 4
    if name.startswith("HMMA"):  # 16 x 8 x k
        return rate * 2 * 16 * 8 * int(name.split(".")[1][3:])
    return 0  # UTCHMMA has its shape in a register


# --- the model -----------------------------------------------------------------------------------


def blocks_per_sm(kernel: Kernel, gpu: GPU) -> int:
    """How many blocks an SM holds. Registers come in 256 per warp, shared memory has 1 KiB more."""
    registers = -(-kernel.registers * 32 // 256) * 256 * kernel.warps
    return min(
        32,
        gpu.most_warps // kernel.warps,
        gpu.registers // registers,
        gpu.shared // (kernel.shared + 1024),
    )


def cycles(kernel: Kernel, gpu: GPU) -> dict[str, float]:
    """The least cycles per iteration of all warps of an SM, by what limits them."""
    loop = kernel.loop
    warps = blocks_per_sm(kernel, gpu) * kernel.warps
    moved = warps * (loop.loaded + loop.stored)
    from_cache = loop.loaded and loop.operations / loop.loaded > CACHED
    bandwidth = (gpu.cache if from_cache else gpu.memory) / gpu.sms / gpu.clock
    return {
        "memory": moved / bandwidth,
        "issue": warps * loop.instructions / 4,
        "shared": warps * loop.shared_traffic / 128,
        "tensor": warps * loop.operations / gpu.tensor.get(loop.tensor, float("inf")),
        "float64": warps * 32 * loop.float64 / gpu.float64,
        "special": warps * 32 * loop.special / gpu.special,
        "latency": LATENCY / loop.depth if loop.loaded else 0.0,
    }


def bound(kernel: Kernel, gpu: GPU) -> tuple[str, float]:
    """(what limits the main loop, the share of the memory's bandwidth that it can reach)."""
    least = cycles(kernel, gpu)
    limit = max(least, key=lambda name: least[name])
    return limit, least["memory"] / least[limit] if least[limit] else 0.0


# --- the kernels ---------------------------------------------------------------------------------


def tool() -> str:
    """cuobjdump: the one on the path, or Triton's."""
    if path := shutil.which("cuobjdump"):
        return path
    try:
        import triton
    except ImportError:
        raise SystemExit("bench.gpu_model needs cuobjdump, which CUDA and Triton have") from None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path)


def dump(binary: Path, *options: str) -> str:
    """What cuobjdump prints of a module or a cubin."""
    done = subprocess.run([tool(), *options, str(binary)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"cuobjdump {options} {binary}: {done.stderr.strip()}")
    return done.stdout


def cuda_kernels(module: Path, target: str) -> list[Kernel]:
    """The kernels of `_cuda` for one architecture, as it was built."""
    architecture = ("-arch", f"sm_{target}")
    used = re.findall(
        r"Function (\S+):\s+REG:(\d+) .*?SHARED:(\d+)", dump(module, "-res-usage", *architecture)
    )
    threads = _threads(dump(module, "-elf", *architecture))
    code = functions(dump(module, "-sass", *architecture))
    found = []
    for symbol, registers, shared in used:
        loop, warps = main_loop(code[symbol]), threads[symbol] // 32
        # The ring of `stream` (csrc/cuda/gemm.cuh), which is not in the binary: depth + 1 steps.
        ring = int((loop.depth + 1) * loop.loaded) * warps if loop.groups else 0
        op, name = _readable(symbol)
        found.append(
            Kernel(op, "cuda", name, target, int(registers), int(shared) + ring, warps, loop)
        )
    return found


def _threads(elf: str) -> dict[str, int]:
    """The launch bounds of each function."""
    found, symbol = {}, ""
    lines = iter(elf.splitlines())
    for line in lines:
        if line.startswith(".nv.info."):
            symbol = line.removeprefix(".nv.info.").strip()
        elif "EIATTR_MAX_THREADS" in line:
            next(lines)
            found[symbol] = int(next(lines).split()[1], 16)
    return found


def _readable(symbol: str) -> tuple[str, str]:
    """(op, kernel<arguments>) of a mangled name."""
    match = re.search(
        r"_N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}\d+?([a-z]\w*?_kernel)(.*)", symbol
    )
    if match is None:
        return "", symbol
    source, name, rest = match.groups()
    arguments = re.match(r"I(.*?)EE?v", rest)
    text = arguments.group(1) if arguments else ""
    for mangled, plain in (("13__nv_bfloat16", "bf16 "), ("6__half", "fp16 "), ("S2_", "same ")):
        text = text.replace(mangled, plain)
    text = re.sub(r"^f(?=L|$)|(?<= )f(?=L|$)", "fp32 ", text)
    text = re.sub(r"LNS0_\d[A-Za-z]+E(\d)E?", r"\1 ", re.sub(r"Li(\d+)E?", r"\1 ", text))
    return ("sample" if source == "filter" else source), f"{name}<{', '.join(text.split())}>"


def aligned(kernel: Any, signature: dict[str, str]) -> dict[tuple[int, ...], list[list[Any]]]:
    """Pointers and sizes that 16 divides, as in real layers: what lets loads be asynchronous."""
    return {
        (p.num,): [["tt.divisibility", 16]]
        for p in kernel.params
        if signature[p.name] != "constexpr"
        and not p.do_not_specialize
        and not p.do_not_specialize_on_alignment
    }


def compiled(variant: Sequence[Any], capability: tuple[int, int]) -> Any:
    """What triton.compile makes of (name, kernel, signature, constexprs, options)."""
    import triton
    from triton.backends.compiler import GPUTarget

    _, kernel, signature, constexprs, options = variant
    source = triton.compiler.ASTSource(
        fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned(kernel, signature)
    )
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    return triton.compile(source, target=target, options=options)


def triton_kernel(op: str, target: str, place: int) -> Kernel:
    """The variant at this place of an op's list."""
    module = importlib.import_module(f"clp_kernels.ops.{op}.triton")
    variant = module.variants(CAPABILITIES[target])[place]
    made = compiled(variant, CAPABILITIES[target])
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(made.asm["cubin"])
        registers = re.search(r"REG:(\d+)", dump(binary, "-res-usage"))
        (code,) = functions(dump(binary, "-sass")).values()
    assert registers is not None
    shared, warps = made.metadata.shared, made.metadata.num_warps
    name = variant[0]
    return Kernel(
        op, "triton", name, target, int(registers.group(1)), shared, warps, main_loop(code)
    )


def triton_kernels(ops: Sequence[str]) -> list[Kernel]:
    """All variants, compiled by as many processes as there are cores."""
    jobs = [
        (op, target, place)
        for op in ops
        for target, capability in CAPABILITIES.items()
        for place in range(
            len(importlib.import_module(f"clp_kernels.ops.{op}.triton").variants(capability))
        )
    ]
    # Forked, so that PyTorch and Triton are imported once.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        futures = [pool.submit(triton_kernel, *job) for job in jobs]
        for _ in progress(as_completed(futures), len(futures), "kernel"):
            pass
    return with_operations([future.result() for future in futures])


def with_operations(kernels: list[Kernel]) -> list[Kernel]:
    """Gives loops of UTCHMMA the operations per byte of the same tile on sm_90.

    The shape of the product is in a register there, but how often a tile uses a byte that it loads
    does not depend on the instruction.
    """
    intensity = {
        (k.op, k.name): k.loop.operations / k.loop.loaded
        for k in kernels
        if k.loop.operations and k.loop.loaded
    }
    for kernel in kernels:
        if kernel.loop.tensor == "UTCHMMA":
            per_byte = intensity.get((kernel.op, kernel.name), 0.0)
            kernel.loop.operations = per_byte * kernel.loop.loaded
    return kernels


# --- the table -----------------------------------------------------------------------------------

FIELDS = ("op", "backend", "name", "target", "registers", "shared", "warps")
COUNTS = tuple(field.name for field in fields(Loop))


def write(kernels: Sequence[Kernel], path: Path = TABLE) -> None:
    """Replaces the rows of the same ops."""
    named = {kernel.op for kernel in kernels}
    kept = [k for k in read(path) if k.op not in named] if path.is_file() else []
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*FIELDS, *COUNTS])
    for kernel in sorted([*kept, *kernels], key=lambda k: (OPS.index(k.op), k.backend, k.target)):
        whole = asdict(kernel)
        table.writerow([*(whole[f] for f in FIELDS), *(whole["loop"][f] for f in COUNTS)])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.getvalue().encode())


def read(path: Path = TABLE) -> list[Kernel]:
    """The rows of a table."""
    found = []
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            counts = {f: float(row[f]) if f in ("operations", "depth") else
                      row[f] if f == "tensor" else int(row[f]) for f in COUNTS}  # fmt: skip
            numbers = {f: int(row[f]) for f in ("registers", "shared", "warps")}
            texts = {f: row[f] for f in ("op", "backend", "name", "target")}
            found.append(Kernel(**texts, **numbers, loop=Loop(**counts)))
    return found


def table(kernels: Sequence[Kernel]) -> str:
    """A Markdown table: a line per kernel, a column per GPU; of variants of one `short` name the
    first, and the counts of the first GPU's architecture."""
    heads = ["op", "kernel", "registers", "KiB", "warps per SM", "instructions per KiB",
             "operations per byte", *(gpu.name for gpu in GPUS)]  # fmt: skip
    lines: dict[tuple[str, str], list[str]] = {}
    for kernel in sorted(kernels, key=lambda kernel: kernel.target != GPUS[0].target):
        cells = lines.setdefault((f"{kernel.op}, {kernel.backend}", short(kernel)), [""] * 8)
        loop, moved = kernel.loop, kernel.loop.loaded + kernel.loop.stored
        for place, gpu in enumerate(GPUS):
            if gpu.target != kernel.target or cells[5 + place]:
                continue
            limit, share = bound(kernel, gpu)
            cells[5 + place] = f"{limit} {share:.2f}"
            if not cells[0]:
                cells[:5] = [
                    str(kernel.registers),
                    f"{kernel.shared / 1024:.0f}",
                    str(blocks_per_sm(kernel, gpu) * kernel.warps),
                    f"{loop.instructions / moved * 1024:.0f}" if moved else "",
                    f"{loop.operations / loop.loaded:.0f}" if loop.operations else "",
                ]
    rules = ["---", "---", *["--:"] * 5, *["---"] * 3]
    whole = [heads, rules, *([*key, *cells] for key, cells in lines.items())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in whole)


def short(kernel: Kernel) -> str:
    """A kernel's name with what tells variants of other speed apart: dtypes, blocks, warps."""
    name, *rest = kernel.name.split(" ")
    if kernel.backend == "cuda":
        return kernel.name
    given = dict(part.split("=", 1) for part in rest if "=" in part)
    dtypes = dict.fromkeys(v[1:] for k, v in given.items() if v in ("*bf16", "*fp16", "*fp32")
                           and k not in ("weights", "u", "z", "g", "planes"))  # fmt: skip
    blocks = [f"{k.removeprefix('BLOCK_')}{v}" for k, v in given.items() if k.startswith("BLOCK")]
    return " ".join([name, "/".join(dtypes), *blocks, f"{kernel.warps} warps"])


def section(path: Path = TABLE) -> str:
    """What RESULTS.md says of the model; empty without a table."""
    if not path.is_file():
        return ""
    shown = [k for k in read(path) if "fp16" not in k.name]
    return (
        "## A model of the GPU kernels: nothing here was measured\n\n"
        "Made by `python -m bench.gpu_model` from the machine code of each kernel; what it counts, "
        "assumes and leaves out stands at the top of `bench/gpu_model.py`. A cell says what limits "
        "the main loop on a GPU, and which share of the memory's bandwidth it can then reach (of "
        "the L2 cache's above 32 operations per byte). Registers, shared memory (KiB per block), "
        "warps per SM, instructions per KiB moved and operations per byte are those of sm_90. "
        "Variants in float16 have the numbers of those in bfloat16.\n\n"
        f"{table(shown)}\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the table and prints it; gives the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_model", allow_abbrev=False)
    parser.add_argument("--op", action="append", choices=OPS, help="this op alone")
    parser.add_argument("--no-save", action="store_true", help="leave bench/results as it is")
    options = parser.parse_args(argv)
    ops = options.op or OPS
    tool()
    modules = sorted((rows.ROOT / "clp_kernels").glob("_cuda*.so"))
    if not modules:
        print("left out: clp_kernels._cuda, which was not built (no nvcc)", file=sys.stderr)
    found = [k for m in modules for t in CAPABILITIES for k in cuda_kernels(m, t) if k.op in ops]
    found += triton_kernels(ops)
    if not options.no_save:
        write(found)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
