"""The vision demo, `qkernels demo --vision`: from digits 0 to 4 to digits 5 to 9, then to few bits."""
