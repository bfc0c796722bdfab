// The tokens of a launch: where they stand in their tensors, and which memory serves them.
//
// A call may work on several memories of one shape, each of which serves some of the batch rows. Then values are
// (memories, S, V) and sub-keys (memories, H, 2, P, K/2); slots and rows of sub-keys are numbered through all memories,
// and fewer than 2^31. What a call does to a memory is, bit for bit, what a call with its batch rows alone would do.
#pragma once
#include "kernels/simt.cuh"

namespace fwpkm::kernels {

struct Memories {
  int64_t count = 1;
  const int32_t* of_row = nullptr;  // (B): number of the memory that serves a batch row; null: one serves all
  const int32_t* rows = nullptr;    // (count): how many batch rows a memory serves; with of_row
};

// Tokens [first, first + tokens) of a launch, all served by one memory.
struct TokenTile {
  int64_t first;
  int32_t tokens;
  int64_t memory;
};

// Token t = b * per_row + i of a launch stands at row b * row_stride + first + i of a (B, T, ...) tensor.
struct TokenRows {
  int64_t count, per_row, row_stride, first;
  const int32_t* memories = nullptr;  // Memories::of_row

  __device__ int64_t row(int64_t t) const { return t / per_row * row_stride + first + t % per_row; }
  __device__ int64_t memory(int64_t t) const { return memories ? memories[t / per_row] : 0; }

  // Tiles of at most `size` tokens: they do not cross batch rows where these may have different memories.
  __host__ __device__ int64_t run() const { return memories ? per_row : count; }
  __host__ __device__ int64_t tiles_of_run(int64_t size) const { return (run() + size - 1) / size; }
  __host__ __device__ int64_t tiles(int64_t size) const { return count ? count / run() * tiles_of_run(size) : 0; }
  __device__ int64_t tile_of(int64_t t, int64_t size) const {
    return t / run() * tiles_of_run(size) + t % run() / size;
  }
  __device__ TokenTile tile(int64_t number, int64_t size) const {
    const int64_t within = number % tiles_of_run(size) * size, left = run() - within;
    const int64_t begin = number / tiles_of_run(size) * run() + within;
    return {begin, int32_t(left < size ? left : size), memory(begin)};
  }
};

}  // namespace fwpkm::kernels
