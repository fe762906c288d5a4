# Shared by the scripts here; sourced. Reads site.env and defines:
#   site_options  array: options of sbatch that are the same for all jobs
#   in_site       function: runs a command in the site's modules and container, with node-local temporary folders
#   requeue       function: puts this job (or array task) back into the queue, at most LIMIT times
ZAMBA_ROOT=${ZAMBA_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
site_file=${ZAMBA_SITE:-$ZAMBA_ROOT/slurm/site.env}
if [[ ! -f $site_file ]]; then
    echo "error: ZAMBA_SITE: $site_file: does not exist; copy slurm/site.env.example to slurm/site.env and edit it" >&2
    exit 2
fi
source "$site_file"

site_options=(--chdir="$ZAMBA_ROOT" --export="ALL,ZAMBA_ROOT=$ZAMBA_ROOT,ZAMBA_SITE=$site_file" --open-mode=append)
[[ ${SITE_PARTITION:-} ]] && site_options+=(--partition="$SITE_PARTITION")
[[ ${SITE_ACCOUNT:-} ]] && site_options+=(--account="$SITE_ACCOUNT")
site_options+=("${SITE_EXTRA[@]}")

in_site() {
    eval "${SITE_SETUP:-}"
    local scratch=${SITE_SCRATCH:-/tmp}/zamba-${USER:-$UID}
    mkdir -p "$scratch"
    TMPDIR=$scratch NUMBA_CACHE_DIR=$scratch/numba "${SITE_CONTAINER[@]}" "$@"
}

requeue() { # LIMIT REASON
    local id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}} restarts=${SLURM_RESTART_COUNT:-0}
    if ((restarts >= $1)); then
        echo "$2; $restarts restarts are behind it and $1 are allowed: giving up"
        return
    fi
    echo "$2; back into the queue (restart $((restarts + 1)) of $1)"
    scontrol requeue "${id:-$SLURM_JOB_ID}"
    sleep 60 # Slurm ends this script
}
