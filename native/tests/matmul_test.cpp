// The quantized product against the weight computed element by element from the checkpoint's tensors.
#include <algorithm>
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

  uint32_t zero(int64_t o, int64_t i) const {
    const int64_t zero_words = (out * bits + 31) / 32;
    return (code(qzeros.data() + g_idx[i] * zero_words, 1, o) + 1) & ((1u << bits) - 1);
  }

  double weight(int64_t o, int64_t i) const {
    const uint16_t half = scales[g_idx[i] * out + o];  // 2^-6 (1 + m / 1024)
    const double scale = std::ldexp(1.0 + (half & 1023) / 1024.0, -6) * (half >> 15 ? -1 : 1);
    return scale * (static_cast<double>(code(qweight.data() + o, out, i)) - zero(o, i));
  }

  // Makes the weights of one input 0.
  void silence(int64_t i) {
    for (int64_t o = 0; o < out; ++o)
      for (int b = 0; b < bits; ++b) {
        int32_t &word = qweight[(i * bits + b) / 32 * out + o];
        const uint32_t bit = 1u << ((i * bits + b) % 32), set = zero(o, i) >> b & 1;
        word = static_cast<int32_t>((static_cast<uint32_t>(word) & ~bit) | (set ? bit : 0));
      }
  }

  // What int8 arithmetic makes of one row: 8 bits for every run of at most 128 inputs of a group.
  std::vector<double> rounded(const double *x) const {
    std::vector<double> result(static_cast<size_t>(in));
    for (int64_t g = 0; g < groups; ++g) {
      std::vector<int64_t> members;
      for (int64_t i = 0; i < in; ++i)
        if (g_idx[i] == g) members.push_back(i);
      for (size_t first = 0; first < members.size(); first += 128) {
        const size_t last = std::min(first + 128, members.size());
        float most = 0;
        for (size_t k = first; k < last; ++k) most = std::fmax(most, static_cast<float>(std::fabs(x[members[k]])));
        const float inverse = most > 0 ? 127.0f / most : 0.0f;
        for (size_t k = first; k < last; ++k)
          result[members[k]] = std::nearbyintf(static_cast<float>(x[members[k]]) * inverse) * (most / 127.0f);
      }
    }
    return result;
  }
};

// Numbers of one dtype in a buffer of exactly their size. All values put in are exact in every dtype.
struct Buffer {
  int32_t dtype;
  std::vector<float> wide;
  std::vector<uint16_t> narrow;

  Buffer(int32_t type, int64_t count)
      : dtype(type), wide(type == LGQ_F32 ? count : 0), narrow(type == LGQ_F32 ? 0 : count) {}
  void *data() { return dtype == LGQ_F32 ? static_cast<void *>(wide.data()) : narrow.data(); }
  int fraction_bits() const { return dtype == LGQ_F32 ? 23 : dtype == LGQ_BF16 ? 7 : 10; }
  int bias() const { return dtype == LGQ_F16 ? 15 : 127; }

  void set(int64_t i, double value) {
    if (dtype == LGQ_F32) {
      wide[i] = static_cast<float>(value);
    } else if (std::isnan(value) || std::isinf(value)) {
      narrow[i] = static_cast<uint16_t>((dtype == LGQ_BF16 ? 0x7f80 : 0x7c00) + (std::isnan(value) ? 1 : 0));
    } else if (value == 0) {
      narrow[i] = 0;
    } else {
      int exponent;
      const double fraction = std::frexp(std::fabs(value), &exponent) * 2 - 1;
      const int bits = static_cast<int>(std::ldexp(fraction, fraction_bits()));
      narrow[i] = static_cast<uint16_t>((value < 0 ? 0x8000 : 0) | (exponent - 1 + bias()) << fraction_bits() | bits);
    }
  }
  double get(int64_t i) const {
    if (dtype == LGQ_F32) return wide[i];
    const int fraction = narrow[i] & ((1 << fraction_bits()) - 1), exponent = (narrow[i] & 0x7fff) >> fraction_bits();
    if (exponent == (0x7fff >> fraction_bits())) return fraction ? NAN : INFINITY;
    const double magnitude =
        std::ldexp(fraction + (exponent ? 1 << fraction_bits() : 0), (exponent ? exponent : 1) - bias() - fraction_bits());
    return narrow[i] >> 15 ? -magnitude : magnitude;
  }
};

struct Free {
  void operator()(void *p) const { std::free(p); }
};

struct Packed {
  std::unique_ptr<void, Free> memory;
  int64_t bytes = 0;

