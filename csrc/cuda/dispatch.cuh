// From a value at run time to a constant of a kernel's template.
#pragma once

#include <type_traits>

#include "core/format.h"

namespace qkernels::cuda {

// Calls f(std::integral_constant<Format, format>{}).
template <class F>
void for_format(Format format, const F& f) {
  switch (format) {
    case Format::int8:
      return f(std::integral_constant<Format, Format::int8>{});
    case Format::int4:
      return f(std::integral_constant<Format, Format::int4>{});
    case Format::nf4:
      return f(std::integral_constant<Format, Format::nf4>{});
    case Format::int16:
      return f(std::integral_constant<Format, Format::int16>{});
  }
}

// The same of the formats that a packed weight may have.
template <class F>
void for_packed(Format format, const F& f) {
  switch (format) {
    case Format::int8:
      return f(std::integral_constant<Format, Format::int8>{});
    case Format::int4:
      return f(std::integral_constant<Format, Format::int4>{});
    default:
      return f(std::integral_constant<Format, Format::nf4>{});
  }
}

// The same of the three float types.
template <class F>
void for_float(DType type, const F& f) {
  switch (type) {
    case DType::bf16:
      return f(std::integral_constant<DType, DType::bf16>{});
    case DType::f16:
      return f(std::integral_constant<DType, DType::f16>{});
    default:
      return f(std::integral_constant<DType, DType::f32>{});
  }
}

}  // namespace qkernels::cuda
