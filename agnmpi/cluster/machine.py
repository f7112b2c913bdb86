"""What a process sees without MPI: the threads of BLAS, what a launcher has started, the devices that SLURM gave."""

import os
from collections.abc import Callable, Mapping


def limit_blas(threads: int) -> Callable[[], None]:
    """Let BLAS use `threads` threads, unless the environment sets a number; returns what restores its own number."""
    if any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")):
        return lambda: None
    import threadpoolctl

    restore: Callable[[], None] = threadpoolctl.threadpool_limits(threads).restore_original_limits
    return restore


def blas_threads() -> int:
    """Count the threads that BLAS uses here."""
    import threadpoolctl

    return max((int(pool["num_threads"]) for pool in threadpoolctl.threadpool_info()), default=1)


def started(environment: Mapping[str, str] = os.environ) -> str:
    """How many ranks an mpiexec says that it started, this one among them; "" if not several.

    >>> started({"PMI_SIZE": "4"}), started({"PMI_SIZE": "1"}), started({})
    ('4', '', '')
    """
    found = (environment.get(name, "") for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"))
    return next((ranks for ranks in found if ranks not in ("", "0", "1")), "")


def unused_devices(devices: int, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Warn if SLURM allocated GPUs on this node but none can be used; `devices`: how many can.

    >>> unused_devices(4, {"SLURM_GPUS_ON_NODE": "4"}), unused_devices(0, {})
    ([], [])
    """
    allocated = environment.get("SLURM_GPUS_ON_NODE", "")
    if devices or allocated in ("", "0"):
        return []
    return [
        f"WARNING: SLURM gave this job {allocated} GPU(s) on this node, but CuPy finds none: the workers compute on "
        "the CPU; agnmpi doctor says what is missing"
    ]
