// Sums and functions of int8 codes. Every result is that of scalar_int8.cpp to the bit.

// ---- Sums ---------------------------------------------------------------------------------------

template <class Body>
SIMD void with_epilogue(Epilogue epilogue, const Body& body) {
  switch (epilogue) {
    case Epilogue::none:
      return body(std::integral_constant<Epilogue, Epilogue::none>{});
    case Epilogue::relu:
      return body(std::integral_constant<Epilogue, Epilogue::relu>{});
    case Epilogue::gelu:
      return body(std::integral_constant<Epilogue, Epilogue::gelu>{});
    case Epilogue::gelu_tanh:
      return body(std::integral_constant<Epilogue, Epilogue::gelu_tanh>{});
    case Epilogue::silu:
      return body(std::integral_constant<Epilogue, Epilogue::silu>{});
    case Epilogue::relu6:
      return body(std::integral_constant<Epilogue, Epilogue::relu6>{});
    case Epilogue::hardswish:
      break;
  }
  body(std::integral_constant<Epilogue, Epilogue::hardswish>{});
}

struct Summands {
  Decoder<Format::int8> a, b;
};

template <Epilogue E, class... Count>
SIMD F sum_at(const AddArgs& args, const Summands& s, int64_t i, Count... count) {
  const F a = decode(s.a, load_i8(args.a + i, count...));
  return activate<E>(add(a, decode(s.b, load_i8(args.b + i, count...))));
}

template <Epilogue E>
void add_codes(const AddArgs& args, int64_t begin, int64_t end) {
  constexpr int kBytes = 4 * kWidth;
  const Summands s{make_decoder<Format::int8>(args.a_scale, args.a_zero),
                   make_decoder<Format::int8>(args.b_scale, args.b_zero)};
  const Encoder<Format::int8> e = make_encoder<Format::int8>(args.y_inverse, args.y_zero, false);
  int8_t* y = static_cast<int8_t*>(args.y);
  int64_t i = begin;
  // No function makes a number larger. As long as no quotient comes near the ends of int32, codes
  // need to be brought into range but once, on their way to bytes.
  const double most = 255.0 * (static_cast<double>(args.a_scale) + args.b_scale);
  if (most * args.y_inverse < 0x1p30) {
    for (; i + kBytes <= end; i += kBytes) {
      I codes[4];
      unroll<4>([&](int v) INLINE {
        codes[v] = encode_tame<Format::int8, false>(e, sum_at<E>(args, s, i + v * kWidth));
      });
      store_all(y + i, narrow(codes[0], codes[1], codes[2], codes[3]));
    }
  }
  for (; i + kWidth <= end; i += kWidth) store_i8(y + i, encode(e, sum_at<E>(args, s, i)));
  if (i < end) {
    const int count = static_cast<int>(end - i);
    store_i8(y + i, encode(e, sum_at<E>(args, s, i, count)), count);
  }
}

template <DType Y, Epilogue E>
void add_floats(const AddArgs& args, int64_t begin, int64_t end) {
  const Summands s{make_decoder<Format::int8>(args.a_scale, args.a_zero),
                   make_decoder<Format::int8>(args.b_scale, args.b_zero)};
  int64_t i = begin;
  for (; i + kWidth <= end; i += kWidth) store_as<Y>(args.y, i, sum_at<E>(args, s, i));
  if (i < end) {
    const int count = static_cast<int>(end - i);
    store_as<Y>(args.y, i, sum_at<E>(args, s, i, count), count);
  }
}

// ---- Table entries ------------------------------------------------------------------------------

void add(const AddArgs& args, int64_t begin, int64_t end) {
  with_epilogue(args.epilogue, [&](auto epilogue) INLINE {
    constexpr Epilogue kEpilogue = decltype(epilogue)::value;
    if (args.y_type == DType::i8) return add_codes<kEpilogue>(args, begin, end);
    with_float_type(args.y_type, [&](auto type) {
      add_floats<decltype(type)::value, kEpilogue>(args, begin, end);
    });
  });
}

void lookup(const LookupArgs& a, int64_t begin, int64_t end) {
  constexpr int kBytes = 4 * kWidth;
  // A code's own bits are the index, so negative codes come last.
  alignas(64) uint8_t entries[256];
  std::memcpy(entries, a.table + 128, 128);
  std::memcpy(entries + 128, a.table, 128);
  const Table256 table = table256(entries);
  const int8_t* x = a.x;
  int8_t* y = a.y;
  int64_t i = begin;
  for (; i + kBytes <= end; i += kBytes) store_all(y + i, lookup(table, load_all(x + i)));
  if (i < end) {
    const int count = static_cast<int>(end - i);
    store_all(y + i, lookup(table, load_all(x + i, count)), count);
  }
}
