// Mixing of one slice into float32, for each instruction set; part of isa.cpp.
#pragma once

#include <math.h>

#include "cpu/sample/isa.h"
#include "cpu/simd.h"

namespace clp {
namespace CLP_ISA {

constexpr int64_t kGroup = kSampleGroup;  // four packs: what one philox64 serves
constexpr double kLog2E = 1.4426950408889634;

static inline float largest(Floats top) {
  float lanes[16], best = -INFINITY;
  store(lanes, top);
  for (float lane : lanes) best = lane > best ? lane : best;
  return best;
}

// The first `left` lanes from memory, zeros beyond.
template <class T>
static inline Floats load_part(const T* p, int64_t left) {
  if (left >= 16) return load(p);
  T padded[16] = {};
  memcpy(padded, p, size_t(left) * sizeof(T));
  return load(padded);
}

// z (+)= sum_k w_k l_k over whole packs, N terms at a time to spare the trips of z through the
// cache. Returns the maximum of z by lane; a NaN is passed over here and found by the sum.
template <class T, int N, bool START>
static Floats mix_packs(const T* const* rows, const float* weights, int64_t packs, float* z) {
  Floats top = all(-INFINITY);
  for (int64_t j = 0; j < 16 * packs; j += 16) {
    Floats value = load(rows[0] + j) * all(weights[0]);
    if (!START) value = load(z + j) + value;
    for (int k = 1; k < N; ++k) value = value + load(rows[k] + j) * all(weights[k]);
    store(z + j, value);
    top = maximum(value, top);
  }
  return top;
}

template <class T, bool START>
static Floats mix_batch(int64_t n, const T* const* rows, const float* weights, int64_t packs,
                        float* z) {
  switch (n) {
    case 1:
      return mix_packs<T, 1, START>(rows, weights, packs, z);
    case 2:
      return mix_packs<T, 2, START>(rows, weights, packs, z);
    case 3:
      return mix_packs<T, 3, START>(rows, weights, packs, z);
    default:
      return mix_packs<T, 4, START>(rows, weights, packs, z);
  }
}

// Plain arithmetic. It differs from the definition only where an active -inf meets a weight below
// zero, +inf or NaN, and there it leaves +inf or NaN: the caller then mixes again with mix_masked.
template <class T>
static Floats mix_geometric(const SampleTask& task, float* z) {
  const int64_t packs = task.count / 16, rest = task.count % 16;
  if (task.num_terms == 0) memset(z, 0, size_t(task.count) * sizeof(float));
  Floats top = all(task.num_terms == 0 ? 0.0f : -INFINITY);
  for (int64_t t = 0; t < task.num_terms; t += 4) {
    const int64_t n = task.num_terms - t < 4 ? task.num_terms - t : 4;
    const T* rows[4];
    const T* ends[4];
    T padded[4][16] = {};
    float weights[4];
    for (int64_t k = 0; k < n; ++k) {
      rows[k] = static_cast<const T*>(task.terms[t + k].logits) + task.first;
      weights[k] = task.terms[t + k].weight;
      ends[k] = padded[k];
      memcpy(padded[k], rows[k] + 16 * packs, size_t(rest) * sizeof(T));
    }
    const auto mix = t == 0 ? mix_batch<T, true> : mix_batch<T, false>;
    top = mix(n, rows, weights, packs, z);
    if (rest > 0) mix(n, ends, weights, 1, z + 16 * packs);
  }
  return top;
}

// The definition with its rule for -inf: an active one decides, whatever stands beside it.
template <class T>
static Floats mix_masked(const SampleTask& task, float* z) {
  const Floats zero = all(0.0f), one = all(1.0f), masked = all(-INFINITY);
  Floats top = masked;
  for (int64_t j = 0; j < task.count; j += 16) {
    Floats value = zero, blocked = zero;
    for (int64_t t = 0; t < task.num_terms; ++t) {
      const T* row = static_cast<const T*>(task.terms[t].logits) + task.first;
      const Floats logit = load_part(row + j, task.count - j);
      value = value + logit * all(task.terms[t].weight);
      blocked = where_equal(logit, masked, one, blocked);
    }
    value = where_equal(blocked, one, masked, value);
    store(z + j, value);
    if (task.count - j >= 16) top = maximum(value, top);
  }
  return top;
}

template <class T>
static Floats mix_as(const SampleTask& task, bool masked, float* z) {
  return masked ? mix_masked<T>(task, z) : mix_geometric<T>(task, z);
}

// Fills z up to a multiple of kGroup (-inf beyond the slice) and returns its maximum.
static float mix(const SampleTask& task, bool masked, float* z) {
  Floats top;
  switch (task.dtype) {
    case DType::kFloat32:
      top = mix_as<float>(task, masked, z);
      break;
    case DType::kBFloat16:
      top = mix_as<BFloat16>(task, masked, z);
      break;
    default:
      top = mix_as<Float16>(task, masked, z);
  }
  for (int64_t j = task.count; j % kGroup != 0; ++j) z[j] = -INFINITY;
  if (task.count % 16 != 0) top = maximum(load(z + task.count / 16 * 16), top);
  return largest(top);
}

}  // namespace CLP_ISA
}  // namespace clp
