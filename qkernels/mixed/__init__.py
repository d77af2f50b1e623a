"""Mixed precision: which layer gets which scheme, by what it costs and what it gains."""
