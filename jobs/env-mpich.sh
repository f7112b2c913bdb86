# Settings for MPICH 5; source it: . jobs/env-mpich.sh
export HYDRA_BINDING=${HYDRA_BINDING:-none} # agnmpi shares out the cores
