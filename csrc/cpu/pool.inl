// Pooling of int8 codes. Every result is that of scalar_int8.cpp to the bit.

// ---- Windows over images with the channels innermost --------------------------------------------
// A vector holds channels. Four vectors are worked on at a time, of one pixel or of neighbours.

// Output pixels, one behind the other, whose windows have the same elements.
struct PoolRun {
  const int8_t* x;       // first element of the first window, channel 0
  int64_t pixels, next;  // from a window to the next
  int64_t count[3], step[3];
  int64_t to;  // index in y
  float scale;

  int64_t elements() const { return count[0] * count[1] * count[2]; }
};

// The pixels from `at` on of a line that have the same windows as `at`: all that leave no border.
inline int64_t run_length(const PoolArgs& a, int64_t at, const Window& w) {
  if (a.adaptive || w.count < a.kernel[2] || w.size < a.kernel[2]) return 1;
  const int64_t last = a.in[2] - (a.kernel[2] - 1) * a.dilation[2] - 1;  // first element
  const int64_t length = (last - w.first) / a.stride[2] + 1;
  return length < a.out[2] - at ? length : a.out[2] - at;
}

template <class Body>
SIMD void for_each_run(const PoolArgs& a, int64_t begin, int64_t end, const Body& body) {
  const int64_t row = a.in[2] * a.channels;
  for (int64_t line = begin; line < end; ++line) {
    const int64_t n = line / (a.out[0] * a.out[1]);
    const Window z = pool_window(a, 0, line / a.out[1] % a.out[0]);
    const Window y = pool_window(a, 1, line % a.out[1]);
    const int8_t* from = a.x + ((n * a.in[0] + z.first) * a.in[1] + y.first) * row;
    PoolRun run;
    for (int64_t i = 0; i < a.out[2]; i += run.pixels) {
      const Window x = pool_window(a, 2, i);
      run = {from + x.first * a.channels,
             run_length(a, i, x),
             a.stride[2] * a.channels,
             {z.count, y.count, x.count},
             {z.step * a.in[1] * row, y.step * row, x.step * a.channels},
             (line * a.out[2] + i) * a.channels,
             pool_scale(a, z, y, x)};
      body(run);
    }
  }
}

// body(offset of the first element) for the rows of a window.
template <class Body>
SIMD void for_each_row(const PoolRun& run, const Body& body) {
  for (int64_t z = 0; z < run.count[0]; ++z) {
    for (int64_t y = 0; y < run.count[1]; ++y) body(z * run.step[0] + y * run.step[1]);
  }
}
// body(offset) for the elements of a window.
template <class Body>
SIMD void for_each_element(const PoolRun& run, const Body& body) {
  for_each_row(run, [&](int64_t offset) INLINE {
    for (int64_t x = 0; x < run.count[2]; ++x, offset += run.step[2]) body(offset);
  });
}

// Vectors of channels: where the window of the first begins and its index in y, and the steps from
// one to the next.
constexpr int kUnits = 4;
struct PoolUnits {
  const int8_t* x;
  int64_t x_step;
  int64_t to, to_step;
};

// Calls tile(units, count) until all channels of all pixels of a run are done, `Width` of them in a
// unit. The last unit of a pixel may begin earlier instead of being short.
template <int Width, class Tile>
SIMD void for_each_unit(const PoolArgs& a, const PoolRun& run, const Tile& tile) {
  const auto strip = [&](int64_t x, int64_t to, int64_t count, int64_t x_step, int64_t to_step)
                         INLINE {
                           PoolUnits units{run.x + x, x_step, run.to + to, to_step};
                           int64_t i = 0;
                           for (; i + kUnits <= count; i += kUnits) {
                             tile(units, std::integral_constant<int, kUnits>{});
                             units.x += kUnits * x_step;
                             units.to += kUnits * to_step;
                           }
                           for (; i < count; ++i) {
                             tile(units, std::integral_constant<int, 1>{});
                             units.x += x_step;
                             units.to += to_step;
                           }
                         };
  const int64_t channels = a.channels, whole = channels / Width;
  if (whole < kUnits) {
    for (int64_t i = 0; i < whole; ++i) {
      strip(i * Width, i * Width, run.pixels, run.next, channels);
    }
  } else {
    for (int64_t i = 0; i < run.pixels; ++i) {
      strip(i * run.next, i * channels, whole, Width, Width);
    }
  }
  if (channels % Width != 0) {
    strip(channels - Width, channels - Width, run.pixels, run.next, channels);
  }
}

