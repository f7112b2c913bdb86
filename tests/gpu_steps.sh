# What must be shown on a GPU beside the tests marked gpu: functions step_NAME, and the names of those to run first.
# Sourced by a kit that provides `ran TITLE` (a heading), `lim SECONDS COMMAND…` (a time limit) and, in the array `ucx`,
# the environment of Open MPI over UCX with CUDA.
AGNMPI_GPU_STEPS="reductions encodings torch jax direct"

step_reductions() { # at most 2.5 times as long as half a copy?
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

step_jax() { # at most 0.05 ms more a step?
    ran "JAX: outside of exchanges, and a training"
    XLA_PYTHON_CLIENT_PREALLOCATE=false lim 60 python tests/support/framework_overhead.py jax
    XLA_PYTHON_CLIENT_PREALLOCATE=false lim 60 mpiexec -n 3 python examples/jax_digits.py
}

step_direct() { # device pointers over UCX: messages, the center on the GPU, and windows, which must be UCX's, too
    local digits=(mpiexec -n 4 python -m agnmpi train examples/digits.py:Digits --epochs 30 --period 3 --device gpu)
    ran "doctor"; lim 40 env "${ucx[@]}" python -m agnmpi doctor
    ran "p2p"; lim 40 env "${ucx[@]}" "${digits[@]}" --run-dir "$out/direct-p2p"
    ran "p2p, the center on the GPU"; lim 40 env "${ucx[@]}" "${digits[@]}" --center-device gpu --run-dir "$out/direct-center"
    ran "rma"; lim 40 env "${ucx[@]}" OMPI_MCA_osc=ucx python -m agnmpi doctor
    lim 40 env "${ucx[@]}" OMPI_MCA_osc=ucx "${digits[@]}" --transport rma --run-dir "$out/direct-rma"
    ran "bench"
    lim 60 env "${ucx[@]}" OMPI_MCA_osc=ucx mpiexec -n 2 python -m agnmpi bench --device gpu --sizes 1000000 100000000 \
        --transports p2p rma --optimizer-size 0 --quiet 0 --rounds 10
}
