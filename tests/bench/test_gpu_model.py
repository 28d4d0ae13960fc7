"""bench.gpu_model: what it counts in machine code, and what follows from that."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import gpu_model
from bench.gpu_model import GPUS, Kernel, Loop
from bench.report import tables

H100, H200, B200 = GPUS
# A prologue, a loop of two copies of 16 bytes per lane, a wait that leaves one group under way and
# two products, and an epilogue with a subroutine.
SASS = """
	Function : _ring
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;     /* 0x00000a00ff017b82 */
                                                              /* 0x000fe20000000800 */
        /*0010*/               @P0 EXIT ;                     /* 0x000000000000094d */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R8], desc[UR4][R2.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R4.64], P1 ;
        /*0040*/                   LDGDEPBAR ;
        /*0050*/                   DEPBAR.LE SB0, 0x1 ;
        /*0060*/                   LDS.128 R12, [R10] ;
        /*0070*/                   HMMA.16816.F32.BF16 R4, R12, R16, R4 ;
        /*0080*/                   HMMA.1688.F32.TF32 R4, R12, R16, R4 ;
        /*0090*/                   NOP ;
        /*00a0*/              @!P0 BRA 0x20 ;
        /*00b0*/                   STG.E.64 desc[UR4][R2.64], R4 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   DFMA R2, R2, R2, R2 ;
        /*00e0*/                   BRA 0xd0 ;
	Function : _plain
        /*0000*/                   LDG.E.U16 R2, desc[UR4][R2.64] ;
        /*0010*/                   LDG.E R3, desc[UR4][R4.64] ;
        /*0020*/                   MUFU.EX2 R3, R3 ;
        /*0030*/                   DMUL R2, R2, R4 ;
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0050*/                   EXIT ;
        /*0060*/                   BRA 0x60 ;
