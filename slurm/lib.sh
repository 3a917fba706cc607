# shellcheck shell=bash
# What the batch scripts share, both those of `python -m launch submit` and the .sbatch files here:
#
#   gan_dist_begin RUN SUBMISSION      names this start of the job and makes its directories
#   gan_dist_preflight PYTHON          checks that every node sees the run directory and the interpreter
#   gan_dist_refuse REASON             ends the job as bad usage
#   gan_dist_srun COMMAND...           runs the ranks, one log each: logs/JOB-RESTART-HOST-RANK.log; for torchrun's
#                                      agents $task_log replaces the rank, and their ranks write logs of their own
#   gan_dist_finish $?                 requeues or ends the job, by the files that the ranks wrote
#
# This runs on the job's first node, outside any container, and needs only bash, coreutils and SLURM's own commands.
# The files of one start are in SUBMISSION/attempts/JOB/RESTART. How each start ended is a line of .../JOB/history:
# restart, outcome (requeued crashed lost stopped failed cancelled done), newest checkpoint, reason; separated by tabs.

gan_dist_begin() {
  set +eufC # undo options set by job.setup: here a command may fail
  run=$1 submission=$2 pid="" task_log=""
  restart=${SLURM_RESTART_COUNT:-0}
  job=$SLURM_JOB_ID # for the last element of an array this is the array's id: name elements as ARRAY_TASK
  if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}; fi
  attempts=$submission/attempts/$job
  attempt=$attempts/$restart
  mkdir -p "$attempt" "$run/logs"
  export GAN_DIST_ATTEMPT=$attempt GAN_DIST_LAUNCH_ID=${submission##*/}-$job PYTHONSAFEPATH=1
  export SLURM_EXPORT_ENV=ALL # the ranks need these variables, whatever sbatch --export says
  # The batch shell survives the signals that end its ranks, to decide what becomes of the job.
  trap : USR2 CONT
  trap gan_dist_on_term TERM
  echo "gan_dist: start $restart of job $job on ${SLURM_JOB_NODELIST:-?}, $(date -u '+%Y-%m-%d %H:%M:%S UTC')"
}

