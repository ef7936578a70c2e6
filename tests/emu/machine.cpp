#include "machine.h"

#include "fiber.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <stdexcept>

namespace emu {

namespace {

constexpr size_t kMostSharedBytes = 99 << 10;  // of sm_86 and sm_89; others have more
constexpr int kWarp = 32;

enum class State : uint8_t { kReady, kInWarp, kAtBarrier, kDone };

struct Copy {
  uint32_t shared;
  const uint8_t* global;
  uint32_t bytes;
  int group;
};

struct Thread {
  Context context;
  uint8_t* stack = nullptr;
  State state = State::kReady;
  int number = 0, line = 0, group = 0;
  dim3 index;
  std::vector<Copy> copies;
};

struct Gathering {  // of a warp's lanes at a collective instruction
  int arrived = 0, line = 0;
  WarpOp kind{};
  void* arguments[kWarp];
};

// Who touched a byte last: since which barrier, and whether it was one thread, several of a warp, or several warps.
struct Stamp {
  uint32_t epoch = 0;  // counted from 1; 0: never in this block
  int16_t thread = 0, warp = 0;
};
constexpr int16_t kSeveral = -1;

struct Shadow {
  Stamp written, read;
  bool is_pending = false;  // a copy is on its way
};

// Of global memory. Each byte of one that may be written knows the launch and thread that wrote it, and the launch that read it.
struct Range {
  const uint8_t* first;
  const uint8_t* last;
  bool is_writable;
  std::vector<uint64_t> writer;
  std::vector<uint32_t> read;
};

struct Machine {
  dim3 grid, block, block_index;
  const std::function<void()>* body = nullptr;
  Context host;
  std::vector<Thread> threads;
  std::vector<Gathering> warps;
  Thread* current = nullptr;
  uint32_t epoch = 0, launch = 0;
  std::vector<uint8_t> shared;
  uint32_t shared_bytes = 0;
  std::vector<Shadow> shadow;
  std::vector<Range> ranges;
  std::string error;
  uint32_t seed = 0;
  int fault = 0;
  Counts counts{};
};

Machine machine;

void yield() { switch_context(machine.current->context, machine.host); }

void entry() {
  (*machine.body)();
  if (!machine.current->copies.empty()) fail("a thread ends with copies under way", machine.current->line);
  machine.current->state = State::kDone;
  yield();
  abort();
}

void start(Thread& thread, int number) {
  if (thread.stack == nullptr) {
    void* const memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) throw std::runtime_error("no memory for a stack");
    thread.stack = static_cast<uint8_t*>(memory);
  }
  thread.state = State::kReady;
  thread.number = number;
  thread.line = thread.group = 0;
  const dim3 size = machine.block;
  thread.index = dim3(number % size.x, number / size.x % size.y, number / (size.x * size.y));
  thread.copies.clear();
  prepare(thread.context, thread.stack, entry);
}

bool happened_before(const Stamp& stamp, int thread) { return stamp.epoch != machine.epoch || stamp.thread == thread; }

std::string name_of(const Stamp& stamp) {
  if (stamp.thread != kSeveral) return "thread " + std::to_string(stamp.thread);
  return stamp.warp != kSeveral ? "warp " + std::to_string(stamp.warp) : "several warps";
}

// By `thread`, or kSeveral for all of a warp.
void touch(uint32_t address, uint32_t bytes, Access access, int thread, int line) {
  ++machine.counts.shared_accesses;
  const auto at = " at shared byte " + std::to_string(address);
  if (address + static_cast<uint64_t>(bytes) > machine.shared_bytes) {
    fail("access beyond shared memory" + at + " of " + std::to_string(machine.shared_bytes), line);
  }
  if (address % bytes != 0) fail("misaligned access of " + std::to_string(bytes) + " bytes" + at, line);
  const int16_t own_warp = static_cast<int16_t>(warp());
  const Stamp now{machine.epoch, static_cast<int16_t>(thread), own_warp};
  for (uint32_t i = address; i < address + bytes; ++i) {
    Shadow& shadow = machine.shadow[i];
    if (access == Access::kArrive) {
      shadow.is_pending = false;
      shadow.written = now;
      continue;
    }
    if (shadow.is_pending) fail("access to bytes with a copy under way" + at, line);
    if (!happened_before(shadow.written, thread)) {
      fail(std::string(access == Access::kRead ? "read" : "write") + " beside a write of " + name_of(shadow.written) + at, line);
    }
    if (access == Access::kRead) {
      if (shadow.written.epoch == 0) fail("read of shared memory that nobody has written" + at, line);
      const bool is_alone = shadow.read.epoch != machine.epoch || (shadow.read.thread == thread && thread != kSeveral);
      const bool is_same_warp = shadow.read.epoch == machine.epoch && shadow.read.warp == own_warp;
      const int16_t readers = is_same_warp ? own_warp : kSeveral;
      shadow.read = is_alone ? now : Stamp{machine.epoch, kSeveral, readers};
    } else {
      if (!happened_before(shadow.read, thread)) fail("write beside a read of " + name_of(shadow.read) + at, line);
      shadow.written = now;
      shadow.is_pending = access == Access::kCopy;
    }
  }
}

const char* name_of(State state) {
  switch (state) {
    case State::kReady:
      return "are ready";
    case State::kInWarp:
      return "wait for their warp";
    case State::kAtBarrier:
      return "wait at a barrier";
    default:
      return "have ended";
  }
}

bool all_are(State state) {
  return std::all_of(machine.threads.begin(), machine.threads.end(), [=](const Thread& t) { return t.state == state; });
}

// Each warp runs as far as it gets before the next one does: no GPU could let them drift further apart.
bool run_warps() {
  const int warps = static_cast<int>(machine.warps.size());
  bool has_run = false;
  for (int k = 0; k < warps; ++k) {
    const int warp = (k + static_cast<int>(machine.seed)) % warps;
    for (bool again = true; again;) {
      again = false;
      for (int l = 0; l < kWarp; ++l) {
        const int lane = machine.seed % 2 ? kWarp - 1 - l : l;
        Thread& thread = machine.threads[warp * kWarp + lane];
        if (thread.state != State::kReady) continue;
        machine.current = &thread;
        switch_context(machine.host, thread.context);
        if (!machine.error.empty()) throw std::runtime_error(machine.error);
        again = has_run = true;
      }
    }
  }
  return has_run;
}

void run_block() {
  ++machine.counts.blocks;
  std::fill(machine.shared.begin(), machine.shared.end(), 0xff);
  std::fill(machine.shadow.begin(), machine.shadow.end(), Shadow());
  std::fill(machine.warps.begin(), machine.warps.end(), Gathering());
  machine.epoch = 1;
  for (size_t i = 0; i < machine.threads.size(); ++i) start(machine.threads[i], static_cast<int>(i));
  while (!all_are(State::kDone)) {
    if (run_warps()) continue;
    std::map<std::pair<State, int>, int> where;
    for (const Thread& thread : machine.threads) ++where[{thread.state, thread.state == State::kDone ? 0 : thread.line}];
    if (where.size() > 1 || where.begin()->first.first != State::kAtBarrier) {
      std::string what = "threads wait for each other:";
      for (const auto& [place, number] : where) {
        what += " " + std::to_string(number) + " " + name_of(place.first) + " (line " + std::to_string(place.second) + ");";
      }
      throw std::runtime_error(what);
    }
    ++machine.epoch;
    ++machine.counts.barriers;
    for (Thread& thread : machine.threads) thread.state = State::kReady;
  }
}

}  // namespace

