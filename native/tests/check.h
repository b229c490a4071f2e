// The least that the native tests need: a check that says where it failed, and random numbers without luck.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#define CHECK(condition)                                                              \
  do {                                                                                \
    if (!(condition)) {                                                               \
      std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                   \
    }                                                                                 \
  } while (0)

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435769u + 1) {}
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  // Roughly normal, mean 0, deviation 1.
  float normal() {
    double sum = 0;
    for (int i = 0; i < 12; ++i) sum += bits() / 4294967296.0;
    return static_cast<float>(sum - 6);
  }

 private:
  uint64_t state_;
};

void test_attention();
void test_gated_mlp();
void test_solver();
void test_matmul();
void test_hostile();
