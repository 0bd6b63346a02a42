// Dropout's random bits: Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
// counted by position, so that any kernel draws any element's number by itself.
#pragma once

#include "vec.h"

namespace fastattn::FASTATTN_ISA {

// Spreads the low 16 bits of x to every fourth bit.
inline uint64_t spread4(uint64_t x) {
#if defined(FASTATTN_ISA_AVX512) || defined(FASTATTN_ISA_AVX2)
  return _pdep_u64(x, 0x1111111111111111);
#else
  x = (x | x << 24) & 0x000000ff000000ff;
  x = (x | x << 12) & 0x000f000f000f000f;
  x = (x | x << 6) & 0x0303030303030303;
  return (x | x << 3) & 0x1111111111111111;
#endif
}

// Turns counters into random words; of each lane, only the low 32 bits count.
inline void philox(const Dropout& dropout, U64Vec (&c)[4]) {
  const U64Vec m0 = U64Vec::set1(0xD2511F53), m1 = U64Vec::set1(0xCD9E8D57);
  uint32_t k0 = static_cast<uint32_t>(dropout.seed), k1 = static_cast<uint32_t>(dropout.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const U64Vec p0 = mul_low32(c[0], m0), p1 = mul_low32(c[2], m1);
    c[0] = xor3(high32(p1), c[1], U64Vec::set1(k0));
    c[2] = xor3(high32(p0), c[3], U64Vec::set1(k1));
    c[1] = p1;
    c[3] = p0;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
}

// Bit k says whether element (slice, row, column + k) survives; column is a multiple of 64.
inline uint64_t dropout_keep_bits(const Dropout& dropout, uint64_t slice, uint64_t row, uint64_t column) {
  const U64Vec threshold = U64Vec::set1(dropout.threshold);
  uint64_t dropped[4] = {0, 0, 0, 0};
  for (int lane = 0; lane < 16; lane += U64Vec::kWidth) {
    U64Vec words[4] = {U64Vec::iota(column / 4 + static_cast<uint64_t>(lane)), U64Vec::set1(row), U64Vec::set1(slice),
                       U64Vec::set1(dropout.offset)};
    philox(dropout, words);
    for (int j = 0; j < 4; ++j) dropped[j] |= uint64_t{lt_low32(words[j], threshold)} << lane;
  }
  return ~(spread4(dropped[0]) | spread4(dropped[1]) << 1 | spread4(dropped[2]) << 2 | spread4(dropped[3]) << 3);
}

// Bit r of keep[j] says whether element (slice, row + r, column + j) survives, for r < rows <= 64; column is a multiple
// of 4.
inline void dropout_keep_bits_of_rows(const Dropout& dropout, uint64_t slice, uint64_t row, uint64_t column, int rows,
                                      uint64_t (&keep)[4]) {
  const U64Vec threshold = U64Vec::set1(dropout.threshold);
  for (uint64_t& bits : keep) bits = ~uint64_t{0};
  for (int lane = 0; lane < rows; lane += U64Vec::kWidth) {
    U64Vec words[4] = {U64Vec::set1(column / 4), U64Vec::iota(row + static_cast<uint64_t>(lane)), U64Vec::set1(slice),
                       U64Vec::set1(dropout.offset)};
    philox(dropout, words);
    for (int j = 0; j < 4; ++j) keep[j] ^= uint64_t{lt_low32(words[j], threshold)} << lane;
  }
}

}  // namespace fastattn::FASTATTN_ISA
