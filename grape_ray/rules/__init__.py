"""Pure tensor functions, one file a layer type: what its per-example gradient is made of."""
