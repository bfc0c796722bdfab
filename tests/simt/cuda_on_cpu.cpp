// The scheduler behind cuda_on_cpu.h. The build says which sanitizer the other files use (-DSIMT_ASAN, -DSIMT_TSAN);
// this file itself must never be instrumented for TSan: to TSan every fiber is a thread, and a switch orders nothing
// but what CUDA orders: barriers, __syncwarp, fences, the begin and the end of a launch.
#include "cuda_on_cpu.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <memory>
#include <stdexcept>

extern "C" {
void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
void __asan_poison_memory_region(const volatile void*, size_t);
void __asan_unpoison_memory_region(const volatile void*, size_t);
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#ifdef SIMT_ASAN
#define ASAN(x) x
#else
#define ASAN(x)
#endif
#ifdef SIMT_TSAN
#define TSAN(x) x
constexpr bool kTsan = true;
#else
#define TSAN(x)
constexpr bool kTsan = false;
#endif

// void simt_switch(void** save, void* load): parks the caller's stack in *save and continues on load.
#ifndef __x86_64__
#error "write simt_switch for this processor"
#endif
asm(R"(.text
.globl simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi); movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size simt_switch,.-simt_switch
.section .note.GNU-stack,"",@progbits
.text
)");
extern "C" void simt_switch(void** save, void* load);
extern "C" void simt_fiber_main();
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start[], _end[];  // of this program or library

namespace simt::detail {
namespace {

constexpr int kReturnWord = 6, kFrameWords = 8;  // one spare word keeps the ABI's stack alignment
constexpr size_t kSharedBytes = 227 << 10, kPage = 4096, kStack = 128 << 10;
constexpr const char* kNames[] = {"__syncwarp",      "__shfl_sync",   "__shfl_up_sync",   "__shfl_down_sync",
                                  "__shfl_xor_sync", "__ballot_sync", "__match_any_sync", "multiply_tf32"};

struct Block;

struct Fiber {
  void *sp = nullptr, *fake_stack = nullptr, *tsan = nullptr;
  char* stack = nullptr;
  Block* block = nullptr;
  uint3 index{};
  int warp = 0, lane = 0;
  bool done = false;
  const char* waits_in = nullptr;
  Site at;
  std::vector<std::vector<std::pair<void*, const void*>>> copies{1};  // of copy_async: groups, the last one open
};

// For TSan. Two objects in turn: a fast thread's next arrival must not be taken for a part of this one.
struct Sync {
  char object[2];
  bool parity = false;
  char* now() { return &object[parity]; }
};

struct Warp {
  struct Slot {  // what a lane brought to a collective
    Op op;
    unsigned mask;
    int argument;
    size_t size;
    Site at;
    unsigned char in[32], out[32];
  };
  Fiber* lane[32] = {};
  Slot slot[32];
  unsigned live = 0, arrived = 0;
  std::map<unsigned, Sync> sync;  // by mask
};

struct Block {
  uint3 index{};
  size_t live = 0;
  std::vector<Fiber*> waiting;  // in __syncthreads
  Sync sync;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  char* memory = nullptr;  // shared memory
  size_t used = 0;
  std::map<const void*, void*> shared;
};

uint64_t rng;
double run_ahead;  // how strongly this schedule lets one warp run ahead of the others
size_t idle;       // switches at atomics since something else happened
std::vector<Fiber*> ready;
Fiber host, *self;
const std::function<void()>* body;
std::string failure;
std::vector<char*> free_stacks, free_memories;
std::vector<std::pair<char*, size_t>> unmap_later;
[[maybe_unused]] char launch_begin, launch_end, fence_sync;
const void* host_bottom;
size_t host_size;

// The runtime's own memcpy and malloc are nobody's data race.
struct Inside {
  Inside() {
    TSAN(AnnotateIgnoreReadsBegin("", 0));
    TSAN(AnnotateIgnoreWritesBegin("", 0));
  }
  ~Inside() {
    TSAN(AnnotateIgnoreReadsEnd("", 0));
    TSAN(AnnotateIgnoreWritesEnd("", 0));
  }
};

// ---------------------------------------------------------------------------------------------------------- schedule
uint64_t random_word() {  // splitmix64
  uint64_t z = rng += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}
size_t below(size_t n) { return random_word() % n; }
bool chance(double p) { return double(random_word() >> 11) * 0x1p-53 < p; }

std::string name(const Fiber& f) {
  const auto triple = [](auto v) {
    return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
  };
  return "thread " + triple(f.index) + " of block " + triple(f.block->index) + " [warp " + std::to_string(f.warp) +
         " lane " + std::to_string(f.lane) + "]";
}

void go(Fiber& to, [[maybe_unused]] bool for_good = false) {
  Fiber& from = *self;
  if (&from == &to) return;
  ASAN(__sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack,
                                      &to == &host ? host_bottom : to.stack + kPage,
                                      &to == &host ? host_size : kStack));
  TSAN(__tsan_switch_to_fiber(to.tsan, 1));  // 1: orders nothing
  self = &to;
  if (to.block) threadIdx = to.index, blockIdx = to.block->index;
  simt_switch(&from.sp, to.sp);
  ASAN(__sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr));
}