void set_schedule(uint32_t seed) { machine.seed = seed; }
bool fault(int number) { return machine.fault == number; }

void allow(const void* first, size_t bytes, bool is_writable) {
  const auto* const begin = static_cast<const uint8_t*>(first);
  const size_t tracked = is_writable ? bytes : 0;
  machine.ranges.push_back({begin, begin + bytes, is_writable, std::vector<uint64_t>(tracked), std::vector<uint32_t>(tracked)});
}
void forbid_all() { machine.ranges.clear(); }

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads % kWarp != 0 || threads > 1024) throw std::runtime_error("a block must be 1 to 32 whole warps");
  if (shared_bytes > kMostSharedBytes) throw std::runtime_error("more shared memory than a block can have");
  if (grid.x == 0 || grid.x >= 1u << 31 || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    throw std::runtime_error("a grid of no blocks, or of more than a launch can have");
  }
  ++machine.counts.launches;
  machine.launch = (machine.launch + 1) & 0xffffff;
  machine.grid = grid;
  machine.block = block;
  machine.body = &body;
  machine.error.clear();
  machine.shared_bytes = static_cast<uint32_t>(shared_bytes);
  machine.shared.resize(shared_bytes);
  machine.shadow.resize(shared_bytes);
  if (machine.threads.size() > threads) {
    for (size_t i = threads; i < machine.threads.size(); ++i) munmap(machine.threads[i].stack, kStackBytes);
  }
  machine.threads.resize(threads);
  machine.warps.resize(threads / kWarp);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        machine.block_index = dim3(x, y, z);
        run_block();
      }
    }
  }
}

void fail(const std::string& what, int line) {
  const dim3 b = machine.block_index, t = machine.current->index;
  machine.error = "line " + std::to_string(line) + ", block " + std::to_string(b.x) + ", thread " + std::to_string(t.x) + ": " + what;
  yield();
  abort();
}

