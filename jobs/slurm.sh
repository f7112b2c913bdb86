# Sourced by the batch files: sets $agnmpi, the command that runs agnmpi on the ranks of this job, defines `train`, and
# shows `doctor`.
#   AGNMPI_VENV    the environment     [the active one; else .venv/mpich or .venv/openmpi beside jobs/; else PATH]
#   AGNMPI_LAUNCH  how to start ranks  [mpiexec of the environment; else srun with the --mpi that this MPI speaks]
#   ranks          how many            [the tasks of the job]
set -eu
jobs=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for venv in "${AGNMPI_VENV:-}" "${VIRTUAL_ENV:-}" "$jobs/../.venv/mpich" "$jobs/../.venv/openmpi"; do
    [ -n "$venv" ] || continue
    [ -x "$venv/bin/python3" ] && export PATH="$venv/bin:$PATH" && break
    [ "$venv" != "${AGNMPI_VENV:-}" ] || { echo "AGNMPI_VENV: there is no $venv/bin/python3" >&2; exit 2; }
done

# mpi4py's MPI decides; it is asked without MPI_Init, which has no place in the batch shell.
library=$(MPI4PY_RC_INITIALIZE=0 python3 -c 'from mpi4py import MPI; print(MPI.Get_library_version()[:8])')
case $library in
    "Open MPI") mpi=openmpi speaks=pmix ;;
    *) mpi=mpich speaks=pmi2 ;;
esac
. "$jobs/env-$mpi.sh"

ranks=${ranks:-${SLURM_NTASKS:?submit this with sbatch}}
if [ -n "${AGNMPI_LAUNCH:-}" ]; then
    launch=($AGNMPI_LAUNCH -n "$ranks")
elif command -v mpiexec >/dev/null; then
    launch=(mpiexec -n "$ranks")
else
    srun --mpi=list 2>&1 | grep -qw "$speaks" ||
        { echo "no mpiexec on PATH, and srun offers no --mpi=$speaks: load your cluster's MPI module" >&2; exit 2; }
    launch=(srun "--mpi=$speaks" "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}" -n "$ranks")
fi
agnmpi=("${launch[@]}" python3 -m agnmpi)

echo "$(date '+%F %T') job $SLURM_JOB_ID on $SLURM_JOB_NODELIST: ${agnmpi[*]}"
"${agnmpi[@]}" doctor || {
    echo "agnmpi doctor failed under: ${launch[*]}. Unset AGNMPI_LAUNCH to use mpiexec; MPICH speaks srun --mpi=pmi2," \
        "Open MPI srun --mpi=pmix (srun --mpi=list shows what there is)" >&2
    exit 1
}

# train RUN [options of agnmpi train]: as `agnmpi train --run-dir RUN`. If a rank leaves by exit(0), mpiexec may say 0
# without a result (MPICH 5.0 now and then; Open MPI 5.0 where all are killed at once): that is a failure, too.
train() {
    local run=$1
    shift
    "${agnmpi[@]}" train --run-dir "$run" "$@"
    [ -e "$run/result.json" ] || [ ! -d "$run" ] || # a --run-dir of your own: only the exit code counts
        { echo "mpiexec says 0, but there is no $run/result.json: the run broke off; --resume $run" >&2; exit 1; }
}
