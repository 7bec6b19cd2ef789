# shellcheck shell=bash
# Sourced by the job scripts in launch/slurm and launch/pbs: halo_mpi on the hosts of a job, so that it ends in order before the time limit.

HOSTS=$(mktemp "${TMPDIR:-/tmp}/halo-hosts-XXXXXX")
trap 'rm -f "$HOSTS"' EXIT

# Standard input: host names, as often as each has ranks. They become a hostfile in which the host of this script, which has rank 0, is first.
take_hosts() {
    awk '{ if (!count[$1]++) names[++n] = $1 } END { for (i = 1; i <= n; i++) print names[i], "slots=" count[names[i]] }' >"$HOSTS"
    [ -s "$HOSTS" ] || { echo "halo_mpi: the job has no hosts" >&2; exit 1; }
}

take_slurm_hosts() {
    scontrol show hostnames "$SLURM_JOB_NODELIST" |
        awk -v ranks="${SLURM_NTASKS_PER_NODE:-1}" '{ for (i = 0; i < ranks; i++) print }' | take_hosts
}

# This job, or this task of an array: the number of an array's last task means the whole array.
slurm_job() { echo "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}" | grep . || echo "$SLURM_JOB_ID"; }

# Sets WORK_S so that the work ends BEFORE_END seconds (60) before the job's time limit. Slurm's own --signal came 20 s late in tests, and once,
# after the job had been queued again, not at all.
mind_slurms_limit() {
    local end
    end=$(scontrol -o show job "$(slurm_job)" | sed -n 's/.* EndTime=\([0-9][^ ]*\).*/\1/p')
    [ -n "$end" ] || return 0
    WORK_S=$(($(date -d "$end" +%s) - $(date +%s) - ${BEFORE_END:-60}))
    [ "$WORK_S" -ge 1 ] || WORK_S=1
}

# run_in_time COMMAND ...: its exit code; 143 if it was asked to end, which SIGTERM for this script does, and WORK_S seconds, if set.
# A lost host is the batch system's to replace: it queues the job again, so halo-mpirun does not start it again itself.
run_in_time() {
    local code=0 started limit=()
    [ -z "${WORK_S:-}" ] || limit=(timeout --preserve-status --foreground "$WORK_S")
    "${limit[@]}" launch/halo-mpirun --no-restart --grace "${GRACE_S:-60}" -hostfile "$HOSTS" "$@" &
    started=$!
    trap 'kill -TERM "$started" 2>/dev/null || true' TERM
    wait "$started" || code=$?
    while kill -0 "$started" 2>/dev/null; do # a signal ends `wait` before the command has ended
        code=0
        wait "$started" || code=$?
    done
    return "$code"
}

# generate MODEL PROMPTS RESULTS TASK TASKS [OPTION ...]: texts for part TASK of TASKS (1 .. TASKS) of a file of prompts. What is in RESULTS
# already is not made again, and the text under way goes on where it stopped.
generate() {
    local model=$1 prompts=$2 results=$3 task=$4 tasks=$5
    shift 5
    if [ "$tasks" -gt 1 ]; then
        results="${results%.jsonl}-$task-of-$tasks.jsonl"
        split -n "r/$task/$tasks" "$prompts" >"$results.prompts"
        prompts="$results.prompts"
        [ -s "$prompts" ] || { echo "halo_mpi: more tasks than prompts: nothing to do for task $task" >&2; return 0; }
    fi
    local before code=0
    before=$(state_of "$results")
    run_in_time python -m halo_mpi.generate --model "$model" --prompts "$prompts" --out "$results" --resume \
        --checkpoint "$results.checkpoint" "$@" || code=$?
    if [ "$code" = 143 ] && [ "$before" = "$(state_of "$results")" ]; then
        echo "halo_mpi: not one token was written in the time that there was; give the job more" >&2
        return 1
    fi
    return "$code"
}

# What would change with every token.
state_of() { cat "$1" "$1.checkpoint" 2>/dev/null | cksum; }