[[noreturn]] void fail(const std::string& text) {
  failure = text;
  go(host, true);
  std::abort();
}

Fiber* pick() {
  if (ready.empty()) return nullptr;
  if (!chance(run_ahead)) std::swap(ready[below(ready.size())], ready.back());
  Fiber* f = ready.back();
  ready.pop_back();
  return f;
}

void next(bool for_good = false) {
  Fiber* f = pick();
  go(f ? *f : host, for_good);
}

void wait_for_others(const char* what, Site at) {
  self->waits_in = what;
  self->at = at;
  idle = 0;
  next();
}

void wake(Fiber* f) {
  f->waits_in = nullptr;
  ready.push_back(f);
}

// Notes that a barrier was reached; true: it is the one to leave out.
bool skipped(Site at) {
  if (std::find(barriers_seen.begin(), barriers_seen.end(), at) == barriers_seen.end()) barriers_seen.push_back(at);
  return options.skip == at;
}

// ------------------------------------------------------------------------------------------------------- collectives
unsigned word(const unsigned char* p) {
  unsigned v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

int source_lane(Op op, int lane, int argument) {
  if (op == Op::kShfl) return argument & 31;
  if (op == Op::kShflUp) return lane >= argument ? lane - argument : lane;
  if (op == Op::kShflDown) return lane + argument < 32 ? lane + argument : lane;
  return lane ^ argument;
}

float truncated(float x) {  // to 10 bits of mantissa
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits &= ~0x1fffu;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

void multiply(Warp& w) {
  double a[16][8], b[8][8];
  for (int l = 0; l < 32; ++l) {
    Fragments f;
    std::memcpy(&f, w.slot[l].in, sizeof f);
    for (int i = 0; i < 4; ++i) a[l / 4 + i % 2 * 8][l % 4 + i / 2 * 4] = double(truncated(f.a[i]));
    for (int i = 0; i < 2; ++i) b[l % 4 + i * 4][l / 4] = double(truncated(f.b[i]));
  }
  for (int l = 0; l < 32; ++l) {
    Fragments f{};
    for (int i = 0; i < 4; ++i) {
      double sum = 0;
      for (int k = 0; k < 8; ++k) sum += a[l / 4 + i / 2 * 8][k] * b[k][l % 4 * 2 + i % 2];
      f.a[i] = float(sum);
    }
    std::memcpy(w.slot[l].out, &f, sizeof f);
  }
}

void complete(Warp& w, Op op, unsigned mask) {
  if (op == Op::kSync) return;
  if (op == Op::kMultiply) return multiply(w);
  for (int l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    Warp::Slot& mine = w.slot[l];
    if (op == Op::kBallot || op == Op::kMatchAny) {
      unsigned bits = 0;
      for (int o = 0; o < 32; ++o) {
        if (!(mask >> o & 1)) continue;
        const unsigned other = word(w.slot[o].in);
        if (op == Op::kBallot ? other != 0 : other == word(mine.in)) bits |= 1u << o;
      }
      std::memcpy(mine.out, &bits, sizeof bits);
      continue;
    }
    const int from = source_lane(op, l, mine.argument);
    if (from < 0 || from > 31 || !(mask >> from & 1))
      fail(std::string(kNames[int(op)]) + " at " + mine.at.str() + ": " + name(*w.lane[l]) + " reads lane " +
           std::to_string(from) + ", which is not in its mask");
    std::memcpy(mine.out, w.slot[from].in, sizeof mine.out);
  }
}

// ------------------------------------------------------------------------------------------------- blocks and fibers
char* map(size_t n) {
  void* p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(p);
}

// Under TSan every block gets fresh memory: what is used again would look ordered, or racing, for no reason.
char* take(std::vector<char*>& spare, size_t n) {
  if (kTsan || spare.empty()) return map(n);
  char* p = spare.back();
  spare.pop_back();
  return p;
}

void start(Fiber& f) {
  f.stack = take(free_stacks, kPage + kStack);
  mprotect(f.stack, kPage, PROT_NONE);
  const size_t colour = size_t(f.warp * 32 + f.lane) % 61 * 64;  // or all stack tops would share one cache set
  void** top = reinterpret_cast<void**>(f.stack + kPage + kStack - colour) - kFrameWords;
  std::fill(top, top + kFrameWords, nullptr);
  top[kReturnWord] = reinterpret_cast<void*>(&simt_fiber_main);
  f.sp = top;
  TSAN(f.tsan = __tsan_create_fiber(0));
  ready.push_back(&f);
}

std::unique_ptr<Block> start_block(uint3 index) {
  auto b = std::make_unique<Block>();
  b->index = index;
  b->memory = take(free_memories, kSharedBytes);
  ASAN(__asan_unpoison_memory_region(b->memory, kSharedBytes));
  std::memset(b->memory, 0xFF, kSharedBytes);  // NaN in every format, -1 in every integer
  ASAN(__asan_poison_memory_region(b->memory, kSharedBytes));
  const size_t n = size_t(blockDim.x) * blockDim.y * blockDim.z;
  b->live = n;
  b->fibers.resize(n);
  b->warps.resize((n + 31) / 32);
  for (size_t t = 0; t < n; ++t) {
    Fiber& f = b->fibers[t];
    f.block = b.get();
    f.index = {unsigned(t % blockDim.x), unsigned(t / blockDim.x % blockDim.y),
               unsigned(t / (size_t(blockDim.x) * blockDim.y))};
    f.warp = int(t / 32);
    f.lane = int(t % 32);
    b->warps[f.warp].lane[f.lane] = &f;
    b->warps[f.warp].live |= 1u << f.lane;
    start(f);
  }
  return b;
}

void end_block(Block& b) {
  for (Fiber& f : b.fibers) {
    TSAN(if (f.done) __tsan_destroy_fiber(f.tsan));
    ASAN(if (!f.done) __asan_unpoison_memory_region(f.stack + kPage, kStack));
    if (kTsan)
      munmap(f.stack, kPage + kStack);  // makes TSan forget the range
    else
      free_stacks.push_back(f.stack);
  }
  if (kTsan)
    unmap_later.push_back({b.memory, kSharedBytes});
  else
    free_memories.push_back(b.memory);
}

void leave(Fiber& f) {  // a thread has returned from the kernel
  Inside inside;
  Block& b = *f.block;
  f.done = true;
  idle = 0;
  b.warps[f.warp].live &= ~(1u << f.lane);
  --b.live;
  if (!b.waiting.empty())
    fail(name(f) + " returned while " + name(*b.waiting[0]) + " waits for it in __syncthreads at " +
         b.waiting[0]->at.str());
}

}  // namespace

extern "C" __attribute__((no_sanitize("address"))) void simt_fiber_main() {
  // The first switch of a launch comes from the host's stack.
  [[maybe_unused]] const void** bottom = host_bottom ? nullptr : &host_bottom;
  [[maybe_unused]] size_t* size = host_bottom ? nullptr : &host_size;
  ASAN(__sanitizer_finish_switch_fiber(nullptr, bottom, size));
  TSAN(__tsan_acquire(&launch_begin));
  (*body)();
  TSAN(__tsan_release(&launch_end));
  leave(*self);
  if (self->block->live)
    next(true);
  else
    go(host, true);
  std::abort();
}

// ------------------------------------------------------------------------------------------------- called by kernels
void block_barrier(Site at) {
  Inside inside;
  if (skipped(at)) return;
  Block& b = *self->block;
  if (b.live < b.fibers.size())
    fail("__syncthreads at " + at.str() + ": " + name(*self) + " waits after other threads have returned");
  if (!b.waiting.empty() && !(b.waiting[0]->at == at))
    fail("__syncthreads: " + name(*self) + " is at " + at.str() + " but " + name(*b.waiting[0]) + " is at " +
         b.waiting[0]->at.str());
  [[maybe_unused]] char* sync = b.sync.now();
  TSAN(__tsan_release(sync));
  b.waiting.push_back(self);
  self->at = at;
  if (b.waiting.size() == b.live) {
    for (Fiber* f : b.waiting) wake(f);
    b.waiting.clear();
    b.sync.parity ^= 1;
    next();
  } else {
    wait_for_others("__syncthreads", at);
  }
  TSAN(__tsan_acquire(sync));
}

void warp_collective(Op op, unsigned mask, int argument, const void* in, void* out, size_t size, Site at) {
  Inside inside;
  if (op == Op::kSync && skipped(at)) return;
  Fiber& f = *self;
  Warp& w = f.block->warps[f.warp];
  Warp::Slot& slot = w.slot[f.lane];
  const auto lanes = [](unsigned m) {
    char text[16];
    std::snprintf(text, sizeof text, "0x%08x", m);
    return std::string(text);
  };
  const auto where = [&] { return std::string(kNames[int(op)]) + " at " + at.str() + ": "; };
  if (!(mask >> f.lane & 1)) fail(where() + name(f) + " is not in its own mask " + lanes(mask));
  if (mask & ~w.live)
    fail(where() + name(f) + " names lanes " + lanes(mask & ~w.live) + " that do not exist or have returned");
  slot.op = op;
  slot.mask = mask;
  slot.argument = argument;
  slot.size = size;
  slot.at = at;
  std::memcpy(slot.in, in, size);
  w.arrived |= 1u << f.lane;
  // Only __syncwarp orders memory; the other collectives do not.
  [[maybe_unused]] char* sync = nullptr;
  if (kTsan && op == Op::kSync) {
    sync = w.sync[mask].now();
    TSAN(__tsan_release(sync));
  }
  if ((w.arrived & mask) == mask) {
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      const Warp::Slot& other = w.slot[l];
      if (other.op != op || other.mask != mask || other.size != size || !(other.at == at))
        fail(where() + name(f) + " with mask " + lanes(mask) + " meets " + name(*w.lane[l]) + " in " +
             kNames[int(other.op)] + " at " + other.at.str() + " with mask " + lanes(other.mask));
    }
    complete(w, op, mask);
    w.arrived &= ~mask;
    if (sync) w.sync[mask].parity ^= 1;
    for (int l = 0; l < 32; ++l)
      if (mask >> l & 1) wake(w.lane[l]);
    next();
  } else {
    wait_for_others(kNames[int(op)], at);
  }
  if (sync) {
    TSAN(__tsan_acquire(sync));
  }
  std::memcpy(out, slot.out, op == Op::kSync ? 0 : size);
}

