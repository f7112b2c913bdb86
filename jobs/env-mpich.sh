# Settings for MPICH and Intel MPI; source it: . jobs/env-mpich.sh
export HYDRA_BINDING=${HYDRA_BINDING:-none} # agnmpi shares out the cores
export I_MPI_PIN=${I_MPI_PIN:-off}          # the same of Intel MPI
export MPIR_CVAR_POLLS_BEFORE_YIELD=${MPIR_CVAR_POLLS_BEFORE_YIELD:-1} # default 1000: with more ranks than cores, MPICH 4.0's windows take 1.3 times as long
