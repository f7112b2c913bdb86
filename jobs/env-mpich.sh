# Settings for MPICH and Intel MPI; source it: . jobs/env-mpich.sh
export HYDRA_BINDING=${HYDRA_BINDING:-none} # agnmpi shares out the cores
export I_MPI_PIN=${I_MPI_PIN:-off}          # the same of Intel MPI
