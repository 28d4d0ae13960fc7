"""Compiles every Triton kernel variant for sm_80, sm_90 and sm_100, without a GPU.

A variant fails where ptxas spills registers or the kernel takes more shared memory than one block
may have. Run as a script, this file is the worker: it compiles in a process of its own, because
under TRITON_INTERPRET, which the other tests set, `triton.jit` gives kernels that cannot be
compiled.
"""

import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: there are no kernels to compile")

import triton
import triton.language as tl

from bench import gpu_model

PLANNED = ("clp_kernels.ops.mixed_lora.triton", "clp_kernels.ops.mixed_linear.triton")
# Those without a plan launch fixed tiles, which their own tests compare with the variants.
FIXED = ("mix_logits", "sample", "linear_logprob")
MODULES = (*PLANNED, *(f"clp_kernels.ops.{name}.triton" for name in FIXED))
BROKEN, INVALID = "broken", "invalid"
CAPABILITIES = ((8, 0), (9, 0), (10, 0))
# Bytes of shared memory that one block may take (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {(8, 0): 163 * 1024, (9, 0): 227 * 1024, (10, 0): 227 * 1024}
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")

Variant = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]
Result = dict[str, Any]
Report = dict[str, Any]
Job = tuple[str, tuple[int, int]]  # a module and an architecture


@triton.jit
def product_of_tiles(x_ptr, y_ptr, out_ptr, steps, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """Correct, but its tile may be larger than any GPU can hold."""
    rows, inner = tl.arange(0, BLOCK), tl.arange(0, DEPTH)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(steps):
        x = tl.load(x_ptr + rows[:, None] * DEPTH + inner[None, :] + step * BLOCK * DEPTH)
        y = tl.load(y_ptr + inner[:, None] * BLOCK + rows[None, :] + step * BLOCK * DEPTH)
        total = tl.dot(x, y, total)
    tl.store(out_ptr + rows[:, None] * BLOCK + rows[None, :], total)


@triton.jit
def scaled_by_their_sum(x_ptr, BLOCK: tl.constexpr):
    """Holds BLOCK values in registers until all are summed."""
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(x_ptr + tl.arange(0, BLOCK), x * tl.sum(x))


@triton.jit
def product_of_mismatched_tiles(x_ptr):
    """Does not compile."""
    x = tl.load(x_ptr + tl.arange(0, 16)[:, None] + tl.arange(0, 32)[None, :])
    tl.store(x_ptr, tl.sum(tl.dot(x, x)))


def broken_variants() -> list[Variant]:
    """One kernel that fits, one that spills and one that takes too much shared memory."""
    row = {"x_ptr": "*fp32", "BLOCK": "constexpr"}
    types = {"x_ptr": "*bf16", "y_ptr": "*bf16", "out_ptr": "*fp32", "steps": "i32"}
    signature = types | {"BLOCK": "constexpr", "DEPTH": "constexpr"}
    small, deep = {"BLOCK": 64, "DEPTH": 64}, {"BLOCK": 128, "DEPTH": 128}
    return [
        ("fits", product_of_tiles, signature, small, {"num_warps": 4, "num_stages": 3}),
        ("spills", scaled_by_their_sum, row, {"BLOCK": 2**15}, {"num_warps": 4}),
        ("shared", product_of_tiles, signature, deep, {"num_warps": 8, "num_stages": 6}),
    ]


def variants(module: str, capability: tuple[int, int]) -> list[Variant]:
    if module == BROKEN:
        return broken_variants()
    if module == INVALID:
        mismatched = ("mismatched", product_of_mismatched_tiles, {"x_ptr": "*fp16"}, {}, {})
        return [broken_variants()[0], mismatched]
    found: list[Variant] = importlib.import_module(module).variants(capability)
    return found


def compile_variant(variant: Variant, capability: tuple[int, int]) -> Result:
    name, log = variant[0], io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = gpu_model.compiled(variant, capability)
    spills, registers = (found.findall(log.getvalue()) for found in (SPILLS, REGISTERS))
    if not spills or not registers:
        raise RuntimeError(f"ptxas reported no registers for {name}: {log.getvalue()!r}")
    return {
        "name": name,
        "shared": compiled.metadata.shared,
        "spills": sum(int(store) + int(load) for store, load in spills),
        "registers": max(map(int, registers)),
    }


def compile_at(module: str, capability: tuple[int, int], place: int) -> Result:
    """Names the variant on stderr first: it may crash the process."""
    variant = variants(module, capability)[place]
    print("compiling", variant[0], "for", capability, file=sys.stderr, flush=True)
    return compile_variant(variant, capability)


def worker(jobs: list[str]) -> None:
    """Prints a line of JSON for each job "module major minor": its results, or why it failed.

    Two processes take one variant after another. They are forked from this one, so that PyTorch,
    Triton and the kernels are imported once (2.3 s of a processor), not once a module and target.
    """
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        submitted = {}
        for job in jobs:
            module, *numbers = job.split()
            capability = (int(numbers[0]), int(numbers[1]))
            submitted[job] = {
                variant[0]: pool.submit(compile_at, module, capability, place)
                for place, variant in enumerate(variants(module, capability))
            }
        for job, futures in submitted.items():
            errors = {name: e for name, future in futures.items() if (e := future.exception())}
            for error in errors.values():
                if isinstance(error, BrokenExecutor):
                    raise error  # a process is gone: no later result is worth anything
            failed = [f"{n}:\n" + "".join(traceback.format_exception(e)) for n, e in errors.items()]
            results = [] if failed else [future.result() for future in futures.values()]
            report = {"job": job, "failed": failed, "results": results}
            print(json.dumps(report), flush=True)


def run_worker(jobs: Collection[Job], cache: str) -> dict[Job, Report]:
    # Of a kernel that it finds in its cache Triton shows no log.
    environment = dict(os.environ, TRITON_CACHE_DIR=cache, TRITON_DUMP_PTXAS_LOG="1")
    environment["TRITON_ALWAYS_COMPILE"] = "1"
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])  # of bench
    environment.pop("TRITON_INTERPRET", None)
    named = {
        f"{module} {major} {minor}": (module, (major, minor)) for module, (major, minor) in jobs
    }
    command = [sys.executable, __file__, *named]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise AssertionError(f"the worker failed:\n{done.stderr[-4000:]}")
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    return {named[report["job"]]: report for report in reports}


