// What slot_attention.cpp (threads) and isa.cpp (one head of one row, compiled for each instruction
// set) agree on.
#pragma once

#include "cpu/isa.h"
#include "cpu/slot_attention/slot_attention.h"

namespace clp {

// Positions at a time: their scores stay in the first-level cache. A multiple of 16.
constexpr int64_t kSlotBlock = 128;

struct SlotAttentionKernels {
  int64_t (*scratch)(const SlotAttentionArgs& args);  // in bytes
  // Writes the key and value of row b and head h, and the group's outputs.
  void (*head)(const SlotAttentionArgs& args, void* scratch, int64_t b, int64_t h);
};

extern const SlotAttentionKernels kSlotAttentionKernelsScalar, kSlotAttentionKernelsAvx2,
    kSlotAttentionKernelsAvx512, kSlotAttentionKernelsAvx512Bf16;

// The first position that a row with n tokens before this one sees.
static inline int64_t first_seen(const SlotAttentionArgs& a, int64_t n) {
  return a.window > 0 && a.window <= n ? n + 1 - a.window : 0;
}

}  // namespace clp
