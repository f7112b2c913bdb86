# What must be shown on a GPU beside the tests marked gpu: functions step_NAME, and the names of those to run first.
# Sourced by a kit that provides `ran TITLE` (a heading) and `lim SECONDS COMMAND…` (a time limit).
AGNMPI_GPU_STEPS="reductions encodings torch"

step_reductions() { # one pass over memory each; and is CuPy's own ReductionKernel slower, as arrays/device_kernels.py says?
    ran "reductions against half a copy"
    lim 60 python tests/support/gpu_reductions.py
}

step_encodings() { # the host's bytes; and is int8, encoded before the copy, staged at least twice as fast as float32?
    ran "encodings against a copy, and staged"
    lim 60 python tests/support/gpu_encodings.py
}

step_torch() { # the numbers of the CPU, on a side stream and in bfloat16; and at most 0.1 ms more a step?
    ran "PyTorch, one process, then a center and a worker"
    lim 60 python tests/support/gpu_torch.py
    lim 60 mpiexec -n 2 python tests/support/gpu_torch.py
}
