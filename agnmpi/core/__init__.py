"""The algorithm: NumPy alone, no MPI."""
