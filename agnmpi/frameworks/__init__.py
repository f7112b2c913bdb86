"""Doors for frameworks: a model of PyTorch or JAX, trained by its own optimizer in its own loop."""