void copy_async(void* to, const void* from) {
  Inside inside;
  self->copies.back().push_back({to, from});
}

void commit_copies() {
  Inside inside;
  self->copies.emplace_back();
}

// The next copy of the groups that are due when `open` may stay under way; false: none is left.
bool take_copy(size_t open, void** to, const void** from) {
  Inside inside;
  auto& groups = self->copies;
  while (groups.size() > open + 1 && groups.front().empty()) groups.erase(groups.begin());
  if (groups.size() <= open + 1) return false;
  std::tie(*to, *from) = groups.front().back();
  groups.front().pop_back();
  return true;
}

// Slices of exact size between poisoned gaps.
void* shared(const void* key, size_t size, size_t align) {
  Inside inside;
  Block& b = *self->block;
  void*& p = b.shared[key];
  if (!p) {
    const size_t at = (b.used + 63 + align) / align * align;
    if (at + size > kSharedBytes) fail(name(*self) + ": the block needs more than 227 KiB of shared memory");
    p = b.memory + at;
    b.used = at + size;
    ASAN(__asan_unpoison_memory_region(p, size));
  }
  return p;
}

void preempt() {
  Inside inside;
  if (!chance(options.preempt)) return;
  if (++idle > 1000000)
    fail(name(*self) + ": a million switches at atomics without progress (a spin lock that nobody releases?)");
  ready.insert(ready.begin() + below(ready.size() + 1), self);
  next();
}

