# shellcheck shell=bash disable=SC2154 # names of slurm/lib.sh, which sources this
# What only the .sbatch files need.

# Checks their arguments, and takes code, interpreter and container from the environment.
gan_dist_arguments() { # COUNT USAGE ARGUMENTS...
  if (($# - 2 < $1)); then
    echo "gan_dist: expected arguments $2, found $(($# - 2))" >&2
    exit 2
  fi
  export PYTHONPATH=$gan_dist_code${PYTHONPATH:+:$PYTHONPATH}
  read -ra python <<<"${GAN_DIST_CONTAINER:-}"
  python+=("${GAN_DIST_PYTHON:-python}")
}

# Writes job.json for `python -m launch status`, as `python -m launch submit` does.
gan_dist_record() { # KIND RANKS
  [[ -e $submission/job.json ]] || printf '{"id": "%s", "kind": "%s", "job": "%s", "time": %s, "commit": null, "words": [], "ranks": %s}\n' \
    "${submission##*/}" "$1" "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}" "$(date +%s)" "$2" >"$submission/job.json"
}
