// Memory that a thread keeps between calls. For files without flags of their own: see parallel.h.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace lgq {

// Grown as needed, aligned to 64; what was in it is lost then.
struct Scratch {
  uint8_t *data = nullptr;
  int64_t bytes = 0;
  ~Scratch() { std::free(data); }
  bool reserve(int64_t wanted) {
    if (wanted <= bytes) return true;
    std::free(data);
    wanted = (wanted + 4095) / 4096 * 4096;
    data = static_cast<uint8_t *>(std::aligned_alloc(64, static_cast<size_t>(wanted)));
    bytes = data == nullptr ? 0 : wanted;
    return data != nullptr;
  }
};

}  // namespace lgq