"""


def kernel(loop: Loop, registers: int = 32, shared: int = 0, warps: int = 8) -> Kernel:
    return Kernel("sample", "cuda", "k<fp32>", "90a", registers, shared, warps, loop)


def test_the_main_loop_is_the_one_with_asynchronous_copies() -> None:
    loop = gpu_model.main_loop(gpu_model.functions(SASS)["_ring"])
    assert loop == Loop(
        instructions=8,  # without the NOP
        loaded=2 * 512,
        shared_traffic=2 * 512 + 512,
        operations=2 * 16 * 8 * 16 + 2 * (2 * 16 * 8 * 8),
        tensor="HMMA",
        groups=1,
        depth=2,
    )


def test_a_kernel_without_a_loop_counts_as_a_whole_without_its_subroutines() -> None:
    loop = gpu_model.main_loop(gpu_model.functions(SASS)["_plain"])
    assert loop == Loop(6, loaded=64 + 128, stored=512, float64=1, special=1)


def test_of_a_whole_kernel_narrow_loads_do_not_count_beside_wide_ones() -> None:
    code = gpu_model.functions(SASS)["_plain"]
    wide = [(0x8, "", "LDG.E.128.CONSTANT", "R4, [R2]"), *code]
    assert gpu_model.main_loop(wide).loaded == 512


@pytest.mark.parametrize(
    ("name", "bytes_per_lane"),
    [("LDG.E", 4), ("LDG.E.U8", 1), ("LDG.E.U16.CONSTANT", 2), ("LDG.E.64", 8), ("ST.E.128", 16)],
)
def test_bytes_of_a_load(name: str, bytes_per_lane: int) -> None:
    loop = gpu_model.count([(0, "", name, "")])
    assert loop.loaded + loop.stored == 32 * bytes_per_lane


def test_a_product_of_a_warpgroup_counts_a_quarter_per_warp() -> None:
    assert gpu_model.count([(0, "", "HGMMA.64x128x16.F32.BF16", "")]).operations == 64 * 128 * 8
    assert gpu_model.count([(0, "", "HGMMA.64x128x8.F32.TF32", "")]).operations == 64 * 128 * 8


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [
        (32, 0, 8, 8),  # 64 warps
        (33, 0, 8, 6),  # 40 x 32 registers per warp: 65,536 / 10,240
        (32, 100 * 1024, 8, 2),
        (255, 0, 8, 1),
        (16, 0, 1, 32),
    ],
)
def test_blocks_per_sm(registers: int, shared: int, warps: int, blocks: int) -> None:
    assert gpu_model.blocks_per_sm(kernel(Loop(), registers, shared, warps), H200) == blocks


@pytest.mark.parametrize(
    ("loop", "limit"),
    [
        (Loop(instructions=10, loaded=10_000, depth=4), "memory"),
        (Loop(instructions=1000, loaded=512, depth=4), "issue"),
        (Loop(instructions=10, loaded=512), "latency"),
        (Loop(instructions=10, loaded=512, float64=200, depth=16), "float64"),
        (Loop(instructions=10, loaded=512, special=100, depth=16), "special"),
        (Loop(instructions=10, loaded=512, operations=1e6, tensor="HMMA", depth=16), "tensor"),
        (Loop(instructions=10, loaded=512, shared_traffic=10**5, depth=16), "shared"),
    ],
)
def test_bound(loop: Loop, limit: str) -> None:
    found, share = gpu_model.bound(kernel(loop, shared=200 * 1024), H200)  # one block
    assert found == limit
    assert (share == 1) == (limit == "memory")
    assert 0 < share <= 1


def test_a_bound_by_hand() -> None:
    # 8 blocks of 8 warps. 64 warps x 2,048 bytes at 4.3e12 / 132 / 1.755e9 = 18.56 bytes per
    # cycle; 64 x 4,000 instructions by four schedulers.
    made = gpu_model.cycles(kernel(Loop(instructions=4000, loaded=2048)), H200)
    assert made["memory"] == pytest.approx(64 * 2048 / 18.56, rel=1e-3)
    assert made["issue"] == 64_000
    assert made["latency"] == 800


def test_large_tiles_are_read_from_the_cache() -> None:
    few, many = (Loop(1, 1024, operations=1024 * n, tensor="HGMMA") for n in (32, 33))
    times = [gpu_model.cycles(kernel(loop), H100)["memory"] for loop in (few, many)]
    assert times[0] / times[1] == pytest.approx(5.6 / 3.0)


def test_a_table_can_be_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "model" / "gpu.csv"
    known = kernel(Loop(7, 512, 64, 128, 4096.0, "HMMA", 2, 3, 1, 2.5))
    other = replace(known, op="mixed_lora")
    gpu_model.write([known, other], path)
    assert gpu_model.read(path) == [other, known]
    changed = replace(known, registers=99)
    gpu_model.write([changed], path)  # what was made of other ops stays
    assert gpu_model.read(path) == [other, changed]


def test_results_have_the_table_and_call_it_a_model(tmp_path: Path) -> None:
    target = tmp_path / "RESULTS.md"
    tables.write_results(tmp_path, target)
    assert "model" not in target.read_text()
    made = kernel(Loop(instructions=1000, loaded=512, depth=4))
    gpu_model.write([made, replace(made, target="100")], tmp_path / "model" / "gpu.csv")
    tables.write_results(tmp_path, target)
    text = target.read_text()
    assert "nothing here was measured" in text
    limits = [gpu_model.bound(replace(made, target=gpu.target), gpu) for gpu in GPUS]
    shares = " | ".join(f"issue {share:.2f}" for _, share in limits)
    assert f"| sample, cuda | k<fp32> | 32 | 0 | 64 | 2000 |  | {shares} |" in text


def test_triton_kernels_are_counted() -> None:
    """In a process of its own: under TRITON_INTERPRET nothing can be compiled."""
    pytest.importorskip("triton")
    code = """
from bench import gpu_model
kernels = [gpu_model.triton_kernel("mixed_lora", target, 1) for target in ("90a", "100")]
for kernel in gpu_model.with_operations(kernels):
    print(kernel.name.split()[0], kernel.loop.loaded * kernel.warps, kernel.loop.operations > 0)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # Tiles of 16 x 256 numbers of x and of the base, 2 bytes each.
    assert done.stdout.splitlines() == ["product_kernel 16384 True"] * 2


def test_kernels_of_the_cuda_module_are_counted() -> None:
    found = sorted((Path(gpu_model.rows.ROOT) / "clp_kernels").glob("_cuda*.so"))
    if not found:
        pytest.skip("clp_kernels._cuda is not built")
    pytest.importorskip("triton")
    kernels = {k.name: k for k in gpu_model.cuda_kernels(found[0], "90a")}
    made = kernels["mixed_lora_kernel<bf16, same, 1>"]
    assert (made.op, made.backend, made.warps) == ("mixed_lora", "cuda", 8)
    # csrc/cuda/mixed_rows.cuh: 64 rows and 8 tokens of 32 columns per warp, and three of them.
    assert made.loop.loaded == (64 + 8) * 32 * 2
    assert made.loop.depth == 2
    assert made.shared >= 3 * 8 * made.loop.loaded
    assert {k.op for k in kernels.values()} == {"mixed_lora", "mixed_linear", "sample"}
