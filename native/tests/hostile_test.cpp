// Every entry point with one argument spoilt at a time: a status, never a crash. Meant to be run with sanitizers.
#include <cstring>
#include <vector>

#include "check.h"
#include "lightgptq.h"

namespace {

// f(value) must be refused for each size that can be none.
template <class F>
void refuse_sizes(F f, bool zero_is_fine = false) {
  for (const int64_t value : {int64_t{-1}, INT64_MIN, INT64_MAX, int64_t{1} << 62}) CHECK(f(value) != LGQ_OK);
  if (!zero_is_fine) CHECK(f(0) != LGQ_OK);
}

struct Weight {
  int64_t in = 96, out = 40, groups = 3, bytes = 0;
  std::vector<int32_t> qweight, qzeros, g_idx;
  std::vector<uint16_t> scales;
  char *memory = nullptr;

  Weight() : qweight(12 * 40, 0x12345678), qzeros(3 * 5, 0x11111111), scales(3 * 40, 0x2400) {
    for (int i = 0; i < in; ++i) g_idx.push_back(i * 7 % 3);
    CHECK(lgq_packed_bytes(in, out, groups, 4, g_idx.data(), &bytes) == LGQ_OK);
    void *start = nullptr;
    CHECK(posix_memalign(&start, 64, static_cast<size_t>(bytes)) == 0);
    memory = static_cast<char *>(start);
    CHECK(pack(in, out, groups, 4, 1, memory, bytes) == LGQ_OK);
  }
  ~Weight() { std::free(memory); }

