// The R best of the R*R sums of two lists, one of each half: slots, their scores, and where in the lists they come
// from.
//
// A slot is number j0 * P + j1 of its memory. Equal sums: by rising slot. A bad list (index -1), or a sum that is
// infinite, makes the (token, head) bad: slots -1, scores NaN, places 0; it is reported.
#pragma once
#include "kernels/best_list.cuh"
#include "kernels/errors.cuh"
#include "kernels/tokens.cuh"

namespace fwpkm::kernels {

// Of one (token, head).
template <typename T>
struct Combination {
  int32_t first_slot;       // of the memory
  int32_t *places, *slots;  // (R); places may be null
  T* scores;                // (R)
};

__device__ __forceinline__ int32_t first_slot(const TokenRows& rows, int64_t token, int32_t num_sub_keys) {
  return int32_t(rows.memory(token)) * num_sub_keys * num_sub_keys;
}

// By one warp. indices and list_scores: (2, R), in global or shared memory.
template <int kPerLane, typename T>
__device__ __forceinline__ void combine_lists(const int32_t* indices, const T* list_scores, int64_t num_sub_keys,
                                              int topk, Candidates<T, int64_t>& left, const Combination<T>& to,
                                              unsigned* errors) {
  constexpr int kFew = 16;  // more: their R*R sums are too many to look at all
  const int lane = threadIdx.x % 32;
  bool bad = indices[0] < 0 || indices[topk] < 0, finite = true;
  const auto sum = [&](int32_t pair, T& score, int64_t& index) {  // index: the slot, then 32 bits of the pair
    const int32_t i = pair / topk, j = pair - i * topk;
    score = list_scores[i] + list_scores[topk + j];
    index = (indices[i] * num_sub_keys + indices[topk + j]) << 32 | pair;
  };
  const auto put = [&](int place, T score, int64_t index) {
    finite &= bool(isfinite(score));
    to.slots[place] = to.first_slot + int32_t(index >> 32);
    to.scores[place] = score;
    if (to.places) to.places[place] = int32_t(index & 0xffffffff);
  };
  if (!bad && topk <= kFew) {
    find_best<kPerLane, int64_t>(topk * topk, topk, sum, left, put);
  } else if (!bad) {
    // Pairs come 32 at a time, row by row. Both lists fall, so nothing is missed where the rest of a row, or of all
    // rows, is left out for being lower than the R-th sum so far.
    BestList<T, int64_t, kPerLane> best(topk);
    for (int32_t pair = 0; pair < topk * topk;) {
      const int32_t j = pair % topk;
      if (list_scores[pair / topk] + list_scores[topk + j] < best.lowest_score()) {
        if (j == 0) break;
        pair += topk - j;
        continue;
      }
      T score;
      int64_t index;
      const bool exists = pair + lane < topk * topk;
      sum(exists ? pair + lane : pair, score, index);
      best.offer(score, index, exists);
      pair += 32;
    }
    best.for_each(put);
  }
  bad |= __ballot_sync(kFullWarp, !finite) != 0;
  if (!bad) return;
  __syncwarp();  // what was put
  if (lane == 0) report(errors, kNotFinite);
  for (int r = lane; r < topk; r += 32) {
    to.slots[r] = -1;
    to.scores[r] = T(NAN);
    if (to.places) to.places[r] = 0;
  }
}

}  // namespace fwpkm::kernels
