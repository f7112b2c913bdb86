"""Memory of any kind: host and device vectors, and the kernels that move them."""
