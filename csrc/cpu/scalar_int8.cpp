// The reference of what happens to int8 codes between convolutions.
#include "cpu/scalar_int8.h"

#include "cpu/rows.h"

namespace qkernels {
namespace scalar {
namespace {

// The windows of an output, and where x has its first element.
struct Place {
  Window z, y, x;
  const int8_t* from;
  int64_t step[3];  // in x, from one element of the window to the next
};

// body(index in y, place) for the outputs of lines [begin, end).
template <class Body>
void for_each_output(const PoolArgs& a, int64_t begin, int64_t end, const Body& body) {
  const int64_t inner = a.channels_last ? a.channels : 1;  // from a pixel to the next
  const int64_t image = a.in[0] * a.in[1] * a.in[2] * inner;
  for (int64_t line = begin; line < end; ++line) {
    const int64_t n = line / (a.out[0] * a.out[1]);
    Place p;
    p.z = pool_window(a, 0, line / a.out[1] % a.out[0]);
    p.y = pool_window(a, 1, line % a.out[1]);
    for (int64_t i = 0; i < a.out[2]; ++i) {
      p.x = pool_window(a, 2, i);
      p.step[0] = p.z.step * a.in[1] * a.in[2] * inner;
      p.step[1] = p.y.step * a.in[2] * inner;
      p.step[2] = p.x.step * inner;
      for (int64_t c = 0; c < inner; ++c) {
        p.from =
            a.x + n * image + ((p.z.first * a.in[1] + p.y.first) * a.in[2] + p.x.first) * inner + c;
        body((line * a.out[2] + i) * inner + c, p);
      }
    }
  }
}

// body(code) for every element of x in a window.
template <class Body>
void for_each_code(const Place& p, const Body& body) {
  for (int64_t z = 0; z < p.z.count; ++z) {
    for (int64_t y = 0; y < p.y.count; ++y) {
      for (int64_t x = 0; x < p.x.count; ++x) {
        body(p.from[z * p.step[0] + y * p.step[1] + x * p.step[2]]);
      }
    }
  }
}

void store(void* data, DType type, int64_t at, float y, float inverse, int zero) {
  if (type == DType::i8) {
    static_cast<int8_t*>(data)[at] =
        static_cast<int8_t>(encode_integer(y, {1.0f, inverse, zero}, -128, 127));
  } else {
    store_float(data, type, at, y);
  }
}

}  // namespace

void max_pool(const PoolArgs& a, int64_t begin, int64_t end) {
  for_each_output(a, begin, end, [&](int64_t at, const Place& place) {
    int8_t most = -128;
    for_each_code(place, [&](int8_t code) { most = code > most ? code : most; });
    static_cast<int8_t*>(a.y)[at] = most;
  });
}

void avg_pool(const PoolArgs& a, int64_t begin, int64_t end) {
  for_each_output(a, begin, end, [&](int64_t at, const Place& place) {
    int32_t sum = 0;
    for_each_code(place, [&](int8_t code) { sum += code - a.x_zero; });
    const float scale = pool_scale(a, place.z, place.y, place.x);
    if (a.y_type == DType::i8) {
      store(a.y, DType::i8, at, static_cast<float>(sum), scale, a.y_zero);
    } else {
      store_float(a.y, a.y_type, at, static_cast<float>(sum) * scale);
    }
  });
}

void add(const AddArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float sum = decode(a.a[i], Format::int8, a.a_scale, a.a_zero) +
                      decode(a.b[i], Format::int8, a.b_scale, a.b_zero);
    store(a.y, a.y_type, i, apply_epilogue(sum, a.epilogue), a.y_inverse, a.y_zero);
  }
}

void lookup(const LookupArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) a.y[i] = a.table[a.x[i] + 128];
}

}  // namespace scalar
}  // namespace qkernels