// ---- The largest --------------------------------------------------------------------------------

SIMD void raise(int8_t* most, const int8_t* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) most[i] = x[i] > most[i] ? x[i] : most[i];
}

void max_run(const PoolArgs& a, const PoolRun& run) {
  constexpr int kBytes = 4 * kWidth;
  int8_t* y = static_cast<int8_t*>(a.y);
  if (a.channels < kBytes) {
    for (int64_t pixel = 0; pixel < run.pixels; ++pixel) {
      int8_t most[kBytes];
      std::memset(most, -128, sizeof(most));
      for_each_element(run, [&](int64_t offset) INLINE {
        raise(most, run.x + pixel * run.next + offset, a.channels);
      });
      std::memcpy(y + run.to + pixel * a.channels, most, static_cast<size_t>(a.channels));
    }
    return;
  }
  for_each_unit<kBytes>(a, run, [&](const PoolUnits& units, auto count) INLINE {
    constexpr int kCount = decltype(count)::value;
    I most[kCount];
    unroll<kCount>([&](int u) INLINE { most[u] = splat(static_cast<int32_t>(0x80808080)); });
    for_each_element(run, [&](int64_t offset) INLINE {
      unroll<kCount>([&](int u) INLINE {
        most[u] = max_bytes(most[u], load_all(units.x + u * units.x_step + offset));
      });
    });
    unroll<kCount>([&](int u) INLINE { store_all(y + units.to + u * units.to_step, most[u]); });
  });
}

// ---- Means --------------------------------------------------------------------------------------

// kWidth sums as elements of y, or the first `count` of them.
template <class... Count>
SIMD void store_means(const PoolArgs& a, int64_t to, I sums, F scale, Count... count) {
  const F y = mul(to_float(sums), scale);
  if (a.y_type == DType::i8) {
    const Encoder<Format::int8> e = make_encoder<Format::int8>(1.0f, a.y_zero, false);
    store_i8(static_cast<int8_t*>(a.y) + to, encode(e, y), count...);
  } else {
    with_float_type(
        a.y_type, [&](auto type) INLINE { store_as<decltype(type)::value>(a.y, to, y, count...); });
  }
}

SIMD void accumulate(int32_t* sums, const int8_t* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sums[i] += x[i];
}

// So many codes fit a sum of 16 bits: 256 * -128 = -2^15.
constexpr int64_t kWordSum = 256;

void mean_run(const PoolArgs& a, const PoolRun& run) {
  constexpr int kWords = 2 * kWidth;
  const I zeros = splat(static_cast<int32_t>(-a.x_zero * run.elements()));
  const F scale = splat(run.scale);
  if (a.channels < kWords) {
    const int channels = static_cast<int>(a.channels);
    for (int64_t pixel = 0; pixel < run.pixels; ++pixel) {
      int32_t sums[kWords] = {};
      for_each_element(run, [&](int64_t offset) INLINE {
        accumulate(sums, run.x + pixel * run.next + offset, channels);
      });
      for (int c = 0; c < channels; c += kWidth) {
        const int count = channels - c < kWidth ? channels - c : kWidth;
        store_means(a, run.to + pixel * channels + c, add(load(sums + c), zeros), scale, count);
      }
    }
    return;
  }
  for_each_unit<kWords>(a, run, [&](const PoolUnits& units, auto count) INLINE {
    constexpr int kCount = decltype(count)::value;
    I words[kCount], first[kCount], last[kCount];
    const auto clear = [&]() INLINE { unroll<kCount>([&](int u) INLINE { words[u] = splat(0); }); };
    const auto sum_up = [&](int64_t offset, int64_t elements) INLINE {
      for (int64_t x = 0; x < elements; ++x, offset += run.step[2]) {
        unroll<kCount>([&](int u) INLINE {
          words[u] = add_words(words[u], load_words(units.x + u * units.x_step + offset));
        });
      }
    };
    const auto widen = [&]() INLINE {
      unroll<kCount>([&](int u) INLINE {
        first[u] = add(first[u], first_words(words[u]));
        last[u] = add(last[u], last_words(words[u]));
      });
    };
    unroll<kCount>([&](int u) INLINE { first[u] = last[u] = zeros; });
    if (run.elements() <= kWordSum) {
      clear();
      for_each_row(run, [&](int64_t offset) INLINE { sum_up(offset, run.count[2]); });
      widen();
    } else {
      for_each_row(run, [&](int64_t offset) INLINE {
        for (int64_t x = 0; x < run.count[2]; x += kWordSum) {
          const int64_t left = run.count[2] - x;
          clear();
          sum_up(offset + x * run.step[2], left < kWordSum ? left : kWordSum);
          widen();
        }
      });
    }
    unroll<kCount>([&](int u) INLINE {
      const int64_t to = units.to + u * units.to_step;
      store_means(a, to, first[u], scale);
      store_means(a, to + kWidth, last[u], scale);
    });
  });
}