def results_of(job: Job, compiled: dict[Job, Report]) -> list[Result]:
    """Raises AssertionError where a variant of the job did not compile."""
    if failed := compiled[job]["failed"]:
        raise AssertionError(f"{job} did not compile:\n" + "\n".join(failed)[-4000:])
    results: list[Result] = compiled[job]["results"]
    return results


def problems(results: list[Result], capability: tuple[int, int]) -> list[str]:
    """A line for each variant that spills or takes too much shared memory."""
    limit = SHARED_LIMIT[capability]
    found = []
    for result in results:
        if result["spills"]:
            found.append("{name}: spills {spills} bytes at {registers} registers".format(**result))
        if result["shared"] > limit:
            found.append("{name}: {shared} bytes of shared memory".format(**result) + f" > {limit}")
    return found


@pytest.fixture(scope="module")
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[Job, Report]:
    """What the selected tests need, compiled before the first of them (minutes for all)."""
    needs = [
        item.callspec.params
        for item in request.session.items
        if "compiled" in getattr(item, "fixturenames", ()) and isinstance(item, pytest.Function)
    ]
    jobs = {(need.get("module", BROKEN), need["capability"]) for need in needs}
    return run_worker(sorted(jobs), str(tmp_path_factory.mktemp("triton")))


by_architecture = pytest.mark.parametrize(
    "capability", CAPABILITIES, ids=lambda c: f"sm_{c[0]}{c[1]}"
)


