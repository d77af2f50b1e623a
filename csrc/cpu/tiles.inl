// Which policy multiplies what, for ISAs that have one for each.
template <class Body>
inline auto with_tile(const Layout& layout, Activation activation, const Body& body) {
  const bool is_float = activation == Activation::float_;
  switch (layout.format) {
    case Format::int8:
      return is_float ? body(A16<Format::int8>{}) : body(W8A8{});
    case Format::int4:
      if (is_float) return body(A16<Format::int4>{});
      return layout.symmetric ? body(W4A8{}) : body(LateZero<W4A8>{});
    default:
      return body(A16<Format::nf4>{});
  }
}
