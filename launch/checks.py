"""What can be known before a job waits for hours: its dataset, interpreter, shape and disk; one line each."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gan_dist.config.schema import FEWEST_FOR_ENCODER, FEWEST_SAMPLES, Config
from gan_dist.data.remote.fetch import RetryPolicy, redacted
from gan_dist.data.shards import Manifest, check_classes, check_resolution, fetch_manifest, read_manifest
from gan_dist.utils.errors import GanDistError, UserError
from gan_dist.utils.files import expand, is_address
from launch import slurm
from launch.options import ClusterOptions, SlurmOptions, gpus_in
from launch.snapshot import CHECKOUT

CODE_MIB = 50
"""Room for a snapshot of the code, and logs."""
INTERPRETER_S = 60
MANY = 200
"""Classes that a checkpoint has room for here; a thousand more would take 2 MB."""


def check_all(settings: Config, cluster: ClusterOptions, run: Path) -> None:
    """Raises UserError with one line for the first thing that would fail once the job runs. `run` may not exist yet."""
    check_dataset(settings)
    check_cluster(settings, cluster, run)


def check_cluster(settings: Config, cluster: ClusterOptions, run: Path) -> None:
    """Raises UserError as check_all, for all but the dataset, which a pipeline prepares first."""
    check_interpreter(cluster)
    check_partition(cluster.slurm)
    check_disk(settings, run)


def check_dataset(settings: Config) -> str:
    """Returns the identity of the dataset, the sha256 of its manifest; nothing of one that is not seen from here.

    Raises UserError unless the manifest is there, opens and fits the configuration.
    """
    manifest = find_manifest(settings)
    check_fit(settings, manifest)
    return manifest.identity if manifest else ""


def find_manifest(settings: Config) -> Manifest | None:
    """Returns the dataset's table of contents. Raises UserError unless it is there and opens.

    A remote one that does not answer from here may answer from the nodes: that is a note, and None.
    """
    address = settings.data.shards
    try:
        return fetch_manifest(address, RetryPolicy(tries=2))[0] if is_address(address) else read_manifest(address)
    except GanDistError as error:
        if isinstance(error, UserError):
            raise
        print(f"note: {error}; the nodes will try again", file=sys.stderr, flush=True)
        return None


def check_fit(settings: Config, manifest: Manifest | None) -> None:
    """Raises UserError unless a dataset has what a run asks of it: the model's resolution, labels, images to compare;
    and what they are compared by is there.

    None: it is not seen from here.
    """
    if manifest is None:
        return
    where, model, evaluate = redacted(settings.data.shards), settings.model, settings.evaluate
    check_resolution(model.resolution, manifest.resolution, where)
    if model.classes == "dataset" and (counts := manifest.class_counts) is not None:
        check_classes(manifest.classes, counts, model.classes_min_images, where)
    if not evaluate.every_steps:
        return
    by_encoder = evaluate.encoder not in ("auto", "none")
    if by_encoder and not expand(evaluate.encoder).is_file():
        raise UserError(f"evaluate.encoder: {evaluate.encoder} is no file; `gan-dist encoder DATASET` learns one")
    fewest, held = FEWEST_FOR_ENCODER if by_encoder else FEWEST_SAMPLES, manifest.num_samples
    if held < fewest:
        raise UserError(f"{where} holds {held} images; these metrics need {fewest} or more real ones")
    if evaluate.samples < fewest:
        raise UserError(f"evaluate.samples: expected {fewest} or more for these metrics, found {evaluate.samples}")
    if evaluate.samples > held:
        raise UserError(
            f"evaluate.samples: expected {held} or fewer, as many as {where} holds, found {evaluate.samples}"
        )
    if evaluate.held_out and not is_address(evaluate.held_out):
        check_resolution(model.resolution, read_manifest(evaluate.held_out).resolution, evaluate.held_out)


def check_interpreter(cluster: ClusterOptions) -> None:
    """Raises UserError when job.python is here, and cannot run gan_dist.

    Behind a container or after job.setup it is another environment: the job itself checks those first of all.
    """
    python, job = cluster.job.python, cluster.job
    if not python or job.container or job.setup or not shutil.which(python):
        return
    with tempfile.TemporaryDirectory() as attempt:
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        env = {**kept, **job.env, "GAN_DIST_ATTEMPT": attempt, "SLURM_PROCID": "0", "PYTHONSAFEPATH": "1"}
        env["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
        words = [python, str(CHECKOUT / "launch" / "job"), "preflight"]
        try:
            done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=INTERPRETER_S, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            raise UserError(f"job.python: cannot run {python}: {error}") from None
    if done.returncode:
        said = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
        raise UserError(f"job.python: {python} cannot run gan_dist: {said[-1] if said else done.returncode}")


def check_partition(options: SlurmOptions) -> None:
    """Raises UserError when the partition has not so many nodes of the processors and GPUs that are asked for.

    Where SLURM does not enforce limits at submission (EnforcePartLimits), such a job would wait for ever. Whether nodes
    are free, or allowed to this account, only SLURM knows.
    """
    if slurm.config("EnforcePartLimits") in ("all", "any", "yes") or {"nodelist", "clusters"} & options.extra.keys():
        return
    try:
        answer = slurm.run("sinfo", "-h", "-a", "-e", "-o", "%D|%c|%G|%P")
    except GanDistError:
        return  # sbatch will say whether there is a cluster
    name = options.partition or os.environ.get("SBATCH_PARTITION")
    rows = [line.split("|") for line in answer.splitlines() if line.count("|") == 3]
    groups = [
        (int(nodes), int(processors.rstrip("+")), gpus_in(gres))
        for nodes, processors, gres, partition in rows
        if (partition.rstrip("*") in name.split(",") if name else partition.endswith("*"))
    ]
    if not groups:
        return
    wanted = int(str(options.nodes).partition("-")[0])
    processors, gpus = options.ranks_per_node * (options.cpus_per_task or 1), options.gpus
    fitting = sum(nodes for nodes, each, of_gpus in groups if each >= processors and of_gpus >= gpus)
    if fitting < wanted:
        has = [f"{count} of {each} processors" + _and_gpus(of_gpus) for count, each, of_gpus in groups]
        shape = f"{processors} processors (slurm.cpus_per_task x {options.ranks_per_node} rank(s)){_and_gpus(gpus)}"
        raise UserError(
            f"slurm.nodes: expected at most {fitting} node(s) with {shape}, found {wanted}; partition "
            f"{name or 'by default'} has {', '.join(has)}"
        )


def _and_gpus(count: int) -> str:
    return f" and {count} GPUs" if count else ""


def check_disk(settings: Config, run: Path) -> None:
    """Raises UserError unless the run's file system has room for the code and two checkpoints, newest and next."""
    at = next(folder for folder in (run, *run.parents) if folder.exists())
    needed = CODE_MIB * 2**20 + 2 * checkpoint_bytes(settings)
    free = shutil.disk_usage(at).free
    if free < needed:
        raise UserError(
            f"{at} has {free / 2**20:,.0f} MiB free, but the code and two checkpoints take {needed / 2**20:,.0f} MiB; "
            f"free some space, or put runs elsewhere (job.runs): {shlex.quote(str(run))}"
        )


def checkpoint_bytes(settings: Config) -> int:
    """Returns how large a checkpoint is: float32 weights of both networks, Adam's two moments, the average of G.

    Networks are built without memory for their weights. How many classes there are, only the dataset knows: MANY.
    """
    import torch  # takes seconds, and only this needs it

    from gan_dist.data.classes import NO_CLASSES, Classes
    from gan_dist.model.networks import build_discriminator, build_generator

    model = settings.model.model_dump()
    classes = Classes(tuple(map(str, range(MANY)))) if settings.model.classes == "dataset" else NO_CLASSES
    with torch.device("meta"):
        built = build_generator(model, classes), build_discriminator(model, classes)
    generator, discriminator = (sum(each.numel() for each in network.parameters()) for network in built)
    averages = 1 if settings.train.ema_half_life_images else 0
    return 4 * (3 * (generator + discriminator) + averages * generator)
