// What TVM's generated source calls: everything that depends on the architecture, so that one source makes one fatbin.
//
// Each function is called by all threads of a warp at once; threadIdx.x is the lane.

// c[16][8] += popcount(a[16][256] ^ b[256][8]), bits in 32-bit words, in the fragments of the PTX ISA's
// mma.m16n8k256 with .b1 operands. With group = lane / 4 and member = lane % 4, a lane holds
//   a[0], a[1], a[2], a[3]: word `member` of rows group and group + 8, then word member + 4 of these rows,
//   b[0], b[1]:             words member and member + 4 of column group,
//   c[0], c[1]; c[2], c[3]: columns 2·member and 2·member + 1 of row group; of row group + 8.
//
// sm_80 to sm_89 have it. sm_75 has m8n8k128, whose fragments are exactly quarters of these: rows of one half, words of
// one half. sm_90 has AND alone (XOR is emulated there, bit by bit, outside the tensor cores); since
// popcount(a ^ b) = popcount(a & ~b) + popcount(~a & b), two of those are one of these. The identity popcount(a) +
// popcount(b) - 2·popcount(a & b) would halve the work, but its terms have to be known wherever an accumulator is read,
// a row's popcounts among them, and a convolution of one image on a card of this size waits for memory.
__device__ __forceinline__ void horq_mma(int* c, const unsigned* a, const unsigned* b) {
#if __CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 900
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.xor.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1000
#define HORQ_AND(a0, a1, a2, a3, b0, b1)                                                                           \
  asm volatile(                                                                                                    \
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "   \
      "{%0, %1, %2, %3};"                                                                                          \
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])                                                             \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
  HORQ_AND(a[0], a[1], a[2], a[3], ~b[0], ~b[1]);
  HORQ_AND(~a[0], ~a[1], ~a[2], ~a[3], b[0], b[1]);
#undef HORQ_AND
#elif __CUDA_ARCH__ >= 750 && __CUDA_ARCH__ < 800
#define HORQ_QUARTER(c0, c1, a0, b0)                                                                          \
  asm volatile("mma.sync.aligned.m8n8k128.row.col.s32.b1.b1.s32.xor.popc {%0, %1}, {%2}, {%3}, {%0, %1};"     \
               : "+r"(c0), "+r"(c1)                                                                           \
               : "r"(a0), "r"(b0))
  HORQ_QUARTER(c[0], c[1], a[0], b[0]);
  HORQ_QUARTER(c[2], c[3], a[1], b[0]);
  HORQ_QUARTER(c[0], c[1], a[2], b[1]);
  HORQ_QUARTER(c[2], c[3], a[3], b[1]);
#undef HORQ_QUARTER
#else
  // Lane by lane: word w of row r is register r / 8 + 2·(w / 4) of lane 4·(r % 8) + w % 4, of a column n register w / 4
  // of lane 4·n + w % 4.
  const int group = threadIdx.x / 4, column = 2 * (threadIdx.x % 4);
#pragma unroll
  for (int w = 0; w < 8; ++w) {
    const unsigned low = __shfl_sync(0xffffffffu, a[w / 4 * 2], 4 * group + w % 4);
    const unsigned high = __shfl_sync(0xffffffffu, a[w / 4 * 2 + 1], 4 * group + w % 4);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const unsigned bits = __shfl_sync(0xffffffffu, b[w / 4], 4 * (column + e) + w % 4);
      c[e] += __popc(low ^ bits);
      c[2 + e] += __popc(high ^ bits);
    }
  }
#endif
}

// Bit l is lane l's predicate.
__device__ __forceinline__ unsigned horq_ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

// One, two or four words from global to shared memory, zeros where there is nothing `inside` to read. From sm_80 on
// horq_fetch starts a copy that horq_landed waits for; before, it reads the words, zeros so far, for horq_land to store.
template <typename Words>
__device__ __forceinline__ void horq_fetch(unsigned* words, unsigned* to, const unsigned* from, int inside) {
#if __CUDA_ARCH__ >= 800
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = inside ? sizeof(Words) : 0;
  if constexpr (sizeof(Words) == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(from), "n"(sizeof(Words)), "r"(bytes)
                 : "memory");
  }
#else
  if (inside) *reinterpret_cast<Words*>(words) = *reinterpret_cast<const Words*>(from);
#endif
}

template <typename Words>
__device__ __forceinline__ void horq_land(const unsigned* words, unsigned* to) {
#if __CUDA_ARCH__ < 800
  *reinterpret_cast<Words*>(to) = *reinterpret_cast<const Words*>(words);
#endif
}

__device__ __forceinline__ void horq_landed() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

#define horq_fetch1 horq_fetch<unsigned>
#define horq_fetch2 horq_fetch<uint2>
#define horq_fetch4 horq_fetch<uint4>
#define horq_land1 horq_land<unsigned>
#define horq_land2 horq_land<uint2>
#define horq_land4 horq_land<uint4>
