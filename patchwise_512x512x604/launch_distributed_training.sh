#!/usr/bin/env bash
# Check the machine, then train: one GPU, several GPUs, several machines (torchrun or SLURM), or processes on the CPU.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: ./launch_distributed_training.sh [options] [Hydra overrides, e.g. training.batch_size=4 ckpt_path=last]

  --data_dir DIR       folder of .nii.gz volumes, or with dataset=store of .b2nd (default: phantoms, to try the way)
  --output_dir DIR     results (default: outputs in the folder where the command is given)
  --gpus N             GPUs of each machine (default: all of this one; 0 trains on the CPU); with --slurm always needed
  --processes N        processes on the CPU, where there is no GPU (default: 1)
  --nodes N            machines (default: 1); more than 1 needs either --slurm or the next two
  --node_rank R        number of this machine, from 0; run the same command on each
  --master_addr HOST   address of machine 0
  --master_port PORT   free port there (default: 29500)
  --slurm              submit to SLURM with sbatch instead of starting here; only with it the next four:
  --partition NAME     of the job        --time LIMIT   of the job, e.g. 24:00:00
  --cpus_per_gpu N     CPUs for each GPU or process (default: training.num_workers and two more)
  --sbatch "OPTIONS"   further options of sbatch, e.g. --sbatch "--account=lab --qos=long --mem=64G"
  --min_free_gb N      free disk that the output needs (default: 5)
  --python PATH        Python to use (default: the checkout's .venv, else python3)
  --dry-run            check, print the command, start nothing
  -h, --help           this text

Exit codes: 0 ok, 2 usage or machine, 3 no data, 6 disk; those of the training else (several machines: torchrun's).
TEXT
}

fail() { # code, message: one line, the last on stderr
    echo "error: $2" >&2
    exit "$1"
}

data_dir="" output_dir="outputs" gpus="" processes=1 nodes=1 node_rank="" master_addr="" master_port=29500
slurm=false partition="" time_limit="" cpus_per_gpu="" sbatch_options="" min_free_gb=5 python="" dry_run=false
overrides=()
while [ $# -gt 0 ]; do
    option="$1"
    case "$option" in
        -h | --help) usage; exit 0 ;;
        --slurm) slurm=true; shift; continue ;;
        --dry-run | --dry_run) dry_run=true; shift; continue ;;
        --data_dir | --output_dir | --gpus | --processes | --nodes | --node_rank | --master_addr | --master_port | \
            --partition | --time | --cpus_per_gpu | --sbatch | --min_free_gb | --python)
            [ $# -ge 2 ] || fail 2 "$option needs a value: see --help"
            value="$2"
            shift 2
            ;;
        --*) fail 2 "$option is unknown: see --help" ;;
        *=*) overrides+=("$option"); shift; continue ;;
        *) fail 2 "$option is neither an option nor a key=value: see --help" ;;
    esac
    case "$option" in
        --gpus | --processes | --nodes | --node_rank | --master_port | --cpus_per_gpu | --min_free_gb)
            [[ "$value" =~ ^[0-9]+$ ]] || fail 2 "$option $value: give a whole number" ;;
    esac
    case "$option" in
        --data_dir) data_dir="$value" ;;
        --output_dir) output_dir="$value" ;;
        --gpus) gpus="$value" ;;
        --processes) processes="$value" ;;
        --nodes) nodes="$value" ;;
        --node_rank) node_rank="$value" ;;
        --master_addr) master_addr="$value" ;;
        --master_port) master_port="$value" ;;
        --partition) partition="$value" ;;
        --time) time_limit="$value" ;;
        --cpus_per_gpu) cpus_per_gpu="$value" ;;
        --sbatch) sbatch_options="$value" ;;
        --min_free_gb) min_free_gb="$value" ;;
        --python) python="$value" ;;
    esac
done

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
script="$here/train/train_vqgan_distributed.py"

# torchrun kills its processes 30 s after a SIGTERM unless told otherwise, and a step with its checkpoint may take longer
grace_s=120 shutdown_s=100

hydra_text() { # a text as a value of Hydra's grammar, in which = , ( [ # ' and others have a meaning
    local text="$1" tail=""
    while [[ "$text" == *\\ ]]; do text="${text%?}" tail+='\\'; done # at the end it would escape the quote
    text="${text//\$\{/\\\$\{}" # no interpolation
    text="$(printf '%s' "$text" | sed -E "s/(\\\\*)'/\\1\\1\\\\'/g")"
    printf "'%s%s'" "$text" "$tail"
}

