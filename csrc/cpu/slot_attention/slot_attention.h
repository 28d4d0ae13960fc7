// Attention of a decoding step on the CPU: one token for each of B consecutive slots. Row b, whose
// slot s = first + b holds n = lengths[b] tokens, writes its key and value and attends:
//
//   keys[s, h, n] = k[b, h],  values[s, h, n] = v[b, h]
//   out[b, h G + g] = sum_j p_j values[s, h, j],  p = softmax_j(scale q[b, h G + g] . keys[s, h, j])
//
// over the last `window` positions up to n, or all; query heads H = heads G. float32 within, rounded
// once. Nothing else of the slots is written, and nothing behind position n is read. A row's bits
// depend neither on the other rows nor on the number of threads.
#pragma once

#include "shared/dtype.h"

namespace clp {

// The first two axes of q, k and v are B and heads, of any strides (in elements); the last is
// contiguous, as is all else.
struct SlotAttentionArgs {
  const void *q, *k, *v;  // [B, H, d], [B, heads, d], [B, heads, dv]
  int64_t q_row, q_head, k_row, k_head, v_row, v_head;
  void *keys, *values;     // [slots, heads, capacity, d], [slots, heads, capacity, dv]
  DType dtype;             // of all these and out
  const int64_t* lengths;  // [B]
  int64_t slots, first;
  int64_t B, H, heads, capacity, d, dv;
  float scale;
  int64_t window;  // 0: all
  void* out;       // [B, H, dv]
};

// isa: a name of cpu/isa.h, or "" for the one chosen at load. Throws std::invalid_argument for
// another, and for slots or positions that are not there, before anything is written.
void slot_attention_cpu(const SlotAttentionArgs& args, int num_threads, const char* isa);

}  // namespace clp
