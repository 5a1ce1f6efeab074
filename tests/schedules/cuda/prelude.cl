// The device functions of schedules/cuda/prelude.cuh for a device without warps or tensor cores, lane by lane.
//
// Lanes meet in __local memory, so every work item of a group has to call each function: get_local_id(0) is the lane,
// get_local_id(1) and (2) number the warps. A kernel that calls one declares `horq_exchange`, HORQ_EXCHANGE words a warp.

#define HORQ_EXCHANGE 192
#define HORQ_STORES_LIMIT 128 // of a work item, between two barriers
#define horq_mma(c, a, b) horq_mma_by_lanes(horq_exchange, c, a, b)
#define horq_ballot(predicate) horq_ballot_by_lanes(horq_exchange, predicate)

// Behind the declaration of an array in __local memory, where a group finds what the one before has left.
#define HORQ_UNWRITTEN(array) horq_unwritten((__local uchar*)array, sizeof(array));
void horq_unwritten(__local uchar* memory, int size) {
  int index = get_local_id(0) + get_local_size(0) * (get_local_id(1) + get_local_size(1) * get_local_id(2));
  int step = get_local_size(0) * get_local_size(1) * get_local_size(2);
  for (int i = index; i < size; i += step) memory[i] = 0xc5;
  barrier(CLK_LOCAL_MEM_FENCE);
}

__local uint* horq_of_warp(__local uint* exchange) {
  return exchange + HORQ_EXCHANGE * (get_local_id(1) + get_local_size(1) * get_local_id(2));
}

// c[16][8] += popcount(a[16][256] ^ b[256][8]), mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.xor.popc. As the PTX
// ISA ("Matrix Fragments for mma.m16n8k256") has it, with group = lane / 4 and member = lane % 4,
//   bit i of the 128 of a lane's A lies in row    group + 8 where 32 <= i < 64 or 96 <= i, else group,
//                                     and column 32 * member + i % 32, + 128 where i >= 64,
//   bit i of the 64 of a lane's B  in row    32 * member + i % 32, + 128 where i >= 32, and column group,
//   value i of the 4 of a lane's C in row    group + 8 where i >= 2, else group, and column 2 * member + i % 2.
// A register holds 32 of these bits: word w of row r of A (bits 32 * w on) is register r / 8 + 2 * (w / 4) of lane
// 4 * (r % 8) + w % 4, and word w of column n of B is register w / 4 of lane 4 * n + w % 4.
void horq_mma_by_lanes(__local uint* exchange, int* c, const uint* a, const uint* b) {
  __local uint* warp = horq_of_warp(exchange);
  int lane = get_local_id(0), group = lane / 4, member = lane % 4;
  for (int r = 0; r < 4; ++r) warp[6 * lane + r] = a[r];
  for (int r = 0; r < 2; ++r) warp[6 * lane + 4 + r] = b[r];
  barrier(CLK_LOCAL_MEM_FENCE);
  for (int i = 0; i < 4; ++i) {
    int row = group + 8 * (i / 2), column = 2 * member + i % 2, sum = 0;
    for (int w = 0; w < 8; ++w) {
      uint of_a = warp[6 * (4 * (row % 8) + w % 4) + row / 8 + 2 * (w / 4)];
      uint of_b = warp[6 * (4 * column + w % 4) + 4 + w / 4];
      sum += popcount(of_a ^ of_b);
    }
    c[i] += sum;
  }
  barrier(CLK_LOCAL_MEM_FENCE);
}

// Bit l is set where the predicate of lane l is not 0, __ballot_sync of all 32.
uint horq_ballot_by_lanes(__local uint* exchange, int predicate) {
  __local uint* warp = horq_of_warp(exchange);
  warp[get_local_id(0)] = predicate != 0;
  barrier(CLK_LOCAL_MEM_FENCE);
  if (get_local_id(0) == 0) {
    uint word = 0;
    for (int l = 0; l < 32; ++l) word |= warp[l] << l;
    warp[32] = word;
  }
  barrier(CLK_LOCAL_MEM_FENCE);
  return warp[32];
}

// N words from global to shared memory, zeros where nothing is `inside`. With HORQ_ASYNCHRONOUS as from sm_80 on, and at
// the earliest that cp.async may write them: at once. Else as on sm_75, and at the latest that others may see a store:
// behind the kernel's next barrier, so that one that is missing shows even where the functions above bring barriers of
// their own. A card moves N words together, from and to a multiple of their size; elsewhere they are lost.
#define HORQ_STRAY(pointer, n) ((size_t)(pointer) % (4 * (n)) != 0)
#define HORQ_LOST 0xdeadbeef
#ifdef HORQ_ASYNCHRONOUS
#define HORQ_STORES
#define horq_barrier barrier
#define HORQ_COPIES(n)                                                                                  \
  void horq_fetch##n(uint* words, __local uint* to, const __global uint* from, int inside) {            \
    int stray = HORQ_STRAY(from, n) || HORQ_STRAY(to, n);                                               \
    for (int i = 0; i < n; ++i) to[i] = !inside ? 0 : stray ? HORQ_LOST : from[i];                      \
  }
#define horq_land1(words, to)
#define horq_land2(words, to)
#define horq_land4(words, to)
#else
typedef struct {
  int count;
  uint word[HORQ_STORES_LIMIT];
  __local uint* to[HORQ_STORES_LIMIT];
} horq_stores;
#define HORQ_STORES horq_stores horq_stored = {0};
#define horq_barrier(fence) \
  do {                      \
    barrier(fence);         \
    horq_show(&horq_stored); \
    barrier(fence);         \
  } while (0)
void horq_show(horq_stores* stored) {
  for (int i = 0; i < stored->count; ++i) *stored->to[i] = stored->word[i];
  stored->count = 0;
}
#define HORQ_COPIES(n)                                                                                  \
  void horq_fetch##n(uint* words, __local uint* to, const __global uint* from, int inside) {            \
    for (int i = 0; i < n && inside; ++i) words[i] = HORQ_STRAY(from, n) ? HORQ_LOST : from[i];         \
  }
void horq_store(horq_stores* stored, const uint* words, __local uint* to, int n) {
  for (int i = 0; i < n && stored->count < HORQ_STORES_LIMIT; ++i, ++stored->count) {
    stored->word[stored->count] = HORQ_STRAY(to, n) ? HORQ_LOST : words[i];
    stored->to[stored->count] = to + i;
  }
}
#define horq_land1(words, to) horq_store(&horq_stored, words, to, 1)
#define horq_land2(words, to) horq_store(&horq_stored, words, to, 2)
#define horq_land4(words, to) horq_store(&horq_stored, words, to, 4)
#endif
HORQ_COPIES(1)
HORQ_COPIES(2)
HORQ_COPIES(4)
void horq_landed(void) {}
