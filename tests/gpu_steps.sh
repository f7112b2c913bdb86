# What must be shown on a GPU beside the tests marked gpu: functions step_NAME, and the names of those to run first.
# Sourced by a kit that provides `ran TITLE` (a heading) and `lim SECONDS COMMAND…` (a time limit).
AGNMPI_GPU_STEPS="reductions"

step_reductions() { # one pass over memory each; and is CuPy's own ReductionKernel slower, as arrays/device_kernels.py says?
    ran "reductions against half a copy"
    lim 60 python tests/support/gpu_reductions.py
}
