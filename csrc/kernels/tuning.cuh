// What may be tuned: sizes of launches, and from which amount of work on another way is taken. Results never depend on
// any of it, but for kThreads, which is part of the order of a block_sum. One set serves all architectures until
// measurements ask for more; the shapes of tiles stand beside their kernels.
//
// The tests take smaller sizes, to get many blocks from little data.
#pragma once
#include <cstdint>

namespace fwpkm::kernels {

#ifndef FWPKM_THREADS
#define FWPKM_THREADS 256  // the tests take fewer where each is a fiber
#endif
#ifndef FWPKM_LEAST_SHARED_ELEMENTS
#define FWPKM_LEAST_SHARED_ELEMENTS (1 << 23)  // and have less to do
#endif
#ifndef FWPKM_FILTER_THREADS
#define FWPKM_FILTER_THREADS FWPKM_THREADS  // to be measured: twice as many, for the filter waits for latencies
#endif
#ifndef FWPKM_LEAST_READS_APART
#define FWPKM_LEAST_READS_APART 1024
#endif

struct LaunchSize {
  static constexpr int kThreads = FWPKM_THREADS;
  static constexpr int kMaxBlocks = 1 << 20;  // more work than that: each block takes several items
  // Rows that many entries read: so much is worth the way through shared memory, and as many blocks fill a large GPU.
  static constexpr int64_t kLeastSharedElements = FWPKM_LEAST_SHARED_ELEMENTS;
  static constexpr int kSharedBlocks = 128;
  static constexpr int64_t kMostSharedBytes = 1 << 18;  // no device has more
};

// The launches of a scan (cuda/scan.h): waits between two streams cost more than smaller chunks would win.
struct ScanSize : LaunchSize {
  static constexpr int64_t kLeastReadsApart = FWPKM_LEAST_READS_APART;  // of a chunk
};

// radix_sort.cuh and ordered_lists.cuh
struct OrderedListsSize : LaunchSize {
  static constexpr int kSteps = 4;       // 32 entries a warp and step
  static constexpr int kFewTiles = 64;   // a block sums the counts of so many tiles by itself
  static constexpr int kBlockTiles = 1;  // so many entries a block sorts alone; 0: none does
};

// product_key_filter.cuh
struct FilterSize : LaunchSize {
  static constexpr int kManyTokens = 64, kFewTokens = 16;  // of a block
  static constexpr int kManyThreads = FWPKM_FILTER_THREADS;
  static constexpr int kManyBlocks = 128;            // fewer leave a large GPU without work
  static constexpr int kLeastTokens = kThreads / 2;  // fewer are not worth it
};

// product_key_search.cuh
struct SearchSize : LaunchSize {
  using Filter = FilterSize;
  static constexpr int64_t kFewSimilarities = 1 << 20;  // of a search that may keep them in device memory
};

}  // namespace fwpkm::kernels
