# shellcheck shell=bash
# The shell of a job: traps and srun. What becomes of the job is decided in Python: the table is in launch/job/verdict.py.
#
#   gan_dist_begin RUN SUBMISSION [DATASET]  names this start of the job and writes down that it began
#   gan_dist_srun COMMAND...                 runs the ranks, one log each: logs/JOB-RESTART-HOST-RANK.log; for torchrun's
#                                            agents $task_log replaces the rank, and their ranks write logs of their own
#   gan_dist_finish $?                       requeues or ends the job
#
# checks.sh has what is checked before ranks start, plain.sh what only the .sbatch files need.
# This runs on the job's first node, outside any container, and needs bash, coreutils, SLURM's own commands and Python 3.
# The files of one start are in SUBMISSION/attempts/JOB/RESTART. Beside them `began` has a line for each start (restart,
# newest checkpoint, time, nodes), and `history` one for each end (restart, outcome, newest checkpoint, reason), by tabs.

gan_dist_code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) # a checkout, or a submission with an archive of one
# shellcheck source=slurm/checks.sh
for name in checks plain; do source "$gan_dist_code/slurm/$name.sh"; done
if [[ ! -d $gan_dist_code/launch ]]; then gan_dist_code+=/code.zip; fi # Python imports from it as from a directory

host_libraries=${LD_LIBRARY_PATH:-} host_path=$PATH # before job.setup
on_term="" # what the batch shell does on TERM, from a start's beginning until it is decided what becomes of the job
gan_dist_step() { # NAME ARGUMENTS...: runs a Python step of launch/job; a signal for the job is no reason for it to die
  if [[ -n $on_term ]]; then trap '' TERM USR2; fi # here already: it would end a child that has not yet done so itself
  (trap '' TERM USR2 && LD_LIBRARY_PATH=$host_libraries PATH=$PATH:$host_path exec "$host_python" -ISB \
    "$gan_dist_code/launch/job" "$@")
  set -- $?
  if [[ -n $on_term ]]; then trap : USR2 && trap '$on_term' TERM; fi
  return "$1"
}

set +eufC # undo the options of the caller: here a command may fail
for host_python in python3 /usr/bin/python3 /usr/libexec/platform-python "${GAN_DIST_PYTHON:-python}" ""; do
  "$host_python" -ISc 'import sys; sys.exit(sys.version_info < (3, 6))' 2>/dev/null && break
done
eval "$(gan_dist_step environment)" # drops what an outer allocation, array, step or world left behind

gan_dist_begin() {
  set +eufC
  run=$1 submission=$2 output=${3:-} pid="" task_log="" mark="" decision="" code=""
  declare -ga gan_dist_srun_options python
  restart=${SLURM_RESTART_COUNT:-0}
  job=$SLURM_JOB_ID # for the last element of an array this is the array's id: name elements as ARRAY_TASK
  if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}; fi
  attempts=$submission/attempts/$job
  attempt=$attempts/$restart
  export GAN_DIST_ATTEMPT=$attempt GAN_DIST_LAUNCH_ID=${submission##*/}-$job PYTHONSAFEPATH=1
  export SLURM_EXPORT_ENV=ALL # the ranks need these variables, whatever sbatch --export says
  # The batch shell survives the signals that end its ranks, to decide what becomes of the job.
  on_term=gan_dist_on_term
  trap : USR2 # and not CONT, which SLURM sends just before TERM: of two traps at once, bash's wait loses one
  trap '$on_term' TERM
  echo "gan_dist: start $restart of job $job on ${SLURM_JOB_NODELIST:-?}, $(date -u '+%Y-%m-%d %H:%M:%S UTC')"
  mark=$(cat "$run/checkpoints/latest" 2>/dev/null)
  if [[ -n $output ]]; then mark=$(find "$output" -maxdepth 1 -name 'shard-*.tar' 2>/dev/null | wc -l); fi
  if ! { mkdir -p "$attempt" "$run/logs" && gan_dist_facts 0 &&
    printf '%s\t%s\t%s\t%s\n' "$restart" "${mark:--}" "$(date +%s)" "${SLURM_JOB_NODELIST:-?}" >>"$attempts/began"; }; then
    echo "gan_dist: cannot write $attempts (no space, no quota, not shared?): nothing is started, nothing requeued" >&2
    exit 1
  fi
  gan_dist_step finish begin "$attempt"
  read -r decision code 2>/dev/null <"$attempt/verdict"
  if [[ $decision == end ]]; then exit "$code"; fi
}

gan_dist_srun() {
  export GAN_DIST_LOG=$run/logs/$job-$restart
  # SLURM 22.05 and later do not pass --cpus-per-task on to srun. Without --kill-on-bad-exit the other ranks would run on
  # when one has died, until a collective times out. Without --wait srun would wait for ranks of a host that is cut off.
  srun --unbuffered --kill-on-bad-exit=1 --wait=60 --mpi=none "${gan_dist_srun_options[@]}" \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    --output="${GAN_DIST_LOG//%/%%}-%N-${task_log:-%t}.log" "$@" 2> >(tee -a "$attempt/srun.err" >&2) &
  pid=$!
  # In the background: bash handles no signal while it waits for a foreground command.
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
  wait "$pid"
}

# On TERM: after a time limit or a preemption there are KillWait seconds to act in, but srun waits longer for its ranks.
# Any other TERM needs no action: a cancelled job ends, and a job with a grace time goes on.
gan_dist_on_term() {
  local since
  printf -v since '%(%s)T' -1
  kill -0 "$pid" 2>/dev/null || return 0
  on_term=: # a second one would start this again
  gan_dist_facts 143
  if gan_dist_step finish term "$attempt" "$pid" "$since"; then gan_dist_end 0; fi
  on_term=gan_dist_on_term
}

gan_dist_facts() { # STATUS OF SRUN
  printf '%s\n' "job=$job" "restart=$restart" "status=$1" "run=$run" "output=$output" "log=${GAN_DIST_LOG:-}" \
    "max_starts=${GAN_DIST_MAX_STARTS:-}" "max_crashes=${GAN_DIST_MAX_CRASHES:-}" \
    "max_requeues=${GAN_DIST_MAX_REQUEUES:-}" >"$attempt/facts"
}

gan_dist_finish() { # STATUS OF SRUN
  rm -f "$attempt/verdict"
  gan_dist_facts "$1"
  gan_dist_step finish finish "$attempt"
  gan_dist_end $?
}

gan_dist_end() { # STATUS OF THE STEP THAT DECIDED: does what ATTEMPT/verdict says
  decision="" code=""
  read -r decision code 2>/dev/null <"$attempt/verdict"
  on_term=""
  trap - TERM # SLURM ends this script in one of the sleeps below, and would wait for them
  case $decision in
    end) ;;
    requeue) gan_dist_step finish requeue "$attempt" && sleep 30 || code=1 ;;
    cancel) scancel "$job" && sleep 30 ;;
    *)
      code=1 decision="not requeued: the step that decides on it ended with status $1 (see this log); submit it again"
      if [[ -z $host_python ]]; then decision="not requeued: no Python 3 on $(hostname) to decide on it; submit it again"; fi
      if ! printf '%s' "$(date)" >"$attempt/verdict"; then
        decision="not requeued: cannot write $attempts; free some space, or raise the quota, and submit it again"
      fi
      echo "gan_dist: failed: $decision"
      printf '%s\tfailed\t-\t%s\n' "$restart" "$decision" >>"$attempts/history"
      ;;
  esac
  exit "$code"
}