  int32_t pack(int64_t i, int64_t o, int64_t g, int32_t bits, int32_t offset, void *to, int64_t size) const {
    return lgq_pack(i, o, g, bits, offset, qweight.data(), qzeros.data(), scales.data(), g_idx.data(), to, size);
  }
};

void spoil_norm() {
  float x[6] = {1, 2, 3, 4, 5, 6}, w[3] = {1, 1, 1}, y[6] = {};
  refuse_sizes([&](int64_t v) { return lgq_rms_norm(x, v, 3, w, 0.0f, y, LGQ_F32); }, true);
  refuse_sizes([&](int64_t v) { return lgq_rms_norm(x, 2, v, w, 0.0f, y, LGQ_F32); });
  CHECK(lgq_rms_norm(nullptr, 2, 3, w, 0.0f, y, LGQ_F32) == LGQ_NULL_POINTER);
  CHECK(lgq_rms_norm(x, 2, 3, nullptr, 0.0f, y, LGQ_F32) == LGQ_NULL_POINTER);
  CHECK(lgq_rms_norm(x, 2, 3, w, 0.0f, nullptr, LGQ_F32) == LGQ_NULL_POINTER);
  CHECK(lgq_rms_norm(x, 2, 3, w, 0.0f, y, 3) == LGQ_BAD_DTYPE);
  CHECK(lgq_rms_norm(x, 2, 3, w, -1.0f, y, LGQ_F32) == LGQ_BAD_VALUE);
  CHECK(lgq_rms_norm(x, 2, 3, w, __builtin_nanf(""), y, LGQ_F32) == LGQ_BAD_VALUE);
  for (const float f : y) CHECK(f == 0.0f);
}

void spoil_rotation() {
  float x[8] = {1, 2, 3, 4, 5, 6, 7, 8}, cos[2] = {1, 1}, sin[2] = {0, 0}, y[8] = {};
  const auto rotate = [&](int64_t batch, int64_t heads, int64_t dim, int64_t stride) {
    return lgq_rotate(x, batch, heads, dim, cos, sin, stride, y, LGQ_F32);
  };
  refuse_sizes([&](int64_t n) { return rotate(n, 4, 2, 0); });
  refuse_sizes([&](int64_t n) { return rotate(1, n, 2, 0); });
  refuse_sizes([&](int64_t n) { return rotate(1, 4, n, 0); });
  refuse_sizes([&](int64_t n) { return rotate(1, 4, 2, n); }, true);
  CHECK(rotate(1, 4, 1, 0) == LGQ_BAD_SIZE);
  CHECK(rotate(1 << 20, 1 << 20, 2, 0) == LGQ_BAD_SIZE);
  CHECK(lgq_rotate(nullptr, 1, 4, 2, cos, sin, 0, y, LGQ_F32) == LGQ_NULL_POINTER);
  CHECK(lgq_rotate(x, 1, 4, 2, nullptr, sin, 0, y, LGQ_F32) == LGQ_NULL_POINTER);
  CHECK(lgq_rotate(x, 1, 4, 2, cos, nullptr, 0, y, LGQ_F32) == LGQ_NULL_POINTER);
  CHECK(lgq_rotate(x, 1, 4, 2, cos, sin, 0, nullptr, LGQ_F32) == LGQ_NULL_POINTER);
  CHECK(lgq_rotate(x, 1, 4, 2, cos, sin, 0, y, 3) == LGQ_BAD_DTYPE);
  for (const float f : y) CHECK(f == 0.0f);
}

// The weight is 96 to 40, so that it fits neither behind nor beside itself.
void spoil_mlp(const Weight &w) {
  float x[96] = {1}, y[64] = {};
  const lgq_factor one = {w.memory, w.bytes, nullptr, LGQ_F32};
  const lgq_factor factors[3] = {one, one, one};
  const auto mlp = [&](int32_t activation, int64_t rows, int64_t stride, int32_t dtype, int32_t mode) {
    return lgq_gated_mlp(factors, activation, rows, x, stride, y, dtype, mode);
  };
  CHECK(mlp(LGQ_SILU, 1, 96, LGQ_F32, LGQ_EXACT) == LGQ_BAD_SIZE);
  CHECK(mlp(2, 1, 96, LGQ_F32, LGQ_EXACT) == LGQ_BAD_VALUE);
  CHECK(mlp(LGQ_SILU, 1, 96, 3, LGQ_EXACT) == LGQ_BAD_DTYPE);
  CHECK(lgq_gated_mlp(nullptr, LGQ_SILU, 1, x, 96, y, LGQ_F32, LGQ_EXACT) == LGQ_NULL_POINTER);
  CHECK(lgq_gated_mlp(factors, LGQ_SILU, 1, nullptr, 96, y, LGQ_F32, LGQ_EXACT) == LGQ_NULL_POINTER);
  CHECK(lgq_gated_mlp(factors, LGQ_SILU, 1, x, 96, nullptr, LGQ_F32, LGQ_EXACT) == LGQ_NULL_POINTER);

  std::vector<int32_t> qweight(5 * 64), qzeros(8), g_idx(40, 0);
  std::vector<uint16_t> scales(64, 0x2400);
  int64_t bytes = 0;
  CHECK(lgq_packed_bytes(40, 64, 1, 4, g_idx.data(), &bytes) == LGQ_OK);
  void *memory = nullptr;
  CHECK(posix_memalign(&memory, 64, static_cast<size_t>(bytes)) == 0);
  CHECK(lgq_pack(40, 64, 1, 4, 1, qweight.data(), qzeros.data(), scales.data(), g_idx.data(), memory, bytes) == LGQ_OK);
  const auto with = [&](lgq_factor down, int64_t rows, int64_t stride, int32_t mode) {
    const lgq_factor all[3] = {one, one, down};
    return lgq_gated_mlp(all, LGQ_SILU, rows, x, stride, y, LGQ_F32, mode);
  };
  const lgq_factor down = {memory, bytes, nullptr, LGQ_F32};
  refuse_sizes([&](int64_t n) { return with(down, n, 96, LGQ_EXACT); }, true);
  refuse_sizes([&](int64_t n) { return with(down, 1, n, LGQ_EXACT); });
  CHECK(with(down, LGQ_MOST_GATED_ROWS + 1, 96, LGQ_EXACT) == LGQ_BAD_SIZE);
  CHECK(with(down, 1, 96, 2) == LGQ_BAD_MODE);
  CHECK(with({memory, bytes - 1, nullptr, LGQ_F32}, 1, 96, LGQ_EXACT) != LGQ_OK);
  CHECK(with({nullptr, bytes, nullptr, LGQ_F32}, 1, 96, LGQ_EXACT) == LGQ_NULL_POINTER);
  CHECK(with({memory, bytes, x, 3}, 1, 96, LGQ_EXACT) == LGQ_BAD_DTYPE);
  for (const float f : y) CHECK(f == 0.0f);
  CHECK(with(down, 0, 96, LGQ_EXACT) == LGQ_OK);
  CHECK(with(down, 1, 96, LGQ_EXACT) == LGQ_OK);
  std::free(memory);
}

void spoil_attention() {
  float q[8] = {1, 2, 3, 4, 5, 6, 7, 8}, k[12] = {1}, v[12] = {1}, y[8] = {};
  const auto attend = [&](int64_t stride, int64_t batch, int64_t heads, int64_t kv_heads, int64_t tokens, int64_t dim) {
    return lgq_attend(q, k, 12, 6, stride, v, 12, 6, stride, batch, heads, kv_heads, tokens, dim, 1.0f, y, LGQ_F32);
  };
  const auto strided = [&](int64_t kb, int64_t kh, int64_t kt, int64_t vb, int64_t vh, int64_t vt) {
    return lgq_attend(q, k, kb, kh, kt, v, vb, vh, vt, 1, 4, 2, 3, 2, 1.0f, y, LGQ_F32);
  };
  refuse_sizes([&](int64_t n) { return attend(2, n, 4, 2, 3, 2); }, true);
  refuse_sizes([&](int64_t n) { return attend(2, 1, n, 2, 3, 2); });
  refuse_sizes([&](int64_t n) { return attend(2, 1, 4, n, 3, 2); });
  refuse_sizes([&](int64_t n) { return attend(2, 1, 4, 2, n, 2); });
  refuse_sizes([&](int64_t n) { return attend(2, 1, 4, 2, 3, n); });
  refuse_sizes([&](int64_t n) { return strided(n, 6, 2, 12, 6, 2); }, true);
  refuse_sizes([&](int64_t n) { return strided(12, n, 2, 12, 6, 2); }, true);
  refuse_sizes([&](int64_t n) { return strided(12, 6, n, 12, 6, 2); }, true);
  refuse_sizes([&](int64_t n) { return strided(12, 6, 2, n, 6, 2); }, true);
  refuse_sizes([&](int64_t n) { return strided(12, 6, 2, 12, n, 2); }, true);
  refuse_sizes([&](int64_t n) { return strided(12, 6, 2, 12, 6, n); }, true);
  CHECK(attend(2, 1, 4, 3, 3, 2) == LGQ_BAD_SIZE);
  CHECK(attend(2, 1, 2, 4, 3, 2) == LGQ_BAD_SIZE);
  CHECK(attend(2, 1 << 20, 1 << 20, 1, 3, 2) == LGQ_BAD_SIZE);
  CHECK(attend(2, 1, 4, 2, 3, LGQ_WIDEST_HEAD + 1) == LGQ_BAD_SIZE);
  const auto from = [&](const void *a, const void *b, const void *c, void *to, int32_t dtype) {
    return lgq_attend(a, b, 12, 6, 2, c, 12, 6, 2, 1, 4, 2, 3, 2, 1.0f, to, dtype);
  };
  CHECK(from(nullptr, k, v, y, LGQ_F32) == LGQ_NULL_POINTER);
  CHECK(from(q, nullptr, v, y, LGQ_F32) == LGQ_NULL_POINTER);
  CHECK(from(q, k, nullptr, y, LGQ_F32) == LGQ_NULL_POINTER);
  CHECK(from(q, k, v, nullptr, LGQ_F32) == LGQ_NULL_POINTER);
  for (const int32_t dtype : {-1, 3, INT32_MAX}) CHECK(from(q, k, v, y, dtype) == LGQ_BAD_DTYPE);
  CHECK(attend(2, 0, 4, 2, 3, 2) == LGQ_OK);
  for (const float f : y) CHECK(f == 0.0f);
  CHECK(from(q, k, v, y, LGQ_F32) == LGQ_OK);
}

void spoil_packing(const Weight &w) {
  const int32_t *g_idx = w.g_idx.data();
  int64_t bytes = -7;
  refuse_sizes([&](int64_t v) { return lgq_packed_bytes(v, w.out, w.groups, 4, g_idx, &bytes); });
  refuse_sizes([&](int64_t v) { return lgq_packed_bytes(w.in, v, w.groups, 4, g_idx, &bytes); });
  refuse_sizes([&](int64_t v) { return lgq_packed_bytes(w.in, w.out, v, 4, g_idx, &bytes); });
  for (const int32_t bits : {INT32_MIN, -4, 0, 1, 5, 16, INT32_MAX})
    CHECK(lgq_packed_bytes(w.in, w.out, w.groups, bits, g_idx, &bytes) == LGQ_BAD_BITS);
  CHECK(lgq_packed_bytes(w.in, w.out, w.groups, 4, g_idx, nullptr) == LGQ_NULL_POINTER);
  CHECK(lgq_packed_bytes(w.in, w.out, w.groups, 4, nullptr, &bytes) == LGQ_NULL_POINTER);
  CHECK(bytes == -7);

  refuse_sizes([&](int64_t v) { return w.pack(v, w.out, w.groups, 4, 1, w.memory, w.bytes); });
  refuse_sizes([&](int64_t v) { return w.pack(w.in, v, w.groups, 4, 1, w.memory, w.bytes); });
  refuse_sizes([&](int64_t v) { return w.pack(w.in, w.out, v, 4, 1, w.memory, w.bytes); });
  CHECK(w.pack(w.in, w.out, w.groups, 7, 1, w.memory, w.bytes) == LGQ_BAD_BITS);
  CHECK(w.pack(w.in, w.out, w.groups, 4, 2, w.memory, w.bytes) == LGQ_BAD_VALUE);
  CHECK(w.pack(w.in, w.out, w.groups, 4, 1, nullptr, w.bytes) == LGQ_NULL_POINTER);
  CHECK(w.pack(w.in, w.out, w.groups, 4, 1, w.memory + 4, w.bytes) == LGQ_UNALIGNED);
  for (const int64_t size : {w.bytes - 1, int64_t{0}, int64_t{-1}, INT64_MIN})
    CHECK(w.pack(w.in, w.out, w.groups, 4, 1, w.memory, size) == LGQ_BUFFER_TOO_SMALL);
  lgq_advise_huge_pages(nullptr, 1 << 22);
  lgq_advise_huge_pages(w.memory, -1);
}

void spoil_products(const Weight &w) {
  std::vector<float> x(2 * 96, 1.0f), y(2 * 40), dense(40 * 96);
  const auto matmul = [&](const void *from, int64_t size, int64_t rows, int64_t x_stride, int64_t y_stride) {
    return lgq_matmul(from, size, rows, x.data(), x_stride, nullptr, 0, y.data(), y_stride, LGQ_F32, LGQ_EXACT);
  };
  CHECK(matmul(w.memory, w.bytes, 2, 96, 40) == LGQ_OK);
  CHECK(matmul(w.memory, w.bytes, 0, 96, 40) == LGQ_OK);
  refuse_sizes([&](int64_t v) { return matmul(w.memory, v == INT64_MAX || v == int64_t{1} << 62 ? 0 : v, 2, 96, 40); });
  refuse_sizes([&](int64_t v) { return matmul(w.memory, w.bytes, v, 96, 40); }, true);
  refuse_sizes([&](int64_t v) { return matmul(w.memory, w.bytes, 2, v, 40); });
  refuse_sizes([&](int64_t v) { return matmul(w.memory, w.bytes, 2, 96, v); });
  const auto shared = [&](int32_t count, const lgq_factor *factors, void *const *outputs, int64_t rows, int64_t stride) {
    return lgq_matmul_shared(count, factors, rows, x.data(), stride, outputs, LGQ_F32, LGQ_EXACT);
  };
  const lgq_factor factor{w.memory, w.bytes, nullptr, 0}, broken{w.memory + 8, w.bytes, nullptr, 0};
  void *const outputs[] = {y.data()}, *const no_outputs[] = {nullptr};
  CHECK(shared(1, &factor, outputs, 2, 96) == LGQ_OK);
  CHECK(shared(0, &factor, outputs, 2, 96) == LGQ_BAD_SIZE);
  CHECK(shared(LGQ_MOST_FACTORS + 1, &factor, outputs, 2, 96) == LGQ_BAD_SIZE);
  CHECK(shared(INT32_MIN, &factor, outputs, 2, 96) == LGQ_BAD_SIZE);
  CHECK(shared(1, nullptr, outputs, 2, 96) == LGQ_NULL_POINTER);
  CHECK(shared(1, &factor, nullptr, 2, 96) == LGQ_NULL_POINTER);
  CHECK(shared(1, &factor, no_outputs, 2, 96) == LGQ_NULL_POINTER);
  CHECK(shared(1, &broken, outputs, 2, 96) == LGQ_UNALIGNED);
  refuse_sizes([&](int64_t v) { return shared(1, &factor, outputs, v, 96); }, true);
  refuse_sizes([&](int64_t v) { return shared(1, &factor, outputs, 2, v); });
  // room for the 64 outputs that a damaged count within the block may name
  std::vector<uint8_t> codes(64 * 96);
  std::vector<int32_t> zeros(3 * 64), g_idx(96);
  std::vector<uint16_t> scales(3 * 64);
  int64_t shape[4];
  CHECK(lgq_packed_shape(w.memory, w.bytes, nullptr) == LGQ_NULL_POINTER);
  CHECK(lgq_packed_shape(nullptr, w.bytes, shape) == LGQ_NULL_POINTER);
  CHECK(lgq_dequantize(w.memory, w.bytes, nullptr, LGQ_F32) == LGQ_NULL_POINTER);
  CHECK(lgq_dequantize(w.memory, w.bytes, dense.data(), 3) == LGQ_BAD_DTYPE);
  CHECK(lgq_unpack(w.memory, w.bytes, nullptr, scales.data(), zeros.data(), g_idx.data()) == LGQ_NULL_POINTER);
  CHECK(lgq_unpack(w.memory, w.bytes, codes.data(), nullptr, zeros.data(), g_idx.data()) == LGQ_NULL_POINTER);
  CHECK(lgq_unpack(w.memory, w.bytes, codes.data(), scales.data(), nullptr, g_idx.data()) == LGQ_NULL_POINTER);
  CHECK(lgq_unpack(w.memory, w.bytes, codes.data(), scales.data(), zeros.data(), nullptr) == LGQ_NULL_POINTER);
  // A damaged header is refused or, where the bit says nothing about memory (the zero, its symmetry), still harmless.
  Random random(5);
  for (int trial = 0; trial < 2000; ++trial) {
    char *byte = w.memory + random.below(128);
    const char flip = static_cast<char>(1 << random.below(8)), before = *byte;
    *byte = static_cast<char>(before ^ flip);
    (void)matmul(w.memory, w.bytes, 2, 96, 40);
    (void)lgq_unpack(w.memory, w.bytes, codes.data(), scales.data(), zeros.data(), g_idx.data());
    *byte = before;
  }
}

void spoil_solvers() {
  const int64_t rows = 4, cols = 6, groups = 3;
  std::vector<float> w(24, 0.5f), u(36, 1.0f), scales(12, 0.25f), h(36), importance(6, 1.0f), candidates(24, 0.25f);
  std::vector<int32_t> zeros(24, 8), group = {0, 0, 1, 1, 2, 2}, best_zeros(12);
  std::vector<float> best_scales(12);
  std::vector<uint8_t> codes(24);
  std::vector<double> loss(4), inverse(36, 1.0);
  const auto sweep = [&](int64_t ldw, int64_t ldu, int64_t r, int64_t c, int64_t g, int64_t ldc) {
    return lgq_gptq_sweep(w.data(), ldw, u.data(), ldu, r, c, scales.data(), zeros.data(), g, group.data(), 15, 2,
                          h.data(), codes.data(), ldc, nullptr, 0, loss.data());
  };
  CHECK(sweep(6, 6, rows, cols, groups, 6) == LGQ_OK);
  refuse_sizes([&](int64_t v) { return sweep(v, 6, rows, cols, groups, 6); });
  refuse_sizes([&](int64_t v) { return sweep(6, v, rows, cols, groups, 6); });
  refuse_sizes([&](int64_t v) { return sweep(6, 6, v, cols, groups, 6); });
  refuse_sizes([&](int64_t v) { return sweep(6, 6, rows, v, groups, 6); });
  refuse_sizes([&](int64_t v) { return sweep(6, 6, rows, cols, v, 6); });
  refuse_sizes([&](int64_t v) { return sweep(6, 6, rows, cols, groups, v); });
  const auto gram = [&](int64_t ldh, int64_t ldx, int64_t tokens, int64_t c) {
    return lgq_add_gram(h.data(), ldh, w.data(), ldx, tokens, c, LGQ_F32);
  };
  CHECK(gram(6, 6, 4, 6) == LGQ_OK);
  refuse_sizes([&](int64_t v) { return gram(v, 6, 4, 6); });
  refuse_sizes([&](int64_t v) { return gram(6, v, 4, 6); });
  refuse_sizes([&](int64_t v) { return gram(6, 6, v, 6); });
  refuse_sizes([&](int64_t v) { return gram(6, 6, 4, v); });
  const auto product = [&](int64_t ldm, int64_t ldl, int64_t ldx, int64_t tokens, int64_t c) {
    return lgq_add_product(h.data(), ldm, w.data(), ldl, w.data(), ldx, tokens, c, LGQ_F32);
  };
  CHECK(product(6, 6, 6, 4, 6) == LGQ_OK);
  refuse_sizes([&](int64_t v) { return product(v, 6, 6, 4, 6); });
  refuse_sizes([&](int64_t v) { return product(6, v, 6, 4, 6); });
  refuse_sizes([&](int64_t v) { return product(6, 6, v, 4, 6); });
  refuse_sizes([&](int64_t v) { return product(6, 6, 6, v, 6); });
  refuse_sizes([&](int64_t v) { return product(6, 6, 6, 4, v); });
  const auto obq = [&](int64_t r, int64_t c, int64_t g) {
    return lgq_obq(w.data(), inverse.data(), r, c, scales.data(), zeros.data(), g, group.data(), 15, codes.data(),
                   loss.data());
  };
  refuse_sizes([&](int64_t v) { return obq(v, cols, groups); });
  refuse_sizes([&](int64_t v) { return obq(rows, v, groups); });
  refuse_sizes([&](int64_t v) { return obq(rows, cols, v); });
  const auto search = [&](int64_t ldw, int64_t r, int64_t c, int64_t g, int64_t width, int64_t count, int32_t refits,
                          int32_t max_code, float *best) {
    return lgq_search_grid(w.data(), ldw, r, c, g, width, importance.data(), count, candidates.data(), zeros.data(),
                           refits, max_code, best, best_zeros.data());
  };
  CHECK(search(6, rows, cols, groups, 2, 2, 3, 15, best_scales.data()) == LGQ_OK);
  refuse_sizes([&](int64_t v) { return search(v, rows, cols, groups, 2, 2, 3, 15, best_scales.data()); });
  refuse_sizes([&](int64_t v) { return search(6, v, cols, groups, 2, 2, 3, 15, best_scales.data()); });
  refuse_sizes([&](int64_t v) { return search(6, rows, v, groups, 2, 2, 3, 15, best_scales.data()); });
  refuse_sizes([&](int64_t v) { return search(6, rows, cols, v, 2, 2, 3, 15, best_scales.data()); });
  refuse_sizes([&](int64_t v) { return search(6, rows, cols, groups, v, 2, 3, 15, best_scales.data()); });
  refuse_sizes([&](int64_t v) { return search(6, rows, cols, groups, 2, v, 3, 15, best_scales.data()); });
  CHECK(search(6, rows, cols, groups, 2, 2, -1, 15, best_scales.data()) == LGQ_BAD_VALUE);
  CHECK(search(6, rows, cols, groups, 2, 2, 3, 0, best_scales.data()) == LGQ_BAD_VALUE);
  CHECK(search(6, rows, cols, groups, 2, 2, 3, 15, nullptr) == LGQ_NULL_POINTER);
}

void spoil_refinement() {
  const int64_t rows = 4, cols = 6, groups = 3;
  std::vector<float> w(24, 0.3f), hessian(36, 0.1f), u(12, 0.5f), scales(12, 0.25f);
  for (int64_t i = 0; i < cols; ++i) hessian[i * cols + i] = 1.0f;
  std::vector<int32_t> zeros(12, 2), group = {0, 0, 1, 1, 2, 2}, order = {0, 1, 2, 3, 4, 5};
  std::vector<int64_t> first = {0, 2, 4, 6};
  std::vector<uint8_t> codes(24);
  std::vector<double> gained(4);
  const auto refine = [&](int64_t ldw, int64_t ldh, int64_t r, int64_t c, int64_t blocks, int64_t g, int32_t moves,
                          int32_t max_code, int64_t ldc) {
    return lgq_refine(w.data(), ldw, hessian.data(), ldh, r, c, order.data(), first.data(), blocks, u.data(),
                      group.data(), g, moves, max_code, 2, scales.data(), zeros.data(), codes.data(), ldc,
                      gained.data());
  };
  for (const int32_t moves : {0, 1, 2}) CHECK(refine(6, 6, rows, cols, 3, groups, moves, 3, 6) == LGQ_OK);
  refuse_sizes([&](int64_t v) { return refine(v, 6, rows, cols, 3, groups, 1, 3, 6); });
  refuse_sizes([&](int64_t v) { return refine(6, v, rows, cols, 3, groups, 1, 3, 6); });
  refuse_sizes([&](int64_t v) { return refine(6, 6, v, cols, 3, groups, 1, 3, 6); });
  refuse_sizes([&](int64_t v) { return refine(6, 6, rows, v, 3, groups, 1, 3, 6); });
  refuse_sizes([&](int64_t v) { return refine(6, 6, rows, cols, v, groups, 1, 3, 6); });
  refuse_sizes([&](int64_t v) { return refine(6, 6, rows, cols, 3, v, 1, 3, 6); });
  refuse_sizes([&](int64_t v) { return refine(6, 6, rows, cols, 3, groups, 1, 3, v); });
  CHECK(refine(6, 6, rows, cols, 3, groups, 3, 3, 6) == LGQ_BAD_VALUE);
  CHECK(refine(6, 6, rows, cols, 3, groups, 1, 0, 6) == LGQ_BAD_VALUE);
  CHECK(refine(6, 6, rows, cols, 3, 2, 1, 3, 6) == LGQ_BAD_GROUP);
  order[0] = 1;  // a column twice
  CHECK(refine(6, 6, rows, cols, 3, groups, 1, 3, 6) == LGQ_BAD_VALUE);
  order[0] = -1;
  CHECK(refine(6, 6, rows, cols, 3, groups, 1, 3, 6) == LGQ_BAD_VALUE);
  order[0] = 0;
  first = {0, 2, 3, 6};  // a part of a group
  CHECK(refine(6, 6, rows, cols, 3, groups, 1, 3, 6) == LGQ_BAD_GROUP);
  first = {0, 2, 2, 6};
  CHECK(refine(6, 6, rows, cols, 3, groups, 0, 3, 6) == LGQ_BAD_SIZE);
  first = {0, 2, 4, 7};
  CHECK(refine(6, 6, rows, cols, 3, groups, 0, 3, 6) == LGQ_BAD_SIZE);
  first = {-1, 2, 4, 6};
  CHECK(refine(6, 6, rows, cols, 3, groups, 0, 3, 6) == LGQ_BAD_SIZE);
  CHECK(lgq_refine(nullptr, 6, hessian.data(), 6, rows, cols, order.data(), first.data(), 3, u.data(), group.data(),
                   groups, 1, 3, 0, scales.data(), zeros.data(), codes.data(), 6, gained.data()) == LGQ_NULL_POINTER);
  CHECK(lgq_refine(w.data(), 6, hessian.data(), 6, rows, cols, order.data(), first.data(), 3, u.data(), group.data(),
                   groups, 1, 3, -1, scales.data(), zeros.data(), codes.data(), 6, gained.data()) != LGQ_OK);
}

}  // namespace

void test_hostile() {
  const Weight w;
  spoil_norm();
  spoil_attention();
  spoil_rotation();
  spoil_mlp(w);
  spoil_packing(w);
  spoil_products(w);
  spoil_solvers();
  spoil_refinement();
}
