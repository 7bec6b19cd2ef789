#!/usr/bin/env bash
# Sets halo_mpi up in .venv with the packages for its tests, gets the demo model, and runs the tests.
# Arguments go to pytest, for example: bash launch/test.sh tests/test_halo_mpirun.py -k hostfile
set -euo pipefail
# shellcheck source=launch/setup-venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup-venv.sh"
# shellcheck source=launch/demo-model.sh
source "$root/launch/demo-model.sh"

setup_venv test
get_demo_gguf
cd "$root"
[ $# -eq 0 ] || exec "$venv/bin/python" -m pytest "$@"
# Tests without ranks run in a process per core; those with ranks have all cores to themselves.
failed=0
"$venv/bin/python" -m pytest -m "not slow and not mpi and not lab" --numprocesses auto --dist worksteal || failed=$?
"$venv/bin/python" -m pytest -m "not slow and (mpi or lab)" || failed=$?
exit "$failed"