shell_word() { # a word for any POSIX shell: what runs a SLURM job need not be bash, whose printf %q writes $'...'
    if [[ "$1" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then printf '%s' "$1"; else printf "'%s'" "${1//\'/\'\\\'\'}"; fi
}

# --- checks, the cheap ones first ---
[ "$nodes" -ge 1 ] && [ "$processes" -ge 1 ] || fail 2 "--nodes and --processes start at 1"
if [ "$nodes" -gt 1 ] && [ "$slurm" = false ]; then
    [ -n "$node_rank" ] && [ -n "$master_addr" ] || fail 2 "--nodes $nodes needs --node_rank and --master_addr, or --slurm"
    [ "$node_rank" -lt "$nodes" ] || fail 2 "--node_rank $node_rank: with --nodes $nodes it is 0 to $((nodes - 1))"
fi
if [ "$slurm" = true ]; then
    [ -n "$gpus" ] || fail 2 "--slurm needs --gpus N, the GPUs of each machine of the job (0 trains on the CPU)"
else
    for option in "--partition:$partition" "--time:$time_limit" "--cpus_per_gpu:$cpus_per_gpu" "--sbatch:$sbatch_options"; do
        [ -z "${option#*:}" ] || fail 2 "${option%%:*} is for a job of SLURM: add --slurm, or leave it out"
    done
fi
if [ -z "$python" ]; then
    python="$here/../.venv/bin/python"
    [ -x "$python" ] || python="$(command -v python3 || true)"
fi
code=0
available="$("$python" -c '
import sys
from importlib.util import find_spec
if sys.version_info < (3, 11):
    sys.exit(3)
if not all(map(find_spec, ("blosc2", "hydra", "nibabel", "pytorch_lightning", "torch", "vq_gan_3d"))):
    sys.exit(4)
import torch
print(torch.cuda.device_count() if torch.cuda.is_available() else 0)' 2>/dev/null)" || code=$?
[ "$code" -ne 4 ] || fail 2 "$python: packages are missing: run setup_training.sh"
[[ "$code" -eq 0 && "$available" =~ ^[0-9]+$ ]] ||
    fail 2 "${python:-python3}: no working Python of 3.11 or newer: run setup_training.sh or give --python"
if [ -n "$data_dir" ]; then
    kind=".nii.gz" names=(-name '*.nii.gz' -o -name '*.nii')
    for override in ${overrides[@]+"${overrides[@]}"}; do
        case "$override" in
            dataset=store) kind=".b2nd" names=(-name '*.b2nd') ;;
            dataset=*) kind=".nii.gz" names=(-name '*.nii.gz' -o -name '*.nii') ;;
        esac
    done
    [ -d "$data_dir" ] || fail 3 "$data_dir: no such folder: point --data_dir at a folder of $kind"
    data_dir="$(cd "$data_dir" && pwd)"
    count="$(find -L "$data_dir" \( "${names[@]}" \) ! -name '.*' | wc -l)"
    hint=""
    [ "$kind" = .b2nd ] || [ -z "$(find -L "$data_dir" -name '*.b2nd' ! -name '.*' | head -n 1)" ] ||
        hint=": for its .b2nd stores add dataset=store"
    [ "$count" -ge 2 ] || fail 3 "$data_dir: holds $count $kind files, at least 2 are needed (one is held out)$hint"
    echo "data: $count volumes in $data_dir"
