"""What an outer allocation, array, step, torchrun or MPI left behind in an environment, and would steer a job by.

One place for all doors: `launch submit` and `launch local` drop it before they start anything; the batch script of each
job, that of a plain sbatch file too, drops or corrects it by what the controller says of the job:

    source <(python3 -I launch/job environment)       prints the lines for bash

Needs nothing but Python 3.6 and its standard library.
"""

import os
import re
import shlex
import subprocess
from typing import Dict, Mapping, Optional

WORLD = re.compile(
    "RANK|(LOCAL|GROUP|ROLE)_RANK|((LOCAL|GROUP|ROLE)_)?WORLD_SIZE|ROLE_NAME|MASTER_(ADDR|PORT)"
    "|(TORCHELASTIC|PET|PMI|PMIX|OMPI|SUBMITIT|SRUN)_.*|GAN_DIST_(ATTEMPT|LAUNCH_ID|LOG|RANKS)"
)
"""Variables of another world of ranks: torchrun's, MPI's, Submitit's, ours."""
STEP = re.compile(
    "SLURM_(STEP.*|SRUN_.*|LAUNCH_.*|CPU_BIND.*|MEM_.*|HOSTFILE|EXACT|EXCLUSIVE|OVERLAP|LABELIO|TIMELIMIT|IMMEDIATE"
    "|WORKING_DIR|REMOTE_CWD|DEPENDENCY|THREADS|STD(IN|OUT|ERR)MODE|WAIT|NO_KILL|PTY_.*|UMASK)"
)
"""Variables that srun leaves to its tasks, or reads as options, and sbatch never sets for the srun of its job.

Without SLURM_MEM_PER_* a step has the memory of its job.
"""
SHAPE = re.compile(
    "SLURM_(HINT|DISTRIBUTION|DIST_.*|THREADS_PER_CORE|GPU_BIND|GPU_FREQ|GRES_FLAGS|OVERCOMMIT|PROFILE|NETWORK|ACCTG_FREQ"
    "|CPU_FREQ_REQ|SPREAD_JOB|USE_MIN_NODES|NTASKS_PER_(CORE|SOCKET|GPU|TRES)|CORE_SPEC|THREAD_SPEC|BCAST|RESV_PORTS)"
)
"""Options that sbatch passes on to srun, if they are the job's own; from within a step they are the step's."""
OF_JOB = {
    "SLURM_RESTART_COUNT": "Restarts",
    "SLURM_NTASKS": "NumTasks",
    "SLURM_NPROCS": "NumTasks",
    "SLURM_CPUS_PER_TASK": "CPUs/Task",
    "SLURM_NTASKS_PER_NODE": "NtasksPerN:B:S:C",
}
"""Variables that a job sets only where it asked for something, and that are another job's otherwise."""
GPU_OPTIONS = {"SLURM_GPUS": "TresPerJob", "SLURM_GPUS_PER_NODE": "TresPerNode", "SLURM_GPUS_PER_TASK": "TresPerTask"}
SHARES = {"SLURM_CPUS_PER_GPU": "CpusPerTres", "SLURM_TRES_PER_TASK": "TresPerTask"}
"""Options of a job with the fields that it has then. Next to another job's, srun refuses --cpus-per-task."""


def of_other_jobs(name: str) -> bool:
    """Returns whether a variable is never to be passed on to a new job: all that a job or a world exports."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")
    if name.startswith(("SLURM_", "SBATCH_CPU_BIND", "SBATCH_MEM_BIND", "SLURMD_")):
        return name not in kept
    return WORLD.fullmatch(name) is not None


def corrections(env: Mapping[str, str], job: str) -> Dict[str, Optional[str]]:
    """Returns {variable: its right value, or None to unset it} for a batch script's environment.

    `job` is the controller's line about the job; without one, only what is certain is dropped.
    """
    changed = {name: None for name in env if WORLD.fullmatch(name) or STEP.fullmatch(name)}  # type: Dict[str, Optional[str]]
    if any(name in env for name in ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_SRUN_COMM_PORT")):
        changed.update((name, None) for name in env if SHAPE.fullmatch(name))
    job = re.sub(r" JobName=.*? UserId=", " UserId=", job)
    fields = dict(re.findall(r"(\S+?)=(\S*)", job))
    if not fields:
        return changed
    for name, field in OF_JOB.items():
        value = fields.get(field, "").partition(":")[0]
        if name in env and value.isdigit() and value != env[name]:
            changed[name] = value if value != "0" else None
    if "ArrayTaskId" not in fields:
        changed.update((name, None) for name in env if name.startswith("SLURM_ARRAY_"))
    elif fields["ArrayTaskId"].isdigit():
        changed.update(SLURM_ARRAY_JOB_ID=fields["ArrayJobId"], SLURM_ARRAY_TASK_ID=fields["ArrayTaskId"])
    tres = [name for name, value in fields.items() if "tres" in name.lower() and "gpu" in value]
    if not tres:
        changed.update((name, None) for name in env if name.startswith(("SLURM_GPU", "SLURM_JOB_GPUS")))
    elif any(name in tres for name in GPU_OPTIONS.values()):
        changed.update((name, None) for name, field in GPU_OPTIONS.items() if name in env and field not in tres)
    changed.update((name, None) for name, field in SHARES.items() if field not in fields)
    return {name: value for name, value in changed.items() if value is not None or name in env}


def main() -> None:
    """Prints the lines that correct the environment of this job's batch script."""
    job = os.environ.get("SLURM_JOB_ID", "")
    words = ["scontrol", "show", "job", "-o", job]
    try:  # of an array's last element, whose id is the array's, this answers with a line for each
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60)
        lines = done.stdout.decode("utf-8", "replace").splitlines()
    except (OSError, subprocess.SubprocessError):
        lines = []
    line = next((line for line in lines if line.startswith("JobId=%s " % job)), "")
    for name, value in sorted(corrections(os.environ, line).items()):
        print("unset %s" % name if value is None else "export %s=%s" % (name, shlex.quote(value)))


if __name__ == "__main__":
    main()