void fence() {
  preempt();
  TSAN(__tsan_acquire(&fence_sync));
  TSAN(__tsan_release(&fence_sync));
}

// Whether p, which the running thread is about to touch, is neither its stack nor shared memory, nor how it was called,
// nor a variable of the library.
bool in_global_memory(const void* p) {
  if (!self || !self->block) return false;
  const auto within = [&](const void* begin, const void* end) { return p >= begin && p < end; };
  return !within(self->stack, self->stack + kPage + kStack) &&
         !within(self->block->memory, self->block->memory + kSharedBytes) && !within(body, body + 1) &&
         !within(__ehdr_start, _end);
}

cudaError_t run(dim3 g, dim3 t, const void* kernel, const std::function<void()>& call) {
  const size_t blocks = size_t(g.x) * g.y * g.z, threads = size_t(t.x) * t.y * t.z;
  if (!blocks || !threads || threads > 1024 || t.z > 64 || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535)
    return cudaErrorInvalidConfiguration;
  rng = options.seed;
  run_ahead = std::array{0.0, 0.5, 0.9, 0.99}[options.seed % 4];
  gridDim = g;
  blockDim = t;
  body = &call;
  running = {kernel, g, t, running.number + 1};
  ready.clear();
  failure.clear();
  idle = 0;
  host_bottom = nullptr;
  self = &host;
  TSAN(host.tsan = __tsan_get_current_fiber());
  TSAN(__tsan_release(&launch_begin));
  std::vector<size_t> todo(blocks);
  for (size_t i = 0; i < blocks; ++i) {
    todo[i] = i;
    std::swap(todo[i], todo[below(i + 1)]);
  }
  std::vector<std::unique_ptr<Block>> in_flight;
  while (failure.empty() && (!todo.empty() || !in_flight.empty())) {
    while (!todo.empty() && in_flight.size() < size_t(options.resident)) {
      const size_t i = todo.back();
      todo.pop_back();
      in_flight.push_back(start_block({unsigned(i % g.x), unsigned(i / g.x % g.y), unsigned(i / (size_t(g.x) * g.y))}));
    }
    Fiber* f = pick();
    if (!f) {
      failure = "deadlock:";
      for (const auto& b : in_flight)
        for (const Fiber& x : b->fibers)
          if (!x.done && failure.size() < 1000)
            failure += "\n  " + name(x) + " waits in " + (x.waits_in ? x.waits_in : "?") + " at " + x.at.str();
      break;
    }
    go(*f);
    std::erase_if(in_flight, [](const auto& b) {
      if (!b->live) end_block(*b);
      return !b->live;
    });
  }
  for (const auto& b : in_flight) end_block(*b);  // after a failure: drop what was running
  TSAN(__tsan_acquire(&launch_end));
  for (const auto& [p, n] : unmap_later) munmap(p, n);
  unmap_later.clear();
  if (!failure.empty()) throw std::runtime_error(failure);
  return cudaSuccess;
}

}  // namespace simt::detail