# Names the nodes that cannot take part, before the other nodes wait for them.
gan_dist_preflight() {
  local output
  printf '%s\n' "$job" >"$attempt/here"
  # shellcheck disable=SC2016 # expanded on the node
  output=$(srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 \
    --kill-on-bad-exit=0 --mpi=none bash -c '
      for try in {1..20}; do [[ -e $1/here ]] && break; ls "${1%/*}" >/dev/null 2>&1; sleep 0.5; done
      if [[ ! -e $1/here ]]; then
        echo "bad: $SLURMD_NODENAME does not see $1: put runs on a file system that all nodes share (job.runs)"
      elif ! command -v "$2" >/dev/null; then
        echo "bad: $SLURMD_NODENAME cannot run $2 (job.python, job.container)"
      fi' preflight "$attempt" "$1" 2>&1) || true
  if [[ $output == *bad:* ]]; then
    gan_dist_refuse "$(sed -n 's/^bad: //p' <<<"$output" | sort -u | paste -sd ';')"
  fi
}

# Ends the job as bad usage, which is not retried.
gan_dist_refuse() { # REASON
  printf '%s\t2\terror\t-\t%s\t%s\n' "$(date +%s)" "$(hostname)" "$1" >"$attempt/failed-preflight"
  gan_dist_finish 2
}

gan_dist_srun() {
  export GAN_DIST_LOG=$run/logs/$job-$restart
  # SLURM 22.05 and later do not pass --cpus-per-task on to srun. Without --kill-on-bad-exit the other ranks would run on
  # when one has died, until a collective times out.
  srun --unbuffered --kill-on-bad-exit=1 --wait=60 --mpi=none \
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
  local began=$SECONDS wait_s state reason restarts preempted
  kill -0 "$pid" 2>/dev/null || return 0
  trap : TERM # a second one would start this again
  wait_s=$(scontrol show config 2>/dev/null | sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p')
  while kill -0 "$pid" 2>/dev/null; do
    if ((SECONDS - began < ${wait_s:-30} - 4)); then
      sleep 1
      continue
    fi
    gan_dist_query
    if [[ $reason == TimeLimit || -n $preempted ]]; then gan_dist_finish 143; fi
    break
  done
  trap gan_dist_on_term TERM
}

# Sets what the controller says of this job: state, reason, restarts, preempted. The job is this script's to requeue or
# end when it is RUNNING, when its time limit has just passed, and when a preemption cancels it (PreemptMode=CANCEL).
# More restarts than this one mean that SLURM has requeued it. The query is for $job, because the id of an array's last
# element is that of the whole array.
gan_dist_query() {
  local try answer end
  for try in {1..20}; do # minutes: the controller may be restarting; a cancelled job ends here anyway
    answer=$(SLURM_TIME_FORMAT=standard scontrol show job -o "$job" 2>/dev/null)
    if [[ -n $answer ]]; then break; fi
    sleep "$try"
  done
  state=$(sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p' <<<"$answer")
  reason=$(sed -n 's/.* Reason=\([A-Za-z_]*\).*/\1/p' <<<"$answer")
  restarts=$(sed -n 's/.* Restarts=\([0-9]*\).*/\1/p' <<<"$answer")
  # A cancellation during the grace time of a preemption looks the same, but then the job ends later.
  preempted=$(sed -n 's/.* PreemptTime=\([0-9][^ ]*\).*/\1/p' <<<"$answer")
  end=$(sed -n 's/.* EndTime=\([0-9][^ ]*\).*/\1/p' <<<"$answer")
  if [[ -n $preempted ]] && (($(date -d "$end" +%s) - $(date -d "$preempted" +%s) > 1)); then preempted=""; fi
}

# Prints why this start failed: by a rank's own report, else by what srun reports, else by the guess of other ranks.
gan_dist_cause() {
  local own killed lost host rank
  own=$(cat "$attempt"/failed-* 2>/dev/null | sort -n | awk -F'\t' '$3 == "error" { print; exit }')
  killed=$(sed -nE 's/^srun: error: ([^:]+): tasks? ([0-9,-]+): (Killed|Aborted|Segmentation fault|Bus error|Illegal instruction|Out Of Memory).*/rank \2 on \1: \3/p' "$attempt/srun.err" 2>/dev/null | head -n 1)
  lost=$(cat "$attempt"/failed-* 2>/dev/null | sort -n | awk -F'\t' 'NR == 1 { print $6 }')
  if [[ -n $own ]]; then
    awk -F'\t' '{ print $2 "\t" ($4 == "-" ? "" : "rank " $4 " on " $5 ": ") $6 }' <<<"$own"
  elif [[ -n $killed ]]; then
    printf 'lost\t%s\n' "$killed"
  elif [[ -n $lost ]]; then
    printf 'lost\t%s\n' "$lost"
  else
    read -r host rank <<<"$(sed -nE 's/^srun: error: ([^:]+): tasks? ([0-9]+).*: Exited .*/\1 \2/p' "$attempt/srun.err" | head -n 1)"
    if [[ -n $rank ]]; then # it ended before it could report
      printf 'lost\trank %s on %s ended, its last line: %s\n' "$rank" "$host" "$(grep . "$GAN_DIST_LOG-$host-${task_log:-$rank}.log" | tail -n 1)"
    else
      printf 'lost\t%s\n' "$(grep -m 1 -hE '^(srun|slurmstepd).*error' "$attempt/srun.err" || echo "srun ended with status $1")"
    fi
  fi
}

gan_dist_record_end() { # OUTCOME REASON
  local step
  step=$(cat "$run/checkpoints/latest" 2>/dev/null || echo -)
  printf '%s\t%s\t%s\t%s\n' "$restart" "$1" "$step" "$2" >>"$attempts/history"
  echo "gan_dist: $1 at ${step}: $2"
}

gan_dist_stopped() { # REASON
  if [[ $1 == *"while data were fetched" ]]; then echo "stopped by $1"; else echo "saved and stopped by $1"; fi
}

gan_dist_requeue() {
  local try refused=0
  sync
  trap - TERM # otherwise SLURM would wait for the sleeps below
  for try in {1..20}; do # as patient as gan_dist_query
    if scontrol requeue "$job"; then
      sleep 30 # SLURM ends this script
      exit 75
    fi
    if scontrol ping >/dev/null 2>&1 && ((++refused == 3)); then break; fi # it answers: this is a refusal
    sleep "$try"
  done
  gan_dist_record_end failed "SLURM refused to requeue the job; submit it again"
  exit 1
}

gan_dist_finish() { # STATUS OF SRUN
  local rc=$1 state reason restarts preempted ours="" what why status step crashes
  if [[ -e $attempt/done ]]; then
    gan_dist_record_end "done" "$(cat "$attempt/done")"
    exit 0
  fi
  gan_dist_query
  if [[ $state == RUNNING || $reason == TimeLimit || -n $preempted ]]; then ours=yes; fi
  IFS=$'\t' read -r status why <<<"$(gan_dist_cause "$rc")"
  if ((${restarts:-0} > restart)); then
    if [[ -e $attempt/stopped ]]; then why=$(gan_dist_stopped "$(cut -d' ' -f2- "$attempt/stopped")"); fi
    gan_dist_record_end lost "SLURM requeued the job: $why"
    exit 75
  fi
  if [[ -z $state ]]; then # most likely cut off: SLURM decides elsewhere what becomes of the job
    gan_dist_record_end lost "SLURM's controller does not answer from here"
    exit $((rc ? rc : 1))
  fi
  if [[ -e $attempt/stopped ]]; then
    read -r what why <"$attempt/stopped"
    if [[ -z $ours ]]; then
      gan_dist_record_end cancelled "$(gan_dist_stopped "$why")"
    elif [[ $what == end ]]; then
      gan_dist_record_end stopped "$why"
    elif ((restart >= ${GAN_DIST_MAX_REQUEUES:-100})); then
      gan_dist_record_end stopped "requeued $restart times (job.max_requeues); submit it again to go on"
    else
      gan_dist_record_end requeued "$why"
      gan_dist_requeue
    fi
    exit 75
  fi
  if [[ -z $ours ]]; then
    gan_dist_record_end cancelled "SLURM ended the job ($state) before the ranks had saved"
    exit $((rc ? rc : 1))
  fi
  if [[ $state != RUNNING && -n $preempted ]]; then # as SLURM itself would do with PreemptMode=REQUEUE
    gan_dist_record_end lost "preempted before the ranks had saved"
    gan_dist_requeue
  fi
  if [[ $reason == TimeLimit ]]; then
    status=lost why="the time limit came before the ranks had saved; raise slurm.signal_lead_s"
  fi
  step=$(cat "$run/checkpoints/latest" 2>/dev/null || echo -)
  crashes=$(awk -F'\t' '$2 == "crashed"' "$attempts/history" 2>/dev/null | wc -l)
  if [[ $status == 2 ]]; then
    gan_dist_record_end failed "$why"
    exit 2
  elif ((crashes >= ${GAN_DIST_MAX_CRASHES:-3})); then
    gan_dist_record_end failed "$((crashes + 1)) crashes (job.max_crashes=${GAN_DIST_MAX_CRASHES:-3}), the last one: $why"
    exit 1
  elif [[ $status != lost ]] && awk -F'\t' -v step="$step" '$2 == "crashed" && $3 == step && $5 == "error" { f = 1 } END { exit !f }' "$attempts/history" 2>/dev/null; then
    gan_dist_record_end failed "failed twice after the same checkpoint ($step): $why"
    exit 1
  fi
  printf '%s\tcrashed\t%s\t%s\t%s\n' "$restart" "$step" "$why" "$([[ $status == lost ]] && echo lost || echo error)" >>"$attempts/history"
  echo "gan_dist: crashed at $step: $why"
  gan_dist_requeue
}

# For the .sbatch files: checks their arguments, and takes code, interpreter and container from the environment.
gan_dist_arguments() { # COUNT USAGE ARGUMENTS...
  local code=${code:?the checkout}
  if (($# - 2 < $1)); then
    echo "gan_dist: expected arguments $2, found $(($# - 2))" >&2
    exit 2
  fi
  export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH}
  read -ra python <<<"${GAN_DIST_CONTAINER:-}"
  python+=("${GAN_DIST_PYTHON:-python}")
}

# Writes job.json for `python -m launch status`, as `python -m launch submit` does.
gan_dist_record() { # KIND RANKS
  [[ -e $submission/job.json ]] || printf '{"id": "%s", "kind": "%s", "job": "%s", "time": %s, "commit": null, "words": [], "ranks": %s}\n' \
    "${submission##*/}" "$1" "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}" "$(date +%s)" "$2" >"$submission/job.json"
}