const dim3& thread_index() { return machine.current->index; }
const dim3& block_index() { return machine.block_index; }
const dim3& block_size() { return machine.block; }
const dim3& grid_size() { return machine.grid; }
int warp() { return machine.current->number / kWarp; }
uint8_t* shared_bytes() { return machine.shared.data(); }
Counts& counts() { return machine.counts; }

void block_barrier(int line) {
  machine.current->state = State::kAtBarrier;
  machine.current->line = line;
  yield();
}

void together(WarpOp kind, void* argument, void (*operation)(void** arguments, int line), int line) {
  Thread& thread = *machine.current;
  Gathering& warp = machine.warps[thread.number / kWarp];
  thread.line = line;
  if (warp.arrived == 0) {
    warp.kind = kind;
    warp.line = line;
  } else if (warp.kind != kind || warp.line != line) {
    fail("lanes of a warp meet here and at line " + std::to_string(warp.line), line);
  }
  warp.arguments[thread.number % kWarp] = argument;
  if (++warp.arrived < kWarp) {
    thread.state = State::kInWarp;
    yield();
    return;
  }
  warp.arrived = 0;
  operation(warp.arguments, line);
  Thread* const lanes = &machine.threads[thread.number / kWarp * kWarp];
  for (int lane = 0; lane < kWarp; ++lane) lanes[lane].state = State::kReady;
}

void touch_shared(uint32_t address, uint32_t bytes, Access access, int line) {
  touch(address, bytes, access, machine.current->number, line);
}
void touch_shared_as_warp(uint32_t address, uint32_t bytes, int line) { touch(address, bytes, Access::kRead, kSeveral, line); }

void touch_global(const void* address, uint32_t bytes, GlobalAccess access, int line) {
  ++machine.counts.global_accesses;
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fail("misaligned access of " + std::to_string(bytes) + " bytes to global memory", line);
  }
  const auto* const first = static_cast<const uint8_t*>(address);
  const uint64_t threads = machine.threads.size(), block = machine.block_index.x;
  const uint64_t own = static_cast<uint64_t>(machine.launch) << 40 | (block * threads + machine.current->number + 1);
  bool is_allowed = false;
  for (Range& range : machine.ranges) {
    if (first < range.first || first + bytes > range.last) continue;
    is_allowed = is_allowed || range.is_writable || access != GlobalAccess::kWrite;
    if (!range.is_writable) continue;
    const size_t offset = first - range.first;
    for (size_t i = offset; i < offset + bytes; ++i) {
      const bool is_others = range.writer[i] >> 40 == machine.launch && range.writer[i] != own;
      const bool is_mine = range.writer[i] == own;
      if (access == GlobalAccess::kWrite) {
        if (is_others) fail("write of what another thread of the launch has written", line);
        if (range.read[i] == machine.launch) fail("write of what the launch reads as constant", line);
        range.writer[i] = own;
      } else {
        if (is_others || (is_mine && access == GlobalAccess::kRead)) fail("read of what the launch writes", line);
        if (access == GlobalAccess::kRead) range.read[i] = machine.launch;
      }
    }
  }
  if (!is_allowed) fail(std::string(access == GlobalAccess::kWrite ? "write" : "read") + " outside of the tensors", line);
}

void copy_async(uint32_t shared, const void* global, uint32_t bytes, int line) {
  if (bytes > 0) touch_global(global, bytes, GlobalAccess::kRead, line);
  touch_shared(shared, 16, Access::kCopy, line);
  memset(machine.shared.data() + shared, 0xff, 16);
  machine.current->copies.push_back({shared, static_cast<const uint8_t*>(global), bytes, machine.current->group});
  machine.current->line = line;
  ++machine.counts.async_copies;
}

void copy_async_commit() { ++machine.current->group; }

void copy_async_wait(int groups) {
  Thread& thread = *machine.current;
  const auto has_arrived = [&](const Copy& copy) { return copy.group < thread.group - groups; };
  for (const Copy& copy : thread.copies) {
    if (!has_arrived(copy)) continue;
    memset(machine.shared.data() + copy.shared, 0, 16);
    memcpy(machine.shared.data() + copy.shared, copy.global, copy.bytes);
    touch(copy.shared, 16, Access::kArrive, thread.number, thread.line);
  }
  thread.copies.erase(std::remove_if(thread.copies.begin(), thread.copies.end(), has_arrived), thread.copies.end());
}

}  // namespace emu

// For tests.
extern "C" {
void emu_set_schedule(unsigned seed) { emu::machine.seed = seed; }
void emu_set_fault(int number) { emu::machine.fault = number; }
void emu_reset_counts() { emu::machine.counts = {}; }
void emu_counts(uint64_t* counts) { memcpy(counts, &emu::machine.counts, sizeof(emu::Counts)); }
}
