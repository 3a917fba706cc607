# shellcheck shell=bash disable=SC2154 # names of slurm/lib.sh, which sources this
# What is checked before ranks start: the user's lines, and every node.
#
#   gan_dist_setup, gan_dist_ready   around the user's lines (job.setup): one that fails ends the job
#   gan_dist_preflight PYTHON...     checks on every node the run directory and the command that starts Python
#   gan_dist_refuse REASON           ends the job as bad usage

gan_dist_setup() {
  exec 3>&2 2>"$attempt/setup.err"
  setting_up=yes # bash gives back to its caller the ERR trap that a function has removed
  trap 'gan_dist_setup_failed $? "$BASH_COMMAND"' ERR
  trap 'gan_dist_setup_failed $? "the script ended there"' EXIT # set -u, exit
}

gan_dist_setup_failed() { # STATUS COMMAND
  if [[ -z $setting_up ]]; then return; fi
  gan_dist_leave_setup
  gan_dist_refuse "job.setup: $2: status $1: $(grep . "$attempt/setup.err" | tail -n 1)"
}

gan_dist_leave_setup() {
  setting_up=""
  trap - ERR EXIT
  set +eufC # undo the options of job.setup
  exec 2>&3 3>&-
  cat "$attempt/setup.err" >&2
}

gan_dist_ready() {
  local said # some modules fail and end with status 0
  gan_dist_leave_setup
  said=$(grep -m 1 -E 'ModuleCmd_[^ ]*ERROR|Lmod has detected the following error|Module ERROR' "$attempt/setup.err")
  if [[ -n $said ]]; then gan_dist_refuse "job.setup: $said"; fi
}

# Names the nodes that cannot take part, before the other nodes wait for them.
gan_dist_preflight() { # PYTHON...
  local output
  if (($# == 1)) && ((${#python[@]})); then set -- "${python[@]}"; fi # as older .sbatch files call it
  printf '%s\n' "$job" >"$attempt/here"
  output=$(srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 \
    --kill-on-bad-exit=0 --mpi=none "${gan_dist_srun_options[@]}" \
    bash -c "$(declare -f gan_dist_examine); gan_dist_examine \"\$@\"" preflight "$attempt" "$gan_dist_code" "$@" 2>&1) || true
  if [[ $output == *bad:* ]]; then
    # One fault of several nodes is told once: node1, node2 cannot run ...
    gan_dist_refuse "$(sed -n 's/^bad: \([^ ]*\) /\1\t/p' <<<"$output" | sort -u | awk -F'\t' '
      { nodes[$2] = nodes[$2] (nodes[$2] ? ", " : "") $1 } END { for (fault in nodes) print nodes[fault], fault }' | paste -sd ';')"
  fi
}

gan_dist_examine() { # ATTEMPT CODE PYTHON...: what runs on each node; knows no other name of these files
  local attempt=$1 code=$2 said
  shift 2
  for _ in {1..20}; do
    [[ -e $attempt/here ]] && break
    ls "${attempt%/*}" >/dev/null 2>&1 # makes a network file system look again
    sleep 0.5
  done
  if [[ ! -e $attempt/here ]]; then
    echo "bad: $SLURMD_NODENAME does not see $attempt: put runs on a file system that all nodes share (job.runs)"
  elif ! command -v "$1" >/dev/null; then
    echo "bad: $SLURMD_NODENAME cannot run $1 (job.python, job.container)"
  elif ! said=$("$@" "$code/launch/job" preflight 2>&1); then
    echo "bad: $SLURMD_NODENAME cannot run gan_dist with $* (job.python, job.container): ${said##*$'\n'}"
  fi
}

gan_dist_refuse() { # REASON
  printf '%s\t2\terror\t-\t%s\t%s\n' "$(date +%s)" "$(hostname)" "$1" >"$attempt/failed-preflight"
  gan_dist_finish 2
}
