// The instructions that C++ has no name for. What needs sm_90 does nothing on sm_80, where kernels
// are launched without clusters and one after the other.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace clp {

// The block's dynamic shared memory.
__device__ __forceinline__ uint4* shared_memory() {
  extern __shared__ uint4 dynamic_shared[];
  return dynamic_shared;
}

// Copies `bytes` (16 or 0) from global to shared memory and fills up 16 with zeros. Both addresses
// are aligned to 16 bytes; for 0 nothing is read, so `from` may point anywhere.
__device__ __forceinline__ void copy_async(uint4* to, const void* from, unsigned bytes) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(bytes)
               : "memory");
}

// Closes a group of the thread's copies.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most PENDING of the thread's groups are unfinished. The bytes of the others are
// then visible to this thread, to other threads after a barrier.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void prefetch_to_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// c += a b^T on the tensor cores, for a warp; a is [16, 16], b is [8, 16], c [16, 8] in float32.
// With group = lane / 4 and quad = lane % 4 a lane holds
//   a: row group of a0 and a2, row group + 8 of a1 and a3; columns 2 quad, 2 quad + 1 in a0 and a1,
//      8 more in a2 and a3
//   b: row group; columns as a0 (b0) and a2 (b1)
//   c: row group in c0 and c1, group + 8 in c2 and c3; columns 2 quad and 2 quad + 1
__device__ __forceinline__ void multiply(__nv_bfloat16, float (&c)[4], uint32_t a0, uint32_t a1,
                                         uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply(__half, float (&c)[4], uint32_t a0, uint32_t a1,
                                         uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The nearest number of 11 significant bits, ties away from zero.
__device__ __forceinline__ float round_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}

// As `multiply` with 8 columns: column quad in a0, a1 and b0, column quad + 4 in a2, a3 and b1. The
// inputs have at most 11 significant bits.
__device__ __forceinline__ void multiply_tf32(float (&c)[4], float a0, float a1, float a2, float a3,
                                              float b0, float b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)),
        "r"(__float_as_uint(a3)), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// Programmatic dependent launch: the next grid may start once every block has come here.
__device__ __forceinline__ void start_next_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns when the grid before this one has ended and what it wrote is visible.
__device__ __forceinline__ void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Every thread of every block of the cluster comes here; what was in shared memory before is visible
// after.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// What block `rank` of the cluster has at the address that `mine` has in this block.
__device__ __forceinline__ float4 read_from_cluster(const float4* mine, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  const uint32_t here = uint32_t(__cvta_generic_to_shared(mine));
  uint32_t there;
  float4 value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(there)
               : "memory");
  return value;
#else
  return rank == 0 ? *mine : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#endif
}

}  // namespace clp
