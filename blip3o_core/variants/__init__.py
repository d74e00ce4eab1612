"""Published families, one file each: which tensors are which network, how sizes are read."""
