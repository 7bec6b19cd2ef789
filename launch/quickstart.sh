#!/usr/bin/env bash
# Sets halo_mpi up in .venv, gets and converts the demo model, and generates text on four local ranks.
# Arguments go to generate, for example: bash launch/quickstart.sh --prompt "Why is the sky blue?" --max-tokens 60
set -euo pipefail
# shellcheck source=launch/setup-venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup-venv.sh"
# shellcheck source=launch/demo-model.sh
source "$root/launch/demo-model.sh"

setup_venv ""
get_demo_gguf

model="$root/models/smollm2-135m.halo"
if [ ! -e "$model" ]; then
    say "converting the demo model to models/smollm2-135m.halo"
    "$venv/bin/python" -m halo_mpi.convert "$demo_gguf" "$model" --shards 4
fi
if ! "$venv/bin/python" -m halo_mpi.inspect "$model" --json | grep '"calibration": {' > /dev/null; then
    say "calibrating the demo model, so that --sync relaxed knows what matters (a minute on a PC, more on a Pi; Ctrl-C is safe)"
    "$venv/bin/python" -m halo_mpi.calibrate "$model" --tokens 16000
fi

prompt=(--prompt "Explain in three sentences what a Raspberry Pi is.")
for argument in "$@"; do
    case $argument in
        --prompt | --prompt=* | --prompt-file | --prompt-file=* | --prompts | --prompts=*) prompt=() ;;
    esac
done
say "generating on 4 local ranks"
exec "$root/launch/halo-mpirun" -n 4 python -m halo_mpi.generate --placement importance --model "$model" --chat "${prompt[@]}" "$@"