  explicit Packed(const Layer &layer) {
    CHECK(lgq_packed_bytes(layer.in, layer.out, layer.groups, layer.bits, layer.g_idx.data(), &bytes) == LGQ_OK);
    void *start = nullptr;
    CHECK(posix_memalign(&start, 64, static_cast<size_t>(bytes)) == 0);
    memory.reset(start);
    CHECK(lgq_pack(layer.in, layer.out, layer.groups, layer.bits, 1, layer.qweight.data(), layer.qzeros.data(),
                   layer.scales.data(), layer.g_idx.data(), start, bytes) == LGQ_OK);
  }
};

// Relative to sum |x||w|: float32 sums of at most 300 products, and the constants that are added to codes; then the
// rounding of the output. int8 is compared with what its own rounding of x gives, so it has the same bound.
void check_row(const Layer &layer, const std::vector<double> &w, const double *x, const Buffer &y, int64_t row,
               int32_t mode) {
  const std::vector<double> seen =
      mode == LGQ_INT8 ? layer.rounded(x) : std::vector<double>(x, x + layer.in);
  const double rounding = std::ldexp(1.0, -1 - y.fraction_bits());
  for (int64_t o = 0; o < layer.out; ++o) {
    double sum = 0, magnitude = 0;
    for (int64_t i = 0; i < layer.in; ++i) {
      sum += seen[i] * w[o * layer.in + i];
      magnitude += std::fabs(seen[i] * w[o * layer.in + i]);
    }
    const double bound = 300 * std::ldexp(1.0, -24) * magnitude + rounding * std::fabs(sum) + std::ldexp(1.0, -25);
    CHECK(std::fabs(y.get(row * layer.out + o) - sum) <= bound);
  }
}

void check_layer(const Layer &layer) {
  const Packed packed(layer);
  std::vector<float> dense(static_cast<size_t>(layer.in * layer.out));
  std::vector<double> w(dense.size());
  CHECK(lgq_dequantize(packed.memory.get(), packed.bytes, dense.data(), LGQ_F32) == LGQ_OK);
  for (int64_t o = 0; o < layer.out; ++o)
    for (int64_t i = 0; i < layer.in; ++i) {
      const double expected = w[o * layer.in + i] = layer.weight(o, i);
      CHECK(std::fabs(dense[o * layer.in + i] - expected) <= 1e-6 * std::fabs(expected));
    }
  Random random(1);
  for (const int64_t rows : {1, 3, 9, 33})
    for (const int32_t dtype : {LGQ_F32, LGQ_BF16, LGQ_F16}) {
      std::vector<double> x(static_cast<size_t>(rows * layer.in));
      Buffer given(dtype, rows * layer.in), y(dtype, rows * layer.out);
      for (size_t i = 0; i < x.size(); ++i) {
        x[i] = static_cast<double>(random.below(255) - 127) / (random.below(8) ? 64 : 4096);
        given.set(static_cast<int64_t>(i), x[i]);
      }
      for (const int32_t mode : {LGQ_EXACT, LGQ_INT8}) {
        CHECK(lgq_matmul(packed.memory.get(), packed.bytes, rows, given.data(), layer.in, nullptr, LGQ_F32, y.data(),
                         layer.out, dtype, mode) == LGQ_OK);
        for (int64_t r = 0; r < rows; ++r) check_row(layer, w, x.data() + r * layer.in, y, r, mode);
      }
    }
}

// An input 1000 times as large as the others, whose own weights are 0: fixed point is off by 2^-22 of it for each of the
// others at most (matmul_quads.h), and what the grid's zero adds to all codes by a float32 rounding of it.
void check_outlier(int32_t bits) {
  Layer layer(172, 41, bits, 64, false);
  layer.silence(7);
  const Packed packed(layer);
  Random random(3);
  for (const int32_t dtype : {LGQ_F32, LGQ_BF16, LGQ_F16}) {
    Buffer given(dtype, layer.in), y(dtype, layer.out);
    std::vector<double> x(static_cast<size_t>(layer.in));
    for (size_t i = 0; i < x.size(); ++i) {
      x[i] = i == 7 ? 1000 : static_cast<double>(random.below(255) - 127) / 128;
      given.set(static_cast<int64_t>(i), x[i]);
    }
    CHECK(lgq_matmul(packed.memory.get(), packed.bytes, 1, given.data(), layer.in, nullptr, LGQ_F32, y.data(), layer.out,
                     dtype, LGQ_EXACT) == LGQ_OK);
    for (int64_t o = 0; o < layer.out; ++o) {
      double sum = 0, magnitude = 0, weights = 0;
      for (int64_t i = 0; i < layer.in; ++i) {
        const double w = layer.weight(o, i);
        sum += x[i] * w;
        magnitude += std::fabs(x[i] * w);
        weights += i / 64 == 0 ? std::fabs(w) : 0;
      }
      const double step = std::ldexp(1.0 + 1.0, -6);  // the largest scale
      const double bound = std::ldexp(1000 * weights + 300 * magnitude, -22) +
                           std::ldexp(1000.0 * (1 << bits) * 2 * step, -23) +
                           std::ldexp(std::fabs(sum), -1 - y.fraction_bits()) + std::ldexp(1.0, -25);
      CHECK(std::fabs(y.get(o) - sum) <= bound);
    }
  }
}

