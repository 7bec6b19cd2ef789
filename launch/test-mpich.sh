#!/usr/bin/env bash
# Runs the main MPI tests under MPICH instead of Open MPI, in a virtual environment of its own, .venv-mpich.
# Arguments go to pytest; without any, the tests of ranks, failures, generate, halo-mpirun and restarts run.
set -euo pipefail
# shellcheck source=launch/setup-venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup-venv.sh"

venv="$root/.venv-mpich"
if [ ! -e "$venv/complete" ]; then
    python=$(find_python)
    check_python "$python"
    "$python" -m venv "$venv"
    warn_of_cuda
    install setuptools
    (cd "$root" && install --no-build-isolation -e ".[test,mpich]")
    touch "$venv/complete"
fi
[ $# -gt 0 ] || set -- tests/test_{ranks,failures,generate,halo_mpirun,halo_mpirun_runs,restart}.py
cd "$root"
PATH="$venv/bin:$PATH" exec "$venv/bin/python" -m pytest "$@"
