"""Re-reads a whole dataset and names every fault, with the command that repairs it."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gan_dist.data.prepare.plan import FOLDER
from gan_dist.data.remote.fetch import masked
from gan_dist.data.shards import Manifest, ShardInfo, member_fault, quick_fault, read_manifest
from gan_dist.utils.errors import UserError
from gan_dist.utils.files import clear_temporaries, expand, write_atomically

COMMAND = "command.json"
"""The file beside the plan with the arguments of the last run, so that a fault can name the command that repairs it."""


Inputs = dict[str, list[int]]
"""Size and modification time, in ns, of each local file that a dataset is made of."""


@dataclass(frozen=True)
class Fault:
    """A fault of a dataset: the `file`, `what` is wrong with it, and how to `repair` it."""

    file: str
    what: str
    repair: str

    def __str__(self) -> str:
        return f"{self.file} {self.what}: {self.repair}"


def verify(root: str | Path, progress: Callable[[int, int], None] | None = None) -> list[Fault]:
    """Returns the faults of the dataset in `root`; none when every byte is as its manifest says. `progress` is called
    with the number of shards read and in all.

    Raises:
        UserError: no dataset there, or its manifest cannot be read.
    """
    root = expand(root)
    command = repair_command(root)
    hidden = ", with your own words for each ***" if "***" in command else ""
    again = f"run `{command}` again{hidden} (it rewrites only what is damaged)"
    try:
        manifest = read_manifest(root)
    except UserError as error:
        what, _, advice = str(error).rpartition(": ")
        raise (UserError(f"{what}: {again}") if advice.startswith("run ") and stored_command(root) else error) from None
    faults: list[Fault] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing and reading release the GIL
        checks = pool.map(lambda shard: list(_shard_faults(root, shard, manifest)), manifest.shards)
        for done, shard_faults in enumerate(checks, 1):
            faults += [Fault(file, what, again) for file, what in shard_faults]
            if progress:
                progress(done, len(manifest.shards))
    faults += [Fault(file, what, again) for file, what in _list_faults(root, manifest)]
    known = {name for shard in manifest.shards for name in (shard.file, shard.sidecar)}
    for path in sorted(root.glob("shard-*")):
        if path.name not in known:
            faults.append(Fault(path.name, "is not in the manifest", f"remove it: rm {shlex.quote(str(path))}"))
    return faults


def _shard_faults(root: Path, shard: ShardInfo, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yields the faults of a shard and its sidecar, as file and text."""
    keys: list[int] = []
    try:
        with (root / shard.file).open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            structure = quick_fault(root, shard, manifest.resolution)
            for member in range(shard.samples if structure is None else 0):
                structure = member_fault(stream, shard, member, manifest.resolution)
                if structure:
                    break
                stream.seek(member * shard.stride)
                keys.append(int(stream.read(9)))
    except OSError as error:
        yield shard.file, f"cannot be read ({error.strerror})"
    else:
        if structure:
            yield shard.file, structure
        elif digest != shard.sha256:
            yield shard.file, "differs from its sha256 in the manifest (pixels were changed)"
    try:
        content = (root / shard.sidecar).read_bytes()
        records = [json.loads(line) for line in content.splitlines()]
        if len(records) != shard.samples:
            yield shard.sidecar, f"has {len(records)} records, expected {shard.samples}"
        elif len(keys) == shard.samples and [record["key"] for record in records] != keys:
            yield shard.sidecar, "names other keys than its shard"
        elif any(not 0 <= record.get("label", 0) < max(1, len(manifest.classes)) for record in records):
            yield shard.sidecar, f"has a label outside 0..{len(manifest.classes) - 1}"
        elif hashlib.sha256(content).hexdigest() != shard.sidecar_sha256:
            yield shard.sidecar, "differs from its sha256 in the manifest"
    except OSError as error:
        yield shard.sidecar, f"cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError) as error:
        yield shard.sidecar, f"is not one JSON record a line ({type(error).__name__})"


def _list_faults(root: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yields the contradictions between the totals, the shards and rejects.jsonl, as file and text."""
    totals = manifest.totals
    written = totals.get("written", manifest.num_samples)
    if written != manifest.num_samples:
        yield "manifest.json", f"counts {written} samples, its shards hold {manifest.num_samples}"
    expected: dict[str, int] = totals.get("rejected", {})
    try:
        lines = (root / "rejects.jsonl").read_bytes().splitlines()
        listed: dict[str, int] = {}
        for line in lines:
            reason = json.loads(line)["reason"]
            listed[reason] = listed.get(reason, 0) + 1
        if listed != expected:
            yield "rejects.jsonl", f"lists {listed}, the manifest counts {expected}"
    except OSError as error:
        if expected:
            yield "rejects.jsonl", f"cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        yield "rejects.jsonl", "is not one JSON record a line"


def store_command(root: Path, sources: Sequence[str], options: dict[str, Any], inputs: Inputs | None) -> None:
    """Stores the command of the dataset in `root`, apart from what is reproducible, since it has absolute paths, and
    size and modification time of the files that it reads. Its secrets are left out: others read a dataset, too."""
    clear_temporaries(root / FOLDER / COMMAND)
    kept = dict(zip(("sources", "options"), _without_secrets(sources, options), strict=True)) | {"inputs": inputs}
    write_atomically(root / FOLDER / COMMAND, json.dumps(kept, indent=1).encode())


def was_made_by(root: Path, sources: Sequence[str], options: dict[str, Any], inputs: Inputs) -> bool:
    """Returns whether the last `prepare` into `root` had these sources and options, whatever their secrets, and read
    these files."""
    try:
        read = json.loads((root / FOLDER / COMMAND).read_bytes()).get("inputs", {})
    except (OSError, ValueError, AttributeError):
        return False
    return stored_command(root) == _without_secrets(sources, options) and read == inputs


def _without_secrets(sources: Sequence[str], options: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    options = {name: masked(value) if isinstance(value, str) else value for name, value in options.items()}
    return [masked(source) for source in sources], options


def stored_command(root: Path) -> tuple[list[str], dict[str, Any]] | None:
    """Returns the sources and options of the last `prepare` into `root`, or None when they are not known."""
    try:
        command = json.loads((root / FOLDER / COMMAND).read_bytes())
        # One that an earlier release stored has its secrets still.
        return _without_secrets([str(source) for source in command["sources"]], dict(command["options"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def repair_command(root: Path) -> str:
    """Returns the `gan-dist prepare` command line that made the dataset in `root`, as far as it is known."""
    sources, options = stored_command(root) or (["SOURCE..."], {})
    words = ["gan-dist", "prepare", *sources, str(root)]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words)