fi
# a dry run makes nothing: it looks at the nearest folder that is there
if [ "$dry_run" = true ]; then
    [[ "$output_dir" == /* ]] || output_dir="$PWD/$output_dir"
    existing="$output_dir"
    while [ ! -e "$existing" ]; do existing="$(dirname "$existing")"; done
    [ -d "$existing" ] && [ -w "$existing" ] || fail 6 "$output_dir: cannot be written: choose another --output_dir"
    missing="${output_dir#"$existing"}"
    existing="$(cd "$existing" && pwd)"
    output_dir="$existing$missing"
else
    mkdir -p "$output_dir" 2>/dev/null && [ -w "$output_dir" ] || fail 6 "$output_dir: cannot be written: choose another --output_dir"
    output_dir="$(cd "$output_dir" && pwd)"
    existing="$output_dir"
    probe="$output_dir/.write_test.$$"
    { echo test >"$probe"; } 2>/dev/null || fail 6 "$output_dir: cannot be written: choose another --output_dir"
    rm -f "$probe"
fi
free_gb="$(($(df -Pk "$existing" | awk 'NR == 2 {print $4}') / 1048576))"
[ "$free_gb" -ge "$min_free_gb" ] ||
    fail 6 "$output_dir: $free_gb GB free, $min_free_gb are needed: free space, or lower --min_free_gb"
echo "output: $output_dir ($free_gb GB free)"
if [ -z "$gpus" ]; then
    gpus="$available"
elif [ "$gpus" -gt "$available" ] && [ "$slurm" = false ]; then
    if [ "$dry_run" = false ]; then
        fail 2 "--gpus $gpus: this machine has $available: lower it, or 0 for the CPU"
    fi
    echo "note: this machine has $available GPUs, --gpus $gpus would be refused here"
fi

# --- command ---
arguments=("output_dir=$(hydra_text "$output_dir")")
[ -z "$data_dir" ] || arguments+=("dataset.root_dir=$(hydra_text "$data_dir")")
if [ "$gpus" -gt 0 ]; then
    devices="$(seq -s, 0 $((gpus - 1)))"
    arguments+=("hardware.device=[$devices]")
    per_node="$gpus"
    echo "hardware: $gpus GPU(s) on each of $nodes machine(s)"
else
    arguments+=("hardware.device=cpu" "hardware.processes=$processes")
    per_node="$processes"
    echo "hardware: $processes process(es) on the CPU of each of $nodes machine(s)"
fi
[ "$nodes" -eq 1 ] || arguments+=("hardware.num_nodes=$nodes")
arguments+=(${overrides[@]+"${overrides[@]}"})

torchrun=(env "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$shutdown_s" "$python" -m torch.distributed.run "--nnodes=$nodes" "--nproc_per_node=$per_node")
if [ "$slurm" = true ]; then
    # torchrun on each machine, so that ranks are named the same way with and without SLURM; the shell of the job
    # finds the first machine
    rendezvous="--rdzv_backend=c10d --rdzv_id=\$SLURM_JOB_ID --rdzv_endpoint=\$(scontrol show hostnames \"\$SLURM_JOB_NODELIST\" | head -n 1):$master_port"
    if [ -z "$cpus_per_gpu" ]; then
        workers="$(sed -n 's/^num_workers: *\([0-9]*\).*/\1/p' "$here/../config/training/default.yaml")"
        for override in ${overrides[@]+"${overrides[@]}"}; do
            [[ ! "$override" =~ ^training\.num_workers=([0-9]+)$ ]] || workers="${BASH_REMATCH[1]}"
        done
        cpus_per_gpu="$((workers + 2))"
    fi
    [ "$cpus_per_gpu" -ge 1 ] || fail 2 "--cpus_per_gpu starts at 1"
    cpus="--cpus-per-task=$((cpus_per_gpu * per_node))" # of torchrun's one task on a machine; srun inherits it no more
    job="srun --kill-on-bad-exit=1 $cpus"
    for word in "${torchrun[@]}"; do job+=" $(shell_word "$word")"; done
    job+=" $rendezvous"
    for word in "$script" "${arguments[@]}"; do job+=" $(shell_word "$word")"; done
    command=(sbatch --job-name=vqgan_patches "--nodes=$nodes" --ntasks-per-node=1 "$cpus" "--output=$output_dir/slurm_%j.log")
    command+=("--signal=TERM@$grace_s")
    [ "$gpus" -eq 0 ] || command+=("--gpus-per-node=$gpus")
    [ -z "$partition" ] || command+=("--partition=$partition")
    [ -z "$time_limit" ] || command+=("--time=$time_limit")
    read -ra further <<<"$sbatch_options"
    command+=(${further[@]+"${further[@]}"})
    command+=("--wrap=$job")
    [ "$dry_run" = true ] || command -v sbatch >/dev/null || fail 2 "sbatch is not here: run this where jobs are submitted"
elif [ "$nodes" -gt 1 ]; then
    command=("${torchrun[@]}" "--node_rank=$node_rank" "--master_addr=$master_addr" "--master_port=$master_port")
    command+=("$script" "${arguments[@]}")
else
    # on one machine the trainer starts its processes itself: its exit codes and its resume stay what they are
    command=("$python" "$script" "${arguments[@]}")
fi
echo "command:$(for word in "${command[@]}"; do printf ' '; shell_word "$word"; done)"
[ "$dry_run" = false ] || exit 0
exec "${command[@]}"
