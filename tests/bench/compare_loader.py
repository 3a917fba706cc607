"""The stream against stock webdataset on the same shards, and against memcpy: one core, random order, warm.

`python -m tests.bench.compare_loader [--images 50000] [--rounds 5] [--seconds 2] [--mosaic PYTHON] [--labels] [--json]
[--at-least RATIO]`

All contenders take turns within each round, pinned to one core that all their threads share; rates are by its CPU
seconds, so that others on the machine do not count (nothing here waits for a disk). They read a dataset of noise made
on the spot (.npy samples at 64x64, batch 128), which costs a reader the same as paintings: nothing is compressed.
Figures are medians over the rounds, ratios are medians of the rounds' ratios. Memory is measured in two ways:
`memcpy` copies whole consecutive batches, as no shuffled reader can; `memcpy_random` copies the same images in the
stream's order, out of one dense tensor in memory.
`--mosaic` names a Python with mosaicml-streaming (it is no dependency of the project).
`--labels` compares our streams with themselves instead: what classes beside the images cost, in each placement.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import webdataset

from gan_dist.bench.loader import memcpy_rate
from gan_dist.data.classes import Labels, choose_classes
from gan_dist.data.dataset import Dataset, open_dataset
from gan_dist.data.order import Order
from gan_dist.data.stream import Stream
from tests.helpers.datasets import write_dataset

BATCH, SIZE = 128, 64
CPU = torch.device("cpu")

MOSAIC = """
import json, sys, time
import numpy as np, torch
from streaming import MDSWriter, StreamingDataset
torch.set_num_threads(1)
folder, images, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
noise = np.random.default_rng(0)
with MDSWriter(out=folder, columns={"x": "ndarray:uint8:3,64,64"}, compression=None) as out:
    for _ in range(images):
        out.write({"x": noise.integers(0, 256, (3, 64, 64), dtype=np.uint8)})
data = StreamingDataset(local=folder, shuffle=True, batch_size=128)
loader = torch.utils.data.DataLoader(data, batch_size=128, num_workers=0)
def epochs():
    while True:
        yield from loader
