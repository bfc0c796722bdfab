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
constexpr size_t kSharedBytes = 256 << 10, kPage = 4096, kStack = 128 << 10;  // shared memory: with gaps
constexpr size_t kSharedUnasked = 48 << 10;  // of a block, where the kernel has not opted in to more
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

// The shared memory of a kernel. Static: as far as it has been reached, by variable.
struct KernelShared {
  std::map<const void*, size_t> variables;
  size_t allowed = 0;  // dynamic, by allow_shared
  size_t fixed() const {
    size_t sum = 0;
    for (const auto& [key, size] : variables) sum += size;
    return sum;
  }
  size_t most_dynamic() const { return std::max(allowed, kSharedUnasked - std::min(kSharedUnasked, fixed())); }
};

uint64_t rng;
double run_ahead;  // how strongly this schedule lets one warp run ahead of the others
size_t idle;       // switches at atomics since something else happened
std::vector<Fiber*> ready;
Fiber host, *self;
const std::function<void()>* body;
std::string failure;
std::vector<char*> free_stacks, free_memories;
std::map<const void*, KernelShared> kernels_shared;
size_t dynamic_shared;  // of the launch under way
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
void* shared(const void* key, size_t size, size_t align, bool dynamic) {
  Inside inside;
  Block& b = *self->block;
  void*& p = b.shared[key];
  if (!p) {
    const auto bytes = [](size_t n) { return std::to_string(n) + " bytes of "; };
    KernelShared& kernel = kernels_shared[running.kernel];
    if (!dynamic) kernel.variables[key] = size;
    const size_t fixed = kernel.fixed();
    if (dynamic && size > dynamic_shared)
      fail(name(*self) + " takes " + bytes(size) + "dynamic shared memory, its launch gave " +
           std::to_string(dynamic_shared));
    if (fixed > kSharedUnasked) fail(name(*self) + ": " + bytes(fixed) + "static shared memory, more than 48 KiB");
    if (fixed + dynamic_shared > options.shared_of_block)
      fail(name(*self) + ": " + bytes(fixed) + "static and " + bytes(dynamic_shared) +
           "dynamic shared memory, more than the device has");
    const size_t at = (b.used + 63 + align) / align * align;
    if (at + size > kSharedBytes) fail(name(*self) + ": no room for the shared memory of the block");
    p = b.memory + at;
    b.used = at + size;
    ASAN(__asan_unpoison_memory_region(p, size));
  }
  return p;
}

// As kernels/simt.cuh has it. What a kernel has of static shared memory is not known before it has run: `shared` fails
// when an answer given before that was wrong.
bool allow_shared(const void* kernel, size_t bytes) {
  KernelShared& now = kernels_shared[kernel];
  if (bytes <= now.most_dynamic()) return true;
  const size_t fixed = now.fixed();
  if (fixed + bytes > options.shared_of_block) {
    ++shared_refused;
    return false;
  }
  now.allowed = options.shared_of_block - fixed;
  return true;
}

// A GPU ends with an error at an address that is not a multiple of the access' size; this processor does not mind.
[[noreturn]] static void misaligned(const char* what, Site at, uintptr_t address) {
  Inside inside;
  fail(std::string(what) + " at " + at.str() + ": misaligned address, " + std::to_string(address % 16) +
       " after a multiple of 16, in " + name(*self));
}
void require_aligned(const void* p, size_t bytes, const char* what, Site at) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (address % bytes) misaligned(what, at, address);
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

