"""Preparation against the plain way: full decode, convert, LANCZOS, which is what StyleGAN's dataset tool does.

`python -m tests.bench.compare_prepare [--textures FOLDER] [--rounds 7] [--json]`

On pictures of 2000x1500 made on the spot (baseline JPEGs of about 835 KB, and the same as progressive and CMYK JPEGs
and PNGs), one core, CPU seconds, both ways interleaved picture by picture, medians. Then `bench prepare` with one and
two workers, wall time, interleaved too, beside what two independent processes that only decode gain over one at the
same moment: on a busy machine that is the limit. Rounds in which other programs took half a core or more are left out
as long as there are quieter ones. `--textures`: a folder of real photographs or paintings to take the
texture from (default: procedural paintings).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic, process_time
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from gan_dist.bench.prepare import bench_prepare
from gan_dist.data.prepare.images import Recipe, square
from gan_dist.data.prepare.synthetic import paint

SIZE = (2000, 1500)
KINDS = {"baseline": 12, "progressive": 1, "cmyk": 1, "png": 1}
"""Pictures of each kind: nearly all are baseline JPEGs, as in Kaggle's set; each kind is also reported by itself."""
TARGET_BYTES = 835_000


def plain(data: bytes, size: int = 64) -> NDArray[np.uint8]:
    """Returns the picture the plain way, uint8 (3, S, S)."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    target = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    image = image.resize(target, Image.Resampling.LANCZOS)
    left, top = round((target[0] - size) / 2), round((target[1] - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def floor(data: bytes) -> None:
    """Reads and entropy-decodes a JPEG, and hardly more."""
    with Image.open(io.BytesIO(data)) as image:
        image.draft(None, (1, 1))
        image.load()


def make_pictures(textures: Path | None) -> dict[str, list[bytes]]:
    """Returns the files by kind."""
    sources = sorted(path for path in textures.iterdir() if path.stat().st_size > 60_000) if textures else []
    made: dict[str, list[bytes]] = {kind: [] for kind in KINDS}
    for i in range(max(KINDS.values())):
        image = Image.open(sources[i % len(sources)]).convert("RGB") if sources else paint(i, 0, SIZE)
        image = image.convert("RGB").resize(SIZE, Image.Resampling.LANCZOS)
        grain = np.random.default_rng(i).normal(0, 5, (SIZE[1], SIZE[0], 1))
        image = Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))
        quality = _quality_for(image)
        for kind, count in KINDS.items():
            if i < count:
                stream = io.BytesIO()
                picture = image.convert("CMYK") if kind == "cmyk" else image
                options: dict[str, Any] = (
                    {} if kind == "png" else {"quality": quality, "progressive": kind == "progressive"}
                )
                picture.save(stream, "PNG" if kind == "png" else "JPEG", **options)
                made[kind].append(stream.getvalue())
    return made


def _quality_for(image: Image.Image) -> int:
    """Returns the JPEG quality that comes nearest to TARGET_BYTES."""
    sizes = {}
    for quality in range(60, 97, 4):
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality)
        sizes[quality] = abs(stream.tell() - TARGET_BYTES)
    return min(sizes, key=lambda quality: sizes[quality])


def compare_one_core(pictures: dict[str, list[bytes]], rounds: int) -> dict[str, Any]:
    """Returns, by kind and for all, both ways' images/s, their ratio, the mean difference and the floor's share."""
    recipe = Recipe(64)
    ways = {"plain": plain, "ours": lambda data: square(data, recipe).pixels}
    times: dict[tuple[str, str, int], list[float]] = {}
    for _ in range(rounds):
        for kind, files in pictures.items():
            for number, data in enumerate(files):
                for way in (*ways, *(["floor"] if kind != "png" else [])):
                    began = process_time()  # CPU seconds: what a core does, whoever else shares the machine
                    floor(data) if way == "floor" else ways[way](data)
                    times.setdefault((way, kind, number), []).append(process_time() - began)
    result: dict[str, Any] = {}
    for name, kinds in {**{kind: [kind] for kind in KINDS}, "all": list(KINDS)}.items():
        spent = {
            way: sum(statistics.median(times[way, kind, i]) for kind in kinds for i in range(len(pictures[kind])))
            for way in (*ways, *(["floor"] if "png" not in kinds else []))
        }
        files = [data for kind in kinds for data in pictures[kind]]
        apart = [np.abs(square(data, recipe).pixels.astype(int) - plain(data)).mean() for data in files]
        result[name] = {
            "images": len(files),
            "mean_kb": round(statistics.mean(map(len, files)) / 1000),
            "plain_images_per_second": round(len(files) / spent["plain"], 1),
            "images_per_second": round(len(files) / spent["ours"], 1),
            "ratio": round(spent["plain"] / spent["ours"], 2),
            "mean_difference": round(float(statistics.mean(apart)), 3),
            "share_of_floor": round(spent["floor"] / spent["ours"], 3) if "floor" in spent else None,
        }
    return result


def compare_workers(pictures: dict[str, list[bytes]], rounds: int) -> dict[str, Any]:
    """Returns the images/s of reading, decoding and writing with one and two workers (wall time, once they have
    started), the median of their ratio, and how many cores other programs took in each round."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "in")
        source.mkdir()
        for copy in range(20):
            for kind in ("baseline", "progressive"):
                for number, data in enumerate(pictures[kind]):
                    (source / f"{copy}-{kind}-{number}.jpg").write_bytes(data)
        rows: list[dict[str, float]] = []
        for turn in range(rounds):
            row = {"independent": _independent(source, 2) / _independent(source, 1)}
            began, busy, own = monotonic(), _busy(), _own()
            for workers in (1, 2) if turn % 2 == 0 else (2, 1):
                row[str(workers)] = bench_prepare(source, workers=workers)["images_per_second"]
            row["others"] = ((_busy() - busy) - (_own() - own)) / (monotonic() - began)
            rows.append(row)
    quiet = [row for row in rows if row["others"] < _QUIET] or rows
    ratios = [round(row["2"] / row["1"], 2) for row in quiet]
    return {
        "one_worker": round(statistics.median(row["1"] for row in quiet), 1),
        "two_workers": round(statistics.median(row["2"] for row in quiet), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": ratios,
        "independent_processes": round(statistics.median(row["independent"] for row in quiet), 2),
        "others_cores": [round(row["others"], 1) for row in rows],
    }


_QUIET = 0.5
"""Rounds in which other programs took this many cores are left out, as long as any is left."""


def _busy() -> float:
    """Returns the CPU seconds that this machine has spent, on whatever."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    """Returns the CPU seconds of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


_DECODE = """
import sys, time
from pathlib import Path
from gan_dist.data.prepare.images import Recipe, square
files = [path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())[:20]]
square(files[0], Recipe())
end, count = time.monotonic() + 4, 0
while time.monotonic() < end:
    square(files[count % len(files)], Recipe())
    count += 1
print(count)
"""


def _independent(source: Path, processes: int) -> float:
    """Returns the pictures that `processes` decode in a few seconds without having anything to do with one another."""
    command = [sys.executable, "-c", _DECODE, str(source)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return sum(float(process.communicate()[0]) for process in running)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--textures", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    pictures = make_pictures(options.textures)
    load = os.getloadavg()[0]
    result: dict[str, Any] = {
        "one_core": compare_one_core(pictures, options.rounds),
        "workers": compare_workers(pictures, options.rounds),
    }
    result |= {"load_average": {"before": round(load, 1)}, "pillow": PIL.__version__}
    if options.json:
        print(json.dumps(result))
        return
    for name, row in {**result["one_core"], "workers": result["workers"]}.items():
        print(f"{name:12}", "  ".join(f"{key} {value}" for key, value in row.items()))
    print(f"load average before: {load:.1f}; Pillow {PIL.__version__}")


if __name__ == "__main__":
    main()
