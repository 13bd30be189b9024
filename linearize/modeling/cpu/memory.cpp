// Memory of large CPU tensors that is used again. The C library maps large blocks afresh, page by page, and gives them back when
// they are freed, or leaves holes in its heap that no block fits into: passes over long rows spend a third of their time so.
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <algorithm>
#include <list>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>

#include "workspace.h"

namespace {

constexpr size_t LEAST = 1 << 20, STEP = 1 << 16, HUGE_PAGE = 2 << 20;  // bytes: smaller tensors are the C library's
constexpr double SLACK = 1.125;  // a block may be larger than asked for by so much
constexpr double SPARE = 1.5;    // blocks in use and kept together, over the most that were ever in use at once

struct Block {
  void* data;
  size_t size;
};

void* fresh(size_t size) {
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return nullptr;
#ifdef MADV_HUGEPAGE
  if (size >= HUGE_PAGE) madvise(data, size, MADV_HUGEPAGE);
#endif
  return data;
}

class Blocks {
  using Kept = std::list<Block>;
  std::mutex lock;
  Kept kept;  // the longest unused first
  std::multimap<size_t, Kept::iterator> by_size;
  std::unordered_map<void*, size_t> used;
  size_t in_use = 0, most = 0, spare = 0;

  Block taken(std::multimap<size_t, Kept::iterator>::iterator found) {
    const Block block = *found->second;
    kept.erase(found->second), by_size.erase(found);
    spare -= block.size;
    return block;
  }

  void drop() {
    auto found = by_size.lower_bound(kept.front().size);
    while (found->second != kept.begin()) found++;
    const Block block = taken(found);
    munmap(block.data, block.size);
  }

 public:
  void* take(size_t bytes) {
    const size_t size = (bytes + STEP - 1) / STEP * STEP;
    const std::lock_guard<std::mutex> guard(lock);
    const auto found = by_size.lower_bound(size);
    Block block{nullptr, size};
    if (found != by_size.end() && found->first <= size * SLACK) block = taken(found);
    in_use += block.size, most = std::max(most, in_use);
    while (spare && in_use + spare > most * SPARE) drop();
    while (!block.data && !(block.data = fresh(size))) {
      if (!spare) return in_use -= size, nullptr;
      drop();
    }
    used[block.data] = block.size;
    return block.data;
  }

  void give_back() {
    const std::lock_guard<std::mutex> guard(lock);
    while (spare) drop();
    most = in_use;
  }

  // Whether it was one of these blocks.
  bool give(void* data) {
    const std::lock_guard<std::mutex> guard(lock);
    const auto found = used.find(data);
    if (found == used.end()) return false;
    by_size.emplace(found->second, kept.insert(kept.end(), {data, found->second}));
    spare += found->second, in_use -= found->second;
    used.erase(found);
    return true;
  }
};

Blocks& blocks() {
  static Blocks* made = new Blocks;  // never destroyed: tensors are freed until the process ends
  return *made;
}

struct Keeping final : c10::Allocator {
  static void release(void* data) {
    if (!blocks().give(data)) c10::GetDefaultCPUAllocator()->raw_deallocate(data);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes < LEAST ? nullptr : blocks().take(bytes);
    if (!data) data = c10::GetDefaultCPUAllocator()->raw_allocate(bytes);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* into, const void* from, size_t bytes) const override { default_copy_data(into, from, bytes); }
};

}  // namespace

extern "C" void keep_memory() { c10::SetCPUAllocator(new Keeping); }

extern "C" void give_back() { blocks().give_back(); }

float* borrow(Index size) { return static_cast<float*>(c10::GetCPUAllocator()->raw_allocate(size * sizeof(float))); }

void give(float* data) { c10::GetCPUAllocator()->raw_deallocate(data); }
