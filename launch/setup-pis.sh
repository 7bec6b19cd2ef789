#!/usr/bin/env bash
# Makes the hosts of a hostfile like this computer: code, virtual environment and, if named, a model, at the same paths, over ssh.
# Use: bash launch/setup-pis.sh HOSTFILE [MODEL.halo] [--spread] [--verify] [--dry-run]; --help tells more.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/pis.py" "$@"
