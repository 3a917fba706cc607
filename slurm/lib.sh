# shellcheck shell=bash
# The batch script's half of the protocol, shared by `python -m launch submit` and the .sbatch files here:
#
#   gan_dist_begin RUN SUBMISSION      names this start of the job, makes its directories
#   gan_dist_preflight PYTHON...       asks every node whether it sees the run directory and the interpreter
#   gan_dist_refuse WHY                ends the job as bad usage
#   gan_dist_srun COMMAND...           the ranks, one log each: logs/JOB-RESTART-HOST-RANK.log; torchrun's agents
#                                      log as $task_log in place of the rank, and their ranks by themselves
#   gan_dist_finish $?                 requeues or ends the job by the words that the ranks left
#
# It runs on the job's first node, outside any container, and needs only bash, coreutils and SLURM's own commands.
# Words of one start lie in SUBMISSION/attempts/JOB/RESTART; what became of each start is a line of .../JOB/history:
# restart, what (requeued crashed lost stopped failed cancelled done), newest checkpoint, why; with tabs between them.

gan_dist_begin() {
  set +eufC # whatever a cluster file's job.setup likes: here a command that fails is an answer
  run=$1 submission=$2 pid="" task_log=""
  restart=${SLURM_RESTART_COUNT:-0}
  job=$SLURM_JOB_ID # the last element of an array has its array's number here: name elements as ARRAY_TASK
  if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}; fi
  attempts=$submission/attempts/$job
  attempt=$attempts/$restart
  mkdir -p "$attempt" "$run/logs"
  export GAN_DIST_ATTEMPT=$attempt GAN_DIST_LAUNCH_ID=${submission##*/}-$job PYTHONSAFEPATH=1
  export SLURM_EXPORT_ENV=ALL # the ranks need these, whatever sbatch's --export says of the user's
  # The batch shell outlives the signals that end its ranks, to act on what they say at the end.
  trap : USR2 CONT
  trap gan_dist_overdue TERM
  echo "gan_dist: start $restart of job $job on ${SLURM_JOB_NODELIST:-?}, $(date -u '+%Y-%m-%d %H:%M:%S UTC')"
}

