// The quantized product against the weight computed element by element from the checkpoint's tensors.
#include <cmath>
#include <memory>
#include <vector>

#include "check.h"
#include "lightgptq.h"

namespace {

struct Layer {
  int64_t in, out, groups;
  int32_t bits;
  std::vector<int32_t> qweight, qzeros, g_idx;
  std::vector<uint16_t> scales;

  Layer(int64_t inputs, int64_t outputs, int32_t width, int64_t group_size, bool shuffled)
      : in(inputs), out(outputs), groups((inputs + group_size - 1) / group_size), bits(width) {
    Random random(static_cast<uint64_t>(in * 100 + out + bits));
    qweight.resize(static_cast<size_t>((in * bits + 31) / 32 * out));
    qzeros.resize(static_cast<size_t>(groups * ((out * bits + 31) / 32)));
    for (int32_t &word : qweight) word = static_cast<int32_t>(random.bits());
    for (int32_t &word : qzeros) word = static_cast<int32_t>(random.bits());
    scales.resize(static_cast<size_t>(groups * out));
    for (uint16_t &v : scales) v = static_cast<uint16_t>((random.below(2) << 15) | (0x2400 + random.below(1024)));
    for (int64_t i = 0; i < in; ++i)
      g_idx.push_back(static_cast<int32_t>(shuffled ? random.below(groups) : i / group_size));
  }

  // Code number `index` of a run of codes packed into words that lie `stride` apart.
  uint32_t code(const int32_t *words, int64_t stride, int64_t index) const {
    uint32_t value = 0;
    for (int b = 0; b < bits; ++b) {
      const int64_t bit = index * bits + b;
      value |= (static_cast<uint32_t>(words[bit / 32 * stride]) >> (bit % 32) & 1) << b;
    }
    return value;
  }

  double weight(int64_t o, int64_t i) const {
    const int64_t g = g_idx[i], zero_words = (out * bits + 31) / 32;
    const uint16_t half = scales[g * out + o];  // 2^-6 (1 + m / 1024)
    const double scale = std::ldexp(1.0 + (half & 1023) / 1024.0, -6) * (half >> 15 ? -1 : 1);
    const uint32_t mask = (1u << bits) - 1;
    const uint32_t zero = (code(qzeros.data() + g * zero_words, 1, o) + 1) & mask;
    return scale * (static_cast<double>(code(qweight.data() + o, out, i)) - zero);
  }
};

struct Free {
  void operator()(void *p) const { std::free(p); }
};

void check_layer(const Layer &layer) {
  int64_t bytes = 0;
  CHECK(lgq_packed_bytes(layer.in, layer.out, layer.groups, layer.bits, layer.g_idx.data(), &bytes) == LGQ_OK);
  void *memory = nullptr;
  CHECK(posix_memalign(&memory, 64, static_cast<size_t>(bytes)) == 0);
  const std::unique_ptr<void, Free> packed(memory);
  CHECK(lgq_pack(layer.in, layer.out, layer.groups, layer.bits, 1, layer.qweight.data(), layer.qzeros.data(),
                 layer.scales.data(), layer.g_idx.data(), memory, bytes) == LGQ_OK);
  std::vector<float> w(static_cast<size_t>(layer.in * layer.out));
  CHECK(lgq_dequantize(memory, bytes, w.data(), LGQ_F32) == LGQ_OK);
  for (int64_t o = 0; o < layer.out; ++o)
    for (int64_t i = 0; i < layer.in; ++i) {
      const double expected = layer.weight(o, i);
      CHECK(std::fabs(w[o * layer.in + i] - expected) <= 1e-6 * std::fabs(expected));
    }
  Random random(1);
  for (const int64_t rows : {1, 3, 9, 33}) {
    std::vector<float> x(static_cast<size_t>(rows * layer.in)), y(static_cast<size_t>(rows * layer.out));
    for (float &v : x) v = random.normal();
    for (const int32_t mode : {LGQ_EXACT, LGQ_INT8}) {
      CHECK(lgq_matmul(memory, bytes, rows, x.data(), layer.in, nullptr, LGQ_F32, y.data(), layer.out, LGQ_F32,
                       mode) == LGQ_OK);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t o = 0; o < layer.out; ++o) {
          double sum = 0, squares = 0, largest = 0;
          for (int64_t i = 0; i < layer.in; ++i) {
            const double value = w[o * layer.in + i];
            sum += x[r * layer.in + i] * value;
            squares += value * value;
            largest = std::fmax(largest, std::fabs(x[r * layer.in + i]));
          }
          // bf16 products in exact mode: 2^-8 each; 8-bit activations: half of largest / 127 each; signs are random
          const double bound = (mode == LGQ_EXACT ? 0.03 : 0.04) * std::sqrt(squares) * largest + 1e-4;
          CHECK(std::fabs(y[r * layer.out + o] - sum) <= bound);
        }
    }
  }
}

void check_refusals() {
  const Layer layer(64, 32, 4, 32, false);
  int64_t bytes = 0;
  CHECK(lgq_packed_bytes(64, 32, 2, 5, layer.g_idx.data(), &bytes) == LGQ_BAD_BITS);
  CHECK(lgq_packed_bytes(64, 32, 2, 4, nullptr, &bytes) == LGQ_NULL_POINTER);
  CHECK(lgq_packed_bytes(-1, 32, 2, 4, layer.g_idx.data(), &bytes) != LGQ_OK);
  CHECK(lgq_packed_bytes(64, 32, 1, 4, layer.g_idx.data(), &bytes) == LGQ_BAD_GROUP);
  std::vector<uint64_t> noise(64, 1);
  float x[64] = {}, y[32];
  CHECK(lgq_matmul(nullptr, 512, 1, x, 64, nullptr, LGQ_F32, y, 32, LGQ_F32, LGQ_EXACT) == LGQ_NULL_POINTER);
  CHECK(lgq_matmul(noise.data(), 512, 1, x, 64, nullptr, LGQ_F32, y, 32, LGQ_F32, LGQ_EXACT) != LGQ_OK);
}

}  // namespace

void test_matmul() {
  for (const int32_t bits : {2, 3, 4, 8}) {
    check_layer(Layer(64, 32, bits, 32, false));
    check_layer(Layer(172, 41, bits, 64, false));
    check_layer(Layer(130, 70, bits, 128, true));
    check_layer(Layer(1, 1, bits, 32, false));
    check_layer(Layer(300, 5, bits, 300, false));
  }
  check_refusals();
}
