# shellcheck shell=bash
# What slurm/lib.sh runs on each node of a job before the ranks: bash -c "$(<preflight.sh)" preflight ATTEMPT CHECK PYTHON...
attempt=$1 check=$2
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
elif ! said=$("$@" "$check" 2>&1); then
  echo "bad: $SLURMD_NODENAME cannot run gan_dist with $* (job.python, job.container): ${said##*$'\n'}"
fi
