"""The vision demo, `qkernels demo --vision`: digits 0 to 4, then 5 to 9, then few bits."""