cudaError_t run(dim3 g, dim3 t, size_t dynamic, const void* kernel, const std::function<void()>& call) {
  const size_t blocks = size_t(g.x) * g.y * g.z, threads = size_t(t.x) * t.y * t.z;
  if (!blocks || !threads || threads > 1024 || t.z > 64 || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (dynamic > kernels_shared[kernel].most_dynamic()) return cudaErrorInvalidValue;
  dynamic_shared = dynamic;
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

#ifndef SIMT_ASAN
// What -fsanitize=alignment calls; elsewhere its own library is linked.
struct TypeMismatch {
  struct {
    const char* file;
    uint32_t line, column;
  } at;
  const struct {
    uint16_t kind, info;
    char name[];
  }* type;
};
extern "C" void __ubsan_handle_type_mismatch_v1_abort(const TypeMismatch* what, uintptr_t address) {
  const simt::Site at{what->at.file, int(what->at.line)};
  if (!simt::detail::self || !simt::detail::self->block) {
    std::fprintf(stderr, "%s: misaligned address for %s\n", at.str().c_str(), what->type->name);
    std::abort();
  }
  simt::detail::misaligned(what->type->name, at, address);
}
#endif

// ------------------------------------------------------------------------------------------------------------ streams
using Seen = std::map<const CUstream_st*, size_t>;  // so much of the work of each stream

struct CUstream_st {
  std::deque<std::function<cudaError_t()>> work;  // not yet done
  size_t done = 0, given = 0;
  bool captured = false;
  Seen seen;  // in a capture: its own work, and what that comes after
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
  int capture = 0;  // in which it was recorded; 0: in none
  Seen seen;
};

namespace simt::detail {
namespace {
bool apart = false;  // since a stream has waited for another
CUstream_st stream_0;
std::vector<std::unique_ptr<CUstream_st>> made;
std::vector<std::unique_ptr<CUevent_st>> events;
CUstream_st& known(cudaStream_t stream) { return stream ? *stream : stream_0; }

struct Capture {
  int number = 0;
  bool open = false;
  cudaError_t error = cudaSuccess;  // the first
} capture;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

cudaError_t refuse(cudaError_t error) {
  if (capture.error != cudaSuccess) return cudaErrorStreamCaptureInvalidated;
  return capture.error = error;
}

// Of every call that gives work to a stream.
cudaError_t note_in_capture(CUstream_st& s) {
  if (!s.captured) return cudaSuccess;
  if (capture.error != cudaSuccess) return cudaErrorStreamCaptureInvalidated;
  ++s.seen[&s];
  return cudaSuccess;
}

void give(CUstream_st& s, std::function<cudaError_t()> work) {
  s.work.push_back(std::move(work));
  ++s.given;
  if ((&s != &stream_0) == options.side_first) s.run(s.given);
}
}  // namespace

cudaError_t unsafe_in_capture() {
  const bool refused = capture.open && capture_mode != cudaStreamCaptureModeRelaxed;
  return refused ? refuse(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

cudaError_t submit(cudaStream_t stream, std::function<cudaError_t()> work) {
  CUstream_st& s = known(stream);
  if (const cudaError_t error = note_in_capture(s); error != cudaSuccess) return error;
  if (!apart) return work();
  give(s, std::move(work));
  return cudaSuccess;
}

cudaError_t submit_launch(cudaStream_t stream, std::function<cudaError_t()> work) {
  if (launches_seen++ == options.fail_launch) return cudaErrorLaunchOutOfResources;
  return submit(stream, std::move(work));
}

}  // namespace simt::detail

using simt::detail::capture;

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnjoined:
      return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation:
      return "dependency created on uncaptured work in another stream";
    case cudaErrorCapturedEvent:
      return "operation not permitted on an event last recorded in a capturing stream";
    default:
      return "error";
  }
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  simt::detail::made.push_back(std::make_unique<CUstream_st>());
  *stream = simt::detail::made.back().get();
  return simt::detail::unsafe_in_capture();
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  simt::detail::events.push_back(std::make_unique<CUevent_st>());
  *event = simt::detail::events.back().get();
  return simt::detail::unsafe_in_capture();
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  CUstream_st& s = simt::detail::known(stream);
  *event = {.stream = &s, .position = s.given, .capture = s.captured ? capture.number : 0, .seen = s.seen};
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  using namespace simt;
  CUstream_st& s = detail::known(stream);
  const int number = waits_seen++ - options.skip_wait;
  const bool skipped = options.skip_wait >= 0 && number >= 0 && number < options.skip_waits;
  detail::apart = true;
  if (skipped) return cudaSuccess;
  const bool captured_now = capture.open && event->capture == capture.number;
  if (event->capture && !captured_now) return cudaErrorCapturedEvent;
  if (s.captured && !captured_now) return detail::refuse(cudaErrorStreamCaptureIsolation);
  if (captured_now) {
    s.captured = true;
    for (const auto& [other, count] : event->seen) s.seen[other] = std::max(s.seen[other], count);
    if (const cudaError_t error = detail::note_in_capture(s); error != cudaSuccess) return error;
  }
  detail::give(s, [event = *event] {
    event.stream->run(event.position);
    return cudaSuccess;
  });
  return cudaSuccess;
}

void simt::finish(cudaStream_t stream) {
  CUstream_st& s = simt::detail::known(stream);
  s.run(s.given);
  simt::detail::apart = false;
  for (const auto& other : simt::detail::made) {
    simt::left_behind += int(other->given - other->done);
    other->work.clear();
    other->done = other->given;
  }
  simt::options.side_first = !simt::options.side_first;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (capture.open) {
    if (simt::detail::known(stream).captured) return simt::detail::refuse(cudaErrorStreamCaptureUnsupported);
    if (const cudaError_t error = simt::detail::unsafe_in_capture(); error != cudaSuccess) return error;
  }
  simt::finish(stream);
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  return capture.open ? simt::detail::refuse(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, simt::detail::capture_mode);
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (capture.open) return cudaErrorIllegalState;
  capture = {capture.number + 1, true, cudaSuccess};
  simt::detail::known(stream).captured = true;
  return cudaSuccess;
}

// The mode is always cudaStreamCaptureModeGlobal, and `graph` stays as it is.
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t*) {
  if (!capture.open) return cudaErrorIllegalState;
  const Seen joined = simt::detail::known(stream).seen;
  bool all = true;
  const auto leave = [&](CUstream_st& s) {
    const auto found = joined.find(&s);
    const size_t own = s.seen[&s];
    all &= own == 0 || (found != joined.end() && found->second == own);
    s.captured = false;
    s.seen.clear();
  };
  leave(simt::detail::stream_0);
  for (const auto& other : simt::detail::made) leave(*other);
  capture.open = false;
  if (capture.error != cudaSuccess) return cudaErrorStreamCaptureInvalidated;
  return all ? cudaSuccess : cudaErrorStreamCaptureUnjoined;
}

// ---------------------------------------------------------------------------------- for the tests of the operators
#define SIMT_FOR_TESTS extern "C" __attribute__((visibility("default")))

// Sets Options of streams; returns how many waits there were since the last call.
SIMT_FOR_TESTS int simt_streams(bool side_first, int skip_wait) {
  simt::options.side_first = side_first;
  simt::options.skip_wait = skip_wait;
  return std::exchange(simt::waits_seen, 0);
}
SIMT_FOR_TESTS void simt_skip_waits(int count) { simt::options.skip_waits = count; }

// Refuses a launch; returns how many there were since the last call.
SIMT_FOR_TESTS int simt_fail_launch(int number) {
  simt::options.fail_launch = number;
  return std::exchange(simt::launches_seen, 0);
}

// What nobody has waited for since the last call.
SIMT_FOR_TESTS int simt_left_behind() { return std::exchange(simt::left_behind, 0); }

// A copy that the current stream is given before the operators' work, and does no sooner than it must.
SIMT_FOR_TESTS void simt_late_copy(void* to, const void* from, size_t size) {
  simt::detail::apart = true;
  cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, nullptr);
}

// Another device; returns how often the one before had too little shared memory.
SIMT_FOR_TESTS int simt_shared_of_block(int kib) {
  simt::options.shared_of_block = size_t(kib) << 10;
  for (auto& [kernel, shared] : simt::detail::kernels_shared) shared.allowed = 0;
  return std::exchange(simt::shared_refused, 0);
}

// Begins or ends a capture of the current stream; the error as a word.
SIMT_FOR_TESTS const char* simt_capture(bool begin) {
  return cudaGetErrorString(begin ? cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal)
                                  : cudaStreamEndCapture(nullptr, nullptr));
}
