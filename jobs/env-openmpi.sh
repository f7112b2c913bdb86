# Settings for Open MPI 4 and 5; source it: . jobs/env-openmpi.sh
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1          # containers run as root
export PRTE_MCA_rmaps_default_mapping_policy=${PRTE_MCA_rmaps_default_mapping_policy:-slot:oversubscribe} # more ranks than cores; without "slot" all go to the first node
export PRTE_MCA_hwloc_default_binding_policy=${PRTE_MCA_hwloc_default_binding_policy:-none}           # agnmpi shares out the cores
export OMPI_MCA_rmaps_base_oversubscribe=${OMPI_MCA_rmaps_base_oversubscribe:-1}                      # the same two of Open MPI 4
export OMPI_MCA_hwloc_base_binding_policy=${OMPI_MCA_hwloc_base_binding_policy:-none}
export OMPI_MCA_mpi_yield_when_idle=1                                     # blocking calls give the core away
export OMPI_MCA_osc=${OMPI_MCA_osc:-^ucx}                                 # else: "priority set inside component query failed"
export OMPI_MCA_osc_rdma_priority=${OMPI_MCA_osc_rdma_priority:-99}       # Open MPI 4: below osc/sm; its Get of 4 MB within a host takes 5 times as long
export OMPI_MCA_osc_rdma_buffer_size=${OMPI_MCA_osc_rdma_buffer_size:-16777216} # default 32 KiB: 6-12 Mbit/s over TCP
