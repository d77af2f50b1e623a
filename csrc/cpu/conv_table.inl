// The table's entries for convolutions.
void conv(const ConvArgs& a, int64_t block_begin, int64_t block_end, int64_t pixel_begin,
          int64_t pixel_end) {
  (a.depthwise ? conv_depthwise : conv_dense)(a, block_begin, block_end, pixel_begin, pixel_end);
}

const char* conv_name(bool depthwise) { return depthwise ? W8A8::kDepthwiseName : W8A8::kConvName; }