// Inputs of which only the third digit of fixed point is not 0, in `count` quads of each segment (7 more in each row that
// follows, so that a tile has rows with few and with many), beside one without weights that is 2^18 times as large, close to a
// power of two or on one.
void check_third_digits(int32_t bits, int64_t count, double largest, int64_t rows) {
  Layer layer(256, 41, bits, 128, false);
  layer.silence(0);
  layer.silence(128);
  const Packed packed(layer);
  for (const int32_t dtype : {LGQ_BF16, LGQ_F16}) {
    Buffer given(dtype, rows * layer.in), y(dtype, rows * layer.out);
    std::vector<double> x(static_cast<size_t>(rows * layer.in));
    for (int64_t r = 0; r < rows; ++r) {
      double *row = x.data() + r * layer.in;
      for (int64_t k = 0; k < 2 * ((count + 7 * r) % 33); ++k)
        row[k % 2 * 128 + (7 + 13 * k / 2) % 32 * 4 + 1 + k % 3] = std::ldexp(127, -17);
      row[0] = row[128] = largest;
    }
    for (int64_t i = 0; i < rows * layer.in; ++i) given.set(i, x[static_cast<size_t>(i)]);
    CHECK(lgq_matmul(packed.memory.get(), packed.bytes, rows, given.data(), layer.in, nullptr, LGQ_F32, y.data(), layer.out,
                     dtype, LGQ_EXACT) == LGQ_OK);
    for (int64_t at = 0; at < rows * layer.out; ++at) {
      const double *row = x.data() + at / layer.out * layer.in;
      double sum = 0, magnitude = 0;
      for (int64_t i = 0; i < layer.in; ++i) {
        const double product = row[i] * layer.weight(at % layer.out, i);
        sum += product;
        magnitude += std::fabs(product);
      }
      const double step = std::ldexp(1.0 + 1.0, -6);  // the largest scale
      const double bound = std::ldexp(300 * magnitude + 8 * largest * (1 << bits) * step, -24) +
                           std::ldexp(std::fabs(sum), -1 - y.fraction_bits()) + std::ldexp(1.0, -25);
      CHECK(std::fabs(y.get(at) - sum) <= bound);
    }
  }
}

// What is no number in x is none in y, and other rows do not notice.
void check_not_finite(const Layer &layer) {
  const Packed packed(layer);
  for (const double bad : {static_cast<double>(NAN), static_cast<double>(INFINITY)})
    for (const int64_t rows : {1, 6})
      for (const int32_t dtype : {LGQ_F32, LGQ_BF16, LGQ_F16})
        for (const int32_t mode : {LGQ_EXACT, LGQ_INT8}) {
          Buffer x(dtype, rows * layer.in), y(dtype, rows * layer.out);
          for (int64_t i = 0; i < rows * layer.in; ++i) x.set(i, 1);
          x.set(layer.in - 2, bad);
          CHECK(lgq_matmul(packed.memory.get(), packed.bytes, rows, x.data(), layer.in, nullptr, LGQ_F32, y.data(),
                           layer.out, dtype, mode) == LGQ_OK);
          for (int64_t i = 0; i < rows * layer.out; ++i) CHECK(std::isfinite(y.get(i)) == (i >= layer.out));
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
  for (const int32_t bits : {2, 3, 4, 8}) check_outlier(bits);
  for (const int32_t bits : {2, 3, 4, 8})
    for (const int64_t count : {0, 1, 8, 9, 32})
      for (const double largest : {16.0, 31.875})
        for (const int64_t rows : {1, 6, 13}) check_third_digits(bits, count, largest, rows);
  check_not_finite(Layer(172, 41, 4, 64, false));
  check_not_finite(Layer(60, 20, 8, 64, false));
  check_refusals();
}