// ---- Windows over images with the pixels innermost ----------------------------------------------
// First down the columns of all rows that a line of y needs, where neighbours in memory go side by
// side, then along the row that comes of it.

constexpr int64_t kSpan = 2048;  // columns of x at a time

// body(outputs, columns) for pieces of a line of y and the columns of x that they need, at most
// kSpan; columns outside of x count too. False if a single output needs more.
template <class Body>
SIMD bool for_each_span(const PoolArgs& a, const Body& body) {
  const int64_t widest =
      a.adaptive ? a.in[2] / a.out[2] + 2 : (a.kernel[2] - 1) * a.dilation[2] + 1;
  if (widest > kSpan) return false;
  const int64_t most = a.adaptive ? kSpan / widest : (kSpan - widest) / a.stride[2] + 1;
  for (int64_t at = 0; at < a.out[2]; at += most) {
    const int64_t end = at + most < a.out[2] ? at + most : a.out[2];
    if (a.adaptive) {
      const Window last = pool_window(a, 2, end - 1);
      body(Span{at, end}, Span{pool_window(a, 2, at).first, last.first + last.count});
    } else {
      const int64_t column = at * a.stride[2] - a.before[2];
      body(Span{at, end}, Span{column, column + (end - 1 - at) * a.stride[2] + widest});
    }
  }
  return true;
}

// Where a row of x starts, and the windows of a line of y in the other dimensions.
struct PoolLine {
  Window z, y;
  const int8_t* x;
};
inline PoolLine pool_line(const PoolArgs& a, int64_t line) {
  const int64_t plane = line / (a.out[0] * a.out[1]);
  const Window z = pool_window(a, 0, line / a.out[1] % a.out[0]);
  const Window y = pool_window(a, 1, line % a.out[1]);
  return {z, y, a.x + ((plane * a.in[0] + z.first) * a.in[1] + y.first) * a.in[2]};
}

// body(column, row of x from there, count): the part of columns [begin, end) that lies in x.
template <class Body>
SIMD void for_each_row(const PoolArgs& a, const PoolLine& line, Span columns, const Body& body) {
  const int64_t begin = columns.begin < 0 ? 0 : columns.begin;
  const int64_t end = columns.end < a.in[2] ? columns.end : a.in[2];
  for (int64_t z = 0; z < line.z.count; ++z) {
    for (int64_t y = 0; y < line.y.count; ++y) {
      const int64_t row = (z * line.z.step * a.in[1] + y * line.y.step) * a.in[2];
      body(begin - columns.begin, line.x + row + begin, end - begin);
    }
  }
}