# Names the nodes that cannot take part, before the ranks of all the others wait for them.
gan_dist_preflight() {
  local told
  printf '%s\n' "$job" >"$attempt/here"
  # shellcheck disable=SC2016 # the variables are the node's
  told=$(srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 \
    --kill-on-bad-exit=0 --mpi=none bash -c '
      for try in {1..20}; do [[ -e $1/here ]] && break; ls "${1%/*}" >/dev/null 2>&1; sleep 0.5; done
      if [[ ! -e $1/here ]]; then
        echo "bad: $SLURMD_NODENAME does not see $1: put runs on a file system that all nodes share (job.runs)"
      elif ! command -v "$2" >/dev/null; then
        echo "bad: $SLURMD_NODENAME cannot run $2 (job.python, job.container)"
      fi' preflight "$attempt" "$1" 2>&1) || true
  if [[ $told == *bad:* ]]; then
    told=$(sed -n 's/^bad: //p' <<<"$told" | sort -u | paste -sd ';')
    gan_dist_refuse "$told"
  fi
}

# Ends the job as bad usage, which nobody tries again.
gan_dist_refuse() { # WHY
  printf '%s\t2\terror\t-\t%s\t%s\n' "$(date +%s)" "$(hostname)" "$1" >"$attempt/failed-preflight"
  gan_dist_finish 2
}

gan_dist_srun() {
  export GAN_DIST_LOG=$run/logs/$job-$restart
  # 22.05 and later do not hand the batch script's --cpus-per-task down. Without --kill-on-bad-exit ranks whose sibling
  # died run on until their collective times out.
  srun --unbuffered --kill-on-bad-exit=1 --wait=60 --mpi=none \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    --output="${GAN_DIST_LOG//%/%%}-%N-${task_log:-%t}.log" "$@" 2> >(tee -a "$attempt/srun.err" >&2) &
  pid=$!
  # Behind, because bash hears no signal while it waits for a command in front.
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
  wait "$pid"
}

# At TERM: a time limit or a preemption leaves KillWait seconds to act in, while srun waits for the ranks for longer.
# Of other TERMs nothing comes: a cancelled job ends, and one that has a time of grace goes on.
gan_dist_overdue() {
  local began=$SECONDS wait_s state reason restarts preempted
  kill -0 "$pid" 2>/dev/null || return 0
  trap : TERM # a second one would begin this anew
  wait_s=$(scontrol show config 2>/dev/null | sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p')
  while kill -0 "$pid" 2>/dev/null; do
    if ((SECONDS - began < ${wait_s:-30} - 4)); then
      sleep 1
      continue
    fi
    gan_dist_ask
    if [[ $reason == TimeLimit || -n $preempted ]]; then gan_dist_finish 143; fi
    break
  done
  trap gan_dist_overdue TERM
}

# Sets what the controller says of this job: state, reason, restarts, preempted. RUNNING, a time limit that has just
# passed, or a preemption that cancels (PreemptMode=CANCEL) means that nobody but its own script decides what becomes of
# it; more restarts than this one, that SLURM requeued it.
# Asked by $job: the id of an array's last element is the whole array's.
gan_dist_ask() {
  local try told end
  for try in {1..20}; do # minutes: a controller that restarts is no cancellation, and a job cancelled ends here anyway
    told=$(SLURM_TIME_FORMAT=standard scontrol show job -o "$job" 2>/dev/null)
    if [[ -n $told ]]; then break; fi
    sleep "$try"
  done
  state=$(sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p' <<<"$told")
  reason=$(sed -n 's/.* Reason=\([A-Za-z_]*\).*/\1/p' <<<"$told")
  restarts=$(sed -n 's/.* Restarts=\([0-9]*\).*/\1/p' <<<"$told")
  # It is COMPLETING after a cancellation too, which may fall into a preemption's time of grace: then it ends later.
  preempted=$(sed -n 's/.* PreemptTime=\([0-9][^ ]*\).*/\1/p' <<<"$told")
  end=$(sed -n 's/.* EndTime=\([0-9][^ ]*\).*/\1/p' <<<"$told")
  if [[ -n $preempted ]] && (($(date -d "$end" +%s) - $(date -d "$preempted" +%s) > 1)); then preempted=""; fi
}

# Why this start failed: what a rank said of itself, else what srun saw happen to one, else what survivors guessed.
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
    if [[ -n $rank ]]; then # it ended before it could leave a word
      printf 'lost\trank %s on %s ended, its last line: %s\n' "$rank" "$host" "$(grep . "$GAN_DIST_LOG-$host-${task_log:-$rank}.log" | tail -n 1)"
    else
      printf 'lost\t%s\n' "$(grep -m 1 -hE '^(srun|slurmstepd).*error' "$attempt/srun.err" || echo "srun ended with status $1")"
    fi
  fi
}

gan_dist_note() { # WHAT WHY
  local step
  step=$(cat "$run/checkpoints/latest" 2>/dev/null || echo -)
  printf '%s\t%s\t%s\t%s\n' "$restart" "$1" "$step" "$2" >>"$attempts/history"
  echo "gan_dist: $1 at ${step}: $2"
}

gan_dist_stopped() { # WHY
  if [[ $1 == *"while data were fetched" ]]; then echo "stopped by $1"; else echo "saved and stopped by $1"; fi
}

gan_dist_requeue() {
  local try refused=0
  sync
  trap - TERM # or SLURM would have to wait for the sleeps below
  for try in {1..20}; do # as patient as gan_dist_ask
    if scontrol requeue "$job"; then
      sleep 30 # SLURM ends this script
      exit 75
    fi
    if scontrol ping >/dev/null 2>&1 && ((++refused == 3)); then break; fi # it answers, and means it
    sleep "$try"
  done
  gan_dist_note failed "SLURM refused to requeue the job; submit it again"
  exit 1
}

gan_dist_finish() { # STATUS OF SRUN
  local rc=$1 state reason restarts preempted ours="" what why status step crashes
  if [[ -e $attempt/done ]]; then
    gan_dist_note "done" "$(cat "$attempt/done")"
    exit 0
  fi
  gan_dist_ask
  if [[ $state == RUNNING || $reason == TimeLimit || -n $preempted ]]; then ours=yes; fi
  IFS=$'\t' read -r status why <<<"$(gan_dist_cause "$rc")"
  if ((${restarts:-0} > restart)); then
    if [[ -e $attempt/stopped ]]; then why=$(gan_dist_stopped "$(cut -d' ' -f2- "$attempt/stopped")"); fi
    gan_dist_note lost "SLURM requeued the job: $why"
    exit 75
  fi
  if [[ -z $state ]]; then # cut off, most likely: whatever becomes of the job is decided elsewhere
    gan_dist_note lost "SLURM's controller does not answer from here"
    exit $((rc ? rc : 1))
  fi
  if [[ -e $attempt/stopped ]]; then
    read -r what why <"$attempt/stopped"
    if [[ -z $ours ]]; then
      gan_dist_note cancelled "$(gan_dist_stopped "$why")"
    elif [[ $what == end ]]; then
      gan_dist_note stopped "$why"
    elif ((restart >= ${GAN_DIST_MAX_REQUEUES:-100})); then
      gan_dist_note stopped "requeued $restart times (job.max_requeues); submit it again to go on"
    else
      gan_dist_note requeued "$why"
      gan_dist_requeue
    fi
    exit 75
  fi
  if [[ -z $ours ]]; then
    gan_dist_note cancelled "SLURM ended the job ($state) before the ranks had saved"
    exit $((rc ? rc : 1))
  fi
  if [[ $state != RUNNING && -n $preempted ]]; then # what SLURM's own requeueing (PreemptMode=REQUEUE) would be
    gan_dist_note lost "preempted before the ranks had saved"
    gan_dist_requeue
  fi
  if [[ $reason == TimeLimit ]]; then
    status=lost why="the time limit came before the ranks had saved; raise slurm.signal_lead_s"
  fi
  step=$(cat "$run/checkpoints/latest" 2>/dev/null || echo -)
  crashes=$(awk -F'\t' '$2 == "crashed"' "$attempts/history" 2>/dev/null | wc -l)
  if [[ $status == 2 ]]; then
    gan_dist_note failed "$why"
    exit 2
  elif ((crashes >= ${GAN_DIST_MAX_CRASHES:-3})); then
    gan_dist_note failed "$((crashes + 1)) crashes (job.max_crashes=${GAN_DIST_MAX_CRASHES:-3}), the last one: $why"
    exit 1
  elif [[ $status != lost ]] && awk -F'\t' -v step="$step" '$2 == "crashed" && $3 == step && $5 == "error" { f = 1 } END { exit !f }' "$attempts/history" 2>/dev/null; then
    gan_dist_note failed "failed twice after the same checkpoint ($step): $why"
    exit 1
  fi
  printf '%s\tcrashed\t%s\t%s\t%s\n' "$restart" "$step" "$why" "$([[ $status == lost ]] && echo lost || echo error)" >>"$attempts/history"
  echo "gan_dist: crashed at $step: $why"
  gan_dist_requeue
}

# For the .sbatch files: checks their arguments, and finds code, interpreter and container in the environment.
gan_dist_arguments() { # HOW-MANY USAGE ARGUMENTS...
  local code=${code:?the checkout}
  if (($# - 2 < $1)); then
    echo "gan_dist: expected arguments $2, found $(($# - 2))" >&2
    exit 2
  fi
  export PYTHONPATH=$code${PYTHONPATH:+:$PYTHONPATH}
  read -ra python <<<"${GAN_DIST_CONTAINER:-}"
  python+=("${GAN_DIST_PYTHON:-python}")
}

# Writes down for `python -m launch status` what Submitit's side writes at submission.
gan_dist_record() { # KIND RANKS WORDS...
  [[ -e $submission/job.json ]] || printf '{"id": "%s", "kind": "%s", "job": "%s", "time": %s, "commit": null, "words": [], "ranks": %s}\n' \
    "${submission##*/}" "$1" "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}" "$(date +%s)" "$2" >"$submission/job.json"
}
