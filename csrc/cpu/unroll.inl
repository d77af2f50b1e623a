// Loops that are gone before the compiler assigns registers: arrays of vectors indexed by constants
// become registers, which GCC does not do for an ordinary loop around intrinsics.
#define INLINE __attribute__((always_inline))

template <class Body, int... Index>
SIMD void unroll_over(std::integer_sequence<int, Index...>, Body body) {
  (body(std::integral_constant<int, Index>{}), ...);
}
// body(0) ... body(Count - 1); the index is a constant.
template <int Count, class Body>
SIMD void unroll(Body body) {
  unroll_over(std::make_integer_sequence<int, Count>{}, body);
}