// Along a row: step(result of output o, value) for all values in the windows.
template <class T, class Step>
SIMD void along(const PoolArgs& a, Span outputs, int64_t first_column, const T* row, T* result,
                const Step& step) {
  const int64_t count = outputs.end - outputs.begin;
  if (a.adaptive) {
    for (int64_t i = 0; i < count; ++i) {
      const Window w = pool_window(a, 2, outputs.begin + i);
      for (int64_t j = 0; j < w.count; ++j) step(&result[i], row[w.first - first_column + j]);
    }
    return;
  }
  for (int64_t tap = 0; tap < a.kernel[2]; ++tap) {
    const T* from = row + tap * a.dilation[2];
    if (a.stride[2] == 1) {
      for (int64_t i = 0; i < count; ++i) step(&result[i], from[i]);
    } else if (a.stride[2] == 2) {
      for (int64_t i = 0; i < count; ++i) step(&result[i], from[2 * i]);
    } else {
      for (int64_t i = 0; i < count; ++i) step(&result[i], from[a.stride[2] * i]);
    }
  }
}

bool max_line(const PoolArgs& a, int64_t at) {
  const PoolLine line = pool_line(a, at);
  return for_each_span(a, [&](Span outputs, Span columns) INLINE {
    int8_t row[kSpan];
    std::memset(row, -128, static_cast<size_t>(columns.end - columns.begin));
    for_each_row(a, line, columns, [&](int64_t column, const int8_t* x, int64_t count) INLINE {
      raise(row + column, x, count);
    });
    int8_t* y = static_cast<int8_t*>(a.y) + at * a.out[2] + outputs.begin;
    std::memset(y, -128, static_cast<size_t>(outputs.end - outputs.begin));
    along(a, outputs, columns.begin, row, y,
          [](int8_t* most, int8_t x) INLINE { *most = x > *most ? x : *most; });
  });
}

bool mean_line(const PoolArgs& a, int64_t at) {
  const PoolLine line = pool_line(a, at);
  return for_each_span(a, [&](Span outputs, Span columns) INLINE {
    const int64_t count = outputs.end - outputs.begin;
    int32_t row[kSpan], sums[kSpan + kWidth];
    float scale[kSpan + kWidth];
    const auto clear = [](void* numbers, int64_t count)
                           INLINE { std::memset(numbers, 0, static_cast<size_t>(count) * 4); };
    clear(row, columns.end - columns.begin);
    clear(sums, count + kWidth);
    clear(scale + count, kWidth);
    for_each_row(a, line, columns, [&](int64_t column, const int8_t* x, int64_t length) INLINE {
      for (int64_t i = 0; i < length; ++i) row[column + i] += x[i] - a.x_zero;
    });
    along(a, outputs, columns.begin, row, sums, [](int32_t* sum, int32_t x) INLINE { *sum += x; });
    Window last{-1, -1, 0, -1};
    for (int64_t i = 0; i < count; ++i) {
      const Window w = pool_window(a, 2, outputs.begin + i);
      const bool same = w.count == last.count && w.size == last.size;
      scale[i] = same ? scale[i - 1] : pool_scale(a, line.z, line.y, w);
      last = w;
    }
    const int64_t to = at * a.out[2] + outputs.begin;
    for (int64_t i = 0; i < count; i += kWidth) {
      const int64_t left = count - i;
      if (left >= kWidth) {
        store_means(a, to + i, load(sums + i), load(scale + i));
      } else {
        store_means(a, to + i, load(sums + i), load(scale + i), static_cast<int>(left));
      }
    }
  });
}

// ---- Table entries ------------------------------------------------------------------------------

void max_pool(const PoolArgs& a, int64_t begin, int64_t end) {
  if (a.channels_last) {
    return for_each_run(a, begin, end, [&](const PoolRun& run) INLINE { max_run(a, run); });
  }
  for (int64_t line = begin; line < end; ++line) {
    if (!max_line(a, line)) scalar_kernels()->max_pool(a, line, line + 1);
  }
}

void avg_pool(const PoolArgs& a, int64_t begin, int64_t end) {
  if (a.channels_last) {
    return for_each_run(a, begin, end, [&](const PoolRun& run) INLINE { mean_run(a, run); });
  }
  for (int64_t line = begin; line < end; ++line) {
    if (!mean_line(a, line)) scalar_kernels()->avg_pool(a, line, line + 1);
  }
}