@pytest.mark.gate
@by_architecture
@pytest.mark.parametrize("module", MODULES)
def test_no_spills_and_shared_memory_within_the_limit(
    module: str, capability: tuple[int, int], compiled: dict[Job, Report]
) -> None:
    results = results_of((module, capability), compiled)
    assert len(results) == len(variants(module, capability))
    assert not (found := problems(results, capability)), "\n".join(found)


@pytest.mark.gate
@by_architecture
def test_gate_reports_spills_and_shared_memory(
    capability: tuple[int, int], compiled: dict[Job, Report]
) -> None:
    found = problems(results_of((BROKEN, capability), compiled), capability)
    assert len(found) == 2
    assert re.fullmatch(r"spills: spills \d+ bytes at \d+ registers", found[0])
    assert re.fullmatch(
        rf"shared: \d+ bytes of shared memory > {SHARED_LIMIT[capability]}", found[1]
    )


def test_gate_reports_a_kernel_that_does_not_compile(tmp_path: Any) -> None:
    invalid, broken = (INVALID, (8, 0)), (BROKEN, (8, 0))
    compiled = run_worker([invalid, broken], str(tmp_path))
    assert len(results_of(broken, compiled)) == 3
    with pytest.raises(AssertionError, match=r"did not compile:\nmismatched:(.|\n)*tl.dot"):
        results_of(invalid, compiled)


def test_gate_reports_a_worker_that_ends_early(tmp_path: Any) -> None:
    with pytest.raises(AssertionError, match=r"worker failed:(.|\n)*no_such_module"):
        run_worker([("no_such_module", (8, 0))], str(tmp_path))


def tiles(plan: Any) -> Iterator[Any]:
    """The parts of a plan that describe one launch."""
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        if dataclasses.is_dataclass(value):
            yield value


def missing(tile: Any, listed: list[Variant]) -> bool:
    """Whether no variant has a tile's block sizes among its constexprs, and its options."""
    sizes = dataclasses.asdict(tile)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    wanted = Counter(sizes.values())
    return not any(
        options.items() <= with_options.items()
        and wanted <= Counter(v for v in constexprs.values() if type(v) is int)
        for _, _, _, constexprs, with_options in listed
    )


@by_architecture
@pytest.mark.parametrize("module", PLANNED)
def test_variants_cover_every_plan(module: str, capability: tuple[int, int]) -> None:
    plan, listed = importlib.import_module(module).plan, variants(module, capability)
    assert len({name for name, *_ in listed}) == len(listed)
    grid = itertools.product(
        (1, 2, 15, 16, 17, 63, 64, 65, 128, 256, 257, 1000, 4096, 4097, 8192, 2**20),
        (1, 64, 172, 896, 2049, 4096, 151_936),
        (1, 64, 172, 896, 2049, 4096, 151_936),
        (1, 4, 16, 60, 64),
        (torch.float32, torch.bfloat16, torch.float16),
        (False, True),
    )
    chosen = {
        tile
        for tokens, in_features, out_features, size, dtype, invariant in grid
        for tile in tiles(
            plan(tokens, in_features, out_features, size, dtype, capability, invariant)
        )
    }
    assert chosen
    assert not [tile for tile in chosen if missing(tile, listed)]
    dtypes = {kind for _, _, signature, _, _ in listed for kind in signature.values()}
    assert {"*fp32", "*bf16", "*fp16"} <= dtypes


def test_coverage_notices_a_tile_that_is_not_listed() -> None:
    module = importlib.import_module("clp_kernels.ops.mixed_linear.triton")
    tile = module.plan(1, 64, 64, 1, torch.bfloat16, (8, 0), False).forward
    listed = variants(module.__name__, (8, 0))
    assert not missing(tile, listed)
    assert missing(dataclasses.replace(tile, block_t=2 * tile.block_in), listed)
    assert missing(dataclasses.replace(tile, num_stages=9), listed)


if __name__ == "__main__":
    worker(sys.argv[1:])