// ------------------------------------------------------------------------------------------------------------ streams
struct CUstream_st {
  std::deque<std::function<cudaError_t()>> work;  // not yet done
  size_t done = 0, given = 0;
  void run(size_t until) {
    while (done < until) {
      const auto next = std::move(work.front());
      work.pop_front();
      ++done;
      if (next() != cudaSuccess) throw std::runtime_error("a launch that waited for another stream failed");
    }
  }
};

struct CUevent_st {
  CUstream_st* stream = nullptr;
  size_t position = 0;
};

namespace simt::detail {
namespace {
bool apart = false;  // since a stream has waited for another
CUstream_st stream_0;
std::vector<std::unique_ptr<CUstream_st>> made;
std::vector<std::unique_ptr<CUevent_st>> events;
CUstream_st& known(cudaStream_t stream) { return stream ? *stream : stream_0; }
}  // namespace

cudaError_t submit(cudaStream_t stream, std::function<cudaError_t()> work) {
  if (!apart) return work();
  CUstream_st& s = known(stream);
  s.work.push_back(std::move(work));
  ++s.given;
  if ((stream != nullptr) == options.side_first) s.run(s.given);
  return cudaSuccess;
}

}  // namespace simt::detail

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  simt::detail::made.push_back(std::make_unique<CUstream_st>());
  *stream = simt::detail::made.back().get();
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  simt::detail::events.push_back(std::make_unique<CUevent_st>());
  *event = simt::detail::events.back().get();
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->stream = &simt::detail::known(stream);
  event->position = event->stream->given;
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  simt::detail::apart = true;
  if (simt::waits_seen++ == simt::options.skip_wait) return cudaSuccess;
  return simt::detail::submit(stream, [event = *event] {
    event.stream->run(event.position);
    return cudaSuccess;
  });
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  CUstream_st& s = simt::detail::known(stream);
  s.run(s.given);
  simt::detail::apart = false;
  for (const auto& other : simt::detail::made) {
    other->work.clear();
    other->done = other->given;
  }
  simt::options.side_first = !simt::options.side_first;
  return cudaSuccess;
}

// For the tests of the operators: sets Options of streams; returns how many waits there were since the last call.
extern "C" __attribute__((visibility("default"))) int simt_streams(bool side_first, int skip_wait) {
  simt::options.side_first = side_first;
  simt::options.skip_wait = skip_wait;
  return std::exchange(simt::waits_seen, 0);
}