batches = epochs()
for _ in range(images // 128 + 1):
    next(batches)
print("ready", flush=True)
for line in sys.stdin:
    done, began = 0, time.process_time()
    while time.process_time() - began < seconds:
        done += len(next(batches)["x"])
    print(done / (time.process_time() - began), flush=True)
"""


def rate(step: Callable[[], Any], seconds: float) -> float:
    """Returns images per CPU second of `step`, which brings one batch."""
    done, began = 0, time.process_time()
    while (spent := time.process_time() - began) < seconds:
        done += len(step())
    return done / spent


def stock(dataset: Dataset) -> Callable[[], torch.Tensor]:
    """Returns what brings the next batch of webdataset as its manual has it: shards and samples shuffled."""
    urls = [str(dataset.root / shard.file) for shard in dataset.manifest.shards]
    pipeline = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).decode().to_tuple("npy").batched(BATCH)

    def forever() -> Any:
        while True:
            yield from pipeline

    batches = forever()
    return lambda: torch.as_tensor(next(batches)[0])


class Mosaic:
    """mosaicml-streaming in a Python of its own, on the same core."""

    def __init__(self, python: str, folder: Path, images: int, seconds: float) -> None:
        command = [python, "-c", MOSAIC, str(folder), str(images), str(seconds)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read("ready")

    def _read(self, start: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start) or (not start and line[:1].isdigit()):
                return line
        raise RuntimeError("mosaicml-streaming ended")

    def rate(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return float(self._read(""))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def compare(images: int, rounds: int, seconds: float, mosaic: str | None) -> dict[str, Any]:
    """Returns medians in images/s, and the ratios that matter."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        per_shard = 4096
        write_dataset(folder / "set", (per_shard,) * -(-images // per_shard), SIZE)
        dataset = stack.enter_context(open_dataset(folder / "set"))
        order = Order(dataset.shard_sizes, 0)
        for i in range(len(dataset.shard_sizes)):
            dataset.warm(i)
        dense = torch.cat([dataset.shard_view(i) for i in range(len(dataset.shard_sizes))]).flatten(1)
        out = torch.empty(BATCH, dense.shape[1], dtype=torch.uint8)
        position = 0

        def random_copy() -> torch.Tensor:
            nonlocal position
            samples = torch.from_numpy(order.indices(position, position + BATCH))
            position += BATCH
            return torch.index_select(dense, 0, samples, out=out)

        stream = stack.enter_context(Stream(dataset, order, position=0, global_batch=BATCH, device=CPU))
        for _ in range(dataset.num_samples // BATCH):
            stream.next()  # every page mapped once: warm
        plain = stock(dataset)
        ways: dict[str, Callable[[], float]] = {
            "gan_dist": lambda: rate(stream.next, seconds),
            "webdataset": lambda: rate(plain, seconds),
            "memcpy": lambda: memcpy_rate(SIZE, BATCH, seconds, time.process_time),
            "memcpy_random": lambda: rate(random_copy, seconds),
        }
        if mosaic:
            other = Mosaic(mosaic, folder / "mds", dataset.num_samples, seconds)
            stack.callback(other.close)
            ways["mosaicml_streaming"] = other.rate
        rounds_of: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds):
            for name in list(ways)[:: 1 if turn % 2 == 0 else -1]:
                rounds_of[name].append(ways[name]())

    def ratio(other: str) -> float:
        return statistics.median(a / b for a, b in zip(rounds_of["gan_dist"], rounds_of[other], strict=True))

    return {
        **{name: round(statistics.median(values)) for name, values in rounds_of.items()},
        **{f"over_{name}": round(ratio(name), 3) for name in rounds_of if name != "gan_dist"},
        "images": dataset.num_samples,
        "rounds": rounds,
        "load_average": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "webdataset_version": webdataset.__version__,
    }


PLACEMENTS = ("memory", "device", "windowed")
"""`device` is host memory here: the same gathers in one dense tensor."""
NUM_CLASSES = 30


def compare_labels(images: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Returns for each placement the medians in images/s without and with labels, and the ratio of the latter."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    sizes = (1024,) * -(-images // 1024)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        names = tuple(f"class {number}" for number in range(NUM_CLASSES))
        write_dataset(
            folder / "set", sizes, SIZE, labels=[key % NUM_CLASSES for key in range(sum(sizes))], classes=names
        )
        dataset = stack.enter_context(open_dataset(folder / "set"))
        classes = choose_classes(dataset, 100)
        streams: dict[str, Stream] = {}
        for placement in PLACEMENTS:
            order = Order(dataset.shard_sizes, 0, 16 if placement == "windowed" else 0)
            for suffix, labels in (("", None), ("_labels", Labels(dataset, classes))):
                settings: dict[str, Any] = {"device": CPU, "placement": placement, "labels": labels}
                stream = stack.enter_context(Stream(dataset, order, position=0, global_batch=BATCH, **settings))
                for _ in range(dataset.num_samples // BATCH):
                    stream.next()  # warm, and the labels are read
                assert (stream.classes is not None) == bool(suffix)
                streams[placement + suffix] = stream
        rounds_of: dict[str, list[float]] = {name: [] for name in streams}
        for turn in range(rounds):
            for name in list(streams)[:: 1 if turn % 2 == 0 else -1]:
                rounds_of[name].append(rate(streams[name].next, seconds))
    result: dict[str, Any] = {name: round(statistics.median(values)) for name, values in rounds_of.items()}
    for name in PLACEMENTS:
        pairs = zip(rounds_of[f"{name}_labels"], rounds_of[name], strict=True)
        result[f"{name}_with_over_without"] = round(statistics.median(a / b for a, b in pairs), 3)
    load = round(os.getloadavg()[0], 1)
    return result | {"images": sum(sizes), "rounds": rounds, "load_average": load, "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--mosaic", metavar="PYTHON")
    parser.add_argument("--labels", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--at-least", type=float, default=None, help="exit with 1 when the share of memcpy is lower")
    options = parser.parse_args()
    if options.labels:
        result = compare_labels(options.images, options.rounds, options.seconds)
    else:
        result = compare(options.images, options.rounds, options.seconds, options.mosaic)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:24} {value}")
    if options.at_least and result.get("over_memcpy", 0) < options.at_least:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
