// The R best of many candidates, found by one warp.
//
// A candidate is a score and an index. The one with the higher score is better; of equal scores, the one with the
// smaller index. No two indices are equal, so the list does not depend on the order in which candidates come.
//   BestList    kept in registers, whatever comes; every candidate that enters costs a chain of shuffles.
//   find_best   few candidates are ranked, those that a bound leaves over.
#pragma once
#include <limits>

#include "kernels/warp.cuh"

namespace fwpkm::kernels {

constexpr int kMaxTopk = 128;  // of BestList<..., 4>

template <typename T, typename Index>
__device__ __forceinline__ bool is_before(T score, Index index, T other_score, Index other_index) {
  return score > other_score || (score == other_score && index < other_index);
}

// Place p of the list lies in lane p / kPerLane, register p % kPerLane: whatever kPerLane is, a place's neighbour is in
// the same lane or one shuffle away. Places not taken yet hold what loses against every candidate that is not NaN. All
// lanes call every function together.
template <typename T, typename Index, int kPerLane>
class BestList {
 public:
  __device__ __forceinline__ explicit BestList(int size) : size_(size), lane_(threadIdx.x % 32) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      score_[j] = lowest_score_ = T(-INFINITY);
      index_[j] = lowest_index_ = std::numeric_limits<Index>::max();
    }
  }

  // The score of place R - 1: a lower one does not enter.
  __device__ __forceinline__ T lowest_score() const { return lowest_score_; }

  // One candidate per lane where `valid`.
  __device__ __forceinline__ void offer(T score, Index index, bool valid) {
    unsigned better = __ballot_sync(kFullWarp, valid && enters(score, index));
    while (better) {
      const int from = __ffs(better) - 1;
      insert(__shfl_sync(kFullWarp, score, from), __shfl_sync(kFullWarp, index, from));
      better &= better - 1;
      better &= __ballot_sync(kFullWarp, enters(score, index));  // the list has risen
    }
  }

  // f(place, score, index) for the lane's own places below R.
  template <typename F>
  __device__ __forceinline__ void for_each(const F& f) const {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j)
      if (lane_ * kPerLane + j < size_) f(lane_ * kPerLane + j, score_[j], index_[j]);
  }

  // Continues a list that for_each has written.
  __device__ __forceinline__ void load(const T* scores, const Index* indices) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j)
      if (const int place = lane_ * kPerLane + j; place < size_) {
        score_[j] = scores[place];
        index_[j] = indices[place];
      }
    find_lowest();
  }

 private:
  __device__ __forceinline__ bool enters(T score, Index index) const {
    return is_before(score, index, lowest_score_, lowest_index_);
  }

  // The same candidate in all lanes. It takes the place behind the last one that is better; those after it move on.
  __device__ __forceinline__ void insert(T score, Index index) {
    T from_score = __shfl_up_sync(kFullWarp, score_[kPerLane - 1], 1);
    Index from_index = __shfl_up_sync(kFullWarp, index_[kPerLane - 1], 1);
    bool behind = lane_ == 0 || is_before(from_score, from_index, score, index);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const T old_score = score_[j];
      const Index old_index = index_[j];
      const bool stays = is_before(old_score, old_index, score, index);
      if (!stays) {
        score_[j] = behind ? score : from_score;
        index_[j] = behind ? index : from_index;
      }
      behind = stays;
      from_score = old_score;
      from_index = old_index;
    }
    find_lowest();
  }

  __device__ __forceinline__ void find_lowest() {
    lowest_score_ = score_[0];
    lowest_index_ = index_[0];
#pragma unroll
    for (int j = 1; j < kPerLane; ++j)
      if (j == (size_ - 1) % kPerLane) {
        lowest_score_ = score_[j];
        lowest_index_ = index_[j];
      }
    lowest_score_ = __shfl_sync(kFullWarp, lowest_score_, (size_ - 1) / kPerLane);
    lowest_index_ = __shfl_sync(kFullWarp, lowest_index_, (size_ - 1) / kPerLane);
  }

  int size_, lane_;
  T score_[kPerLane], lowest_score_;
  Index index_[kPerLane], lowest_index_;
};

// What find_best leaves over, in shared memory of the warp.
template <typename T>
struct Candidates {
  static constexpr int kMost = 64;
  T score[kMost];
  int32_t index[kMost];
};

// The R best of n candidates, candidate(j, score, index) for j in [0, n); put(place, score, index) gets them, each from
// one lane. Each lane has the largest score of its share. The R-th largest of these is reached by R candidates, so that
// only those that reach it are looked at; their ranks are counted. All lanes call it together.
// `left` may be used again after a barrier.
template <int kPerLane, typename T, typename Candidate, typename Put>
__device__ __forceinline__ void find_best(int n, int topk, const Candidate& candidate, Candidates<T>& left,
                                          const Put& put) {
  using Left = Candidates<T>;
  const int lane = threadIdx.x % 32;
  T score = 0;
  int32_t index = 0;
  if (topk <= 32) {
    T largest = T(-INFINITY);
#pragma unroll 8
    for (int j = lane; j < n; j += 32) {
      candidate(j, score, index);
      if (score > largest) largest = score;
    }
    int larger = 0;
#pragma unroll
    for (int l = 0; l < 32; ++l) {
      const T its = __shfl_sync(kFullWarp, largest, l);
      larger += its > largest || (its == largest && l < lane);
    }
    const T least = __shfl_sync(kFullWarp, largest, __ffs(__ballot_sync(kFullWarp, larger == topk - 1)) - 1);
    int count = 0;
    for (int first = 0; first < n && count <= Left::kMost; first += 32) {
      const bool exists = first + lane < n;
      if (exists) candidate(first + lane, score, index);
      const unsigned stay = __ballot_sync(kFullWarp, exists && score >= least);
      const int place = count + __popc(stay & ((1u << lane) - 1));
      if (stay >> lane & 1 && place < Left::kMost) {
        left.score[place] = score;
        left.index[place] = index;
      }
      count += __popc(stay);
    }
    __syncwarp();  // left
    if (count <= Left::kMost) {
      for (int i = lane; i < count; i += 32) {
        int better = 0;
        for (int j = 0; j < count; ++j) better += is_before(left.score[j], left.index[j], left.score[i], left.index[i]);
        if (better < topk) put(better, left.score[i], left.index[i]);
      }
      return;
    }
  }
  BestList<T, int32_t, kPerLane> best(topk);
  for (int first = 0; first < n; first += 32) {
    const bool exists = first + lane < n;
    candidate(exists ? first + lane : 0, score, index);
    best.offer(score, index, exists);
  }
  best.for_each(put);
}

}  // namespace fwpkm::kernels
