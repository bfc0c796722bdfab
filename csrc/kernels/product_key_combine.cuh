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

// The sums that may be among the R best, in shared memory of the warp. Random lists leave over up to 2.6 R of them on
// average.
template <int kPerLane, typename T>
struct LeftSums {
  static constexpr int kMost = kPerLane == 1 ? 128 : 448;
  T score[kMost];
  int32_t pair[kMost];  // i * R + j of the places in both lists
};

// By one warp. indices and list_scores: (2, R), in global or shared memory.
template <int kPerLane, typename T>
__device__ __forceinline__ void combine_lists(const int32_t* indices, const T* list_scores, int64_t num_sub_keys,
                                              int topk, LeftSums<kPerLane, T>& left, const Combination<T>& to,
                                              unsigned* errors) {
  constexpr int kMost = LeftSums<kPerLane, T>::kMost;
  const int lane = threadIdx.x % 32;
  bool bad = indices[0] < 0 || indices[topk] < 0, finite = true;
  const auto slot = [&](int32_t pair) {
    const int32_t i = pair / topk;
    return indices[i] * num_sub_keys + indices[topk + pair - i * topk];
  };
  const auto put = [&](int place, T score, int32_t pair) {
    finite &= bool(isfinite(score));
    to.slots[place] = to.first_slot + int32_t(slot(pair));
    to.scores[place] = score;
    if (to.places) to.places[place] = pair;
  };
  // Where both lists fall, the (i + 1) (j + 1) sums of places up to i and j are at least the one of i and j. The R best
  // reach every such sum that has R of them; in each row of sums, those that do come first. Scores that are logarithms
  // may miss falling by a rounding.
  bool falls = true;
  for (int l = lane; l < 2 * topk; l += 32) falls &= l % topk == 0 || list_scores[l - 1] >= list_scores[l];
  falls = __ballot_sync(kFullWarp, !falls) == 0;
  int count = bad ? 0 : kMost + 1;
  if (!bad && falls) {
    T least = T(-INFINITY);
    for (int i = lane; i < topk; i += 32) {
      const T sum = list_scores[i] + list_scores[topk + (topk - 1) / (i + 1)];
      if (sum > least) least = sum;
    }
    least = warp_max(least);
    count = 0;
    for (int first = 0; first < topk; first += 32) {
      const int i = first + lane;
      int low = 0, high = i < topk ? topk : 0;  // of the first sum of row i that does not reach it
      while (low < high) {
        const int middle = (low + high) / 2;
        if (list_scores[i] + list_scores[topk + middle] >= least)
          low = middle + 1;
        else
          high = middle;
      }
      const int up_to = inclusive_sum(low, lane), before = count + up_to - low;
      for (int j = 0; j < low && before + j < kMost; ++j) {
        left.score[before + j] = list_scores[i] + list_scores[topk + j];
        left.pair[before + j] = i * topk + j;
      }
      count += __shfl_sync(kFullWarp, up_to, 31);
    }
    __syncwarp();  // left
  }
  if (count <= kMost) {
    for (int i = lane; i < count; i += 32) {
      const T score = left.score[i];
      int better = 0;
      for (int j = 0; j < count; ++j) {
        better += left.score[j] > score;
        if (left.score[j] == score && j != i) better += slot(left.pair[j]) < slot(left.pair[i]);
      }
      if (better < topk) put(better, score, left.pair[i]);
    }
    __syncwarp();  // left has been read
  } else {         // many are equal, or a list does not fall: look at all
    BestList<T, int64_t, kPerLane> best(topk);
    for (int32_t first = 0; first < topk * topk; first += 32) {
      const bool exists = first + lane < topk * topk;
      const int32_t pair = exists ? first + lane : 0, i = pair / topk;
      best.offer(list_scores[i] + list_scores[topk + pair - i * topk], slot(pair) << 32 | pair, exists);
    }
    best.for_each([&](int place, T score, int64_t index) { put(place, score, int32_t(index & 0xffffffff)); });
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
