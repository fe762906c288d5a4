# Shared by the scripts here; sourced. Reads site.env and defines:
#   cpu_options, gpu_options, one_gpu  arrays: options of sbatch for jobs on CPUs, on whole GPU nodes, on one GPU
#   apart       function: forgets the job that this shell may be in
#   split       function: apart; then leading --option=value arguments (for sbatch) into given, the rest into arguments
#   in_site     function: runs a command in the site's modules and container, with node-local temporary folders
#   site_exec   function: the same in the place of this shell, so that signals meet the command
#   in_task     function: runs a Python module as the one task of this job
#   put_back    function: puts this job (or array task) back into the queue, without NODES, and ends the script
#   requeue     function: put_back, at most LIMIT times
ZAMBA_ROOT=${ZAMBA_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
site_file=${ZAMBA_SITE:-$ZAMBA_ROOT/slurm/site.env}
if [[ ! -f $site_file ]]; then
    echo "error: ZAMBA_SITE: $site_file: does not exist; copy slurm/site.env.example to slurm/site.env and edit it" >&2
    exit 2
fi
source "$site_file"

cpu_options=(--chdir="$ZAMBA_ROOT" --export="ALL,ZAMBA_ROOT=$ZAMBA_ROOT,ZAMBA_SITE=$site_file" --open-mode=append
    --parsable --requeue --kill-on-invalid-dep=yes ${SITE_ACCOUNT:+--account="$SITE_ACCOUNT"} "${SITE_EXTRA[@]}")
gpu_options=("${cpu_options[@]}")
cpu_options+=(${SITE_PARTITION:+--partition="$SITE_PARTITION"})
gpu_partition=${SITE_GPU_PARTITION:-${SITE_PARTITION:-}}
gpu_options+=(${gpu_partition:+--partition="$gpu_partition"})
one_gpu=("${gpu_options[@]}" --nodes=1 --ntasks=1 --cpus-per-task="$SITE_CPUS_PER_PROCESS")
if ((SITE_GPUS > 0)); then
    one_gpu+=(--gpus-per-node=1)
    gpu_options+=(--gpus-per-node="$SITE_GPUS")
fi

# A script that was given to sbatch itself submits from inside that job, of which the real one is to know nothing.
apart() {
    local name
    for name in $(compgen -v SLURM_); do
        [[ $name == SLURM_CONF ]] || unset "$name"
    done
}

split() {
    apart
    given=()
    while [[ ${1:-} == --* ]]; do
        given+=("$1")
        shift
    done
    arguments=("$@")
    if [[ ! ${1:-} ]]; then
        echo "error: arguments: (none): something to work on is needed;$(sed -n 's/^#  //p' "$0")" >&2
        exit 2
    fi
}

site_environment() {
    eval "${SITE_SETUP:-}" >&2 # what a command in here prints is read by the scripts; a module may greet
    # Compiled kernels and temporary files lie on a disk of the node: nodes that compile into one shared folder read
    # each other's half-written files.
    local scratch=${SITE_SCRATCH:-/tmp}/zamba-${USER:-$UID}/${SLURMD_NODENAME:-login}
    mkdir -p "$scratch"
    export TMPDIR=$scratch NUMBA_CACHE_DIR=$scratch/numba TRITON_CACHE_DIR=$scratch/triton
    export TORCHINDUCTOR_CACHE_DIR=$scratch/inductor TRITON_CACHE_AUTOTUNING=1
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
}

site_exec() {
    site_environment
    exec "${SITE_CONTAINER[@]}" "$@"
}

in_site() {
    if ((${#SITE_SRUN[@]})) && [[ ${SLURM_JOB_ID:-} && ! ${SLURM_STEP_ID:-} ]]; then
        # In a batch script: only srun enters this container.
        (SITE_CONTAINER=(srun --overlap --nodes=1 --ntasks=1 "${SITE_SRUN[@]}") && site_exec "$@" </dev/null)
    else
        (site_exec "$@")
    fi
}

in_task() { # MODULE ARGUMENTS
    srun --cpus-per-task="$SITE_CPUS_PER_PROCESS" "${SITE_SRUN[@]}" \
        bash -c 'source slurm/site.sh && site_exec "$SITE_PYTHON" -m "$@"' - "$@"
}

put_back() { # [NODES]
    local id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}} try now
    id=${id:-$SLURM_JOB_ID}
    trap '' TERM # Slurm ends this script as soon as the job is back in the queue; only then may its nodes be changed
    for try in 1 2 3 4 5; do # the controller may be starting anew
        scontrol requeue "$id" && break || sleep $((try * 10))
    done
    if [[ ${1:-} ]]; then
        now=$(scontrol --oneliner show job "$id" | sed -nE 's/.* ExcNodeList=(\S+).*/\1,/p')
        scontrol update JobId="$id" ExcNodeList="${now#(null),}$1" || echo "could not exclude $1 from job $id"
    fi
    exit 75
}

requeue() { # LIMIT REASON
    local restarts=${SLURM_RESTART_COUNT:-0}
    if ((restarts >= $1)); then
        echo "$2; $restarts restarts are behind it and $1 are allowed: giving up"
        return
    fi
    echo "$2; back into the queue (restart $((restarts + 1)) of $1)"
    put_back
}
