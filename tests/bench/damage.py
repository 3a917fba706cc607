"""How much damage preparation finds: a table of formats and kinds of damage, and what looking for it costs.

`python -m tests.bench.damage [--count 50] [--seed 0] [--only "WebP with alpha" ...]`

Every picture is encoded in every format and damaged in every way, `count` times each, from a seed. A damage is harmful
if plain Pillow fails on the file, or gives a square that differs by more than 2 of 255 on average from that of the
sound file. Of harmful damages, those count as found for which the picture is rejected or flagged. Sound files must
never be.
"""

from __future__ import annotations

import argparse
import io
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from time import process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gan_dist.data.prepare.account import Rejected
from gan_dist.data.prepare.images import Recipe, square
from gan_dist.data.prepare.synthetic import paint

LIMIT = 2.0
"""Mean difference, of 255, from which on a square counts as another picture."""
RECIPE = Recipe(64)
FORMATS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "JPEG": ("JPEG", "RGB", {"quality": 90}),
    "JPEG, optimised": ("JPEG", "RGB", {"quality": 85, "optimize": True}),
    "JPEG, progressive": ("JPEG", "RGB", {"quality": 85, "progressive": True}),
    "JPEG, restart markers": ("JPEG", "RGB", {"quality": 90, "restart_marker_rows": 1}),
    "JPEG, gray": ("JPEG", "L", {"quality": 90}),
    "JPEG, CMYK": ("JPEG", "CMYK", {"quality": 90}),
    "PNG": ("PNG", "RGB", {}),
    "PNG, palette": ("PNG", "P", {}),
    "GIF": ("GIF", "P", {}),
    "WebP": ("WEBP", "RGB", {"quality": 90}),
    "WebP with alpha": ("WEBP", "RGBA", {"quality": 90}),
    "WebP, lossless": ("WEBP", "RGB", {"lossless": True}),
    "AVIF": ("AVIF", "RGB", {"quality": 80}),
    "JPEG 2000": ("JPEG2000", "RGB", {"quality_mode": "rates", "quality_layers": [8]}),
    "TIFF, deflate": ("TIFF", "RGB", {"compression": "tiff_adobe_deflate"}),
    "TIFF, LZW": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "TIFF, JPEG": ("TIFF", "RGB", {"compression": "jpeg"}),
    "QOI": ("QOI", "RGB", {}),
    "TGA, RLE": ("TGA", "RGB", {"compression": "tga_rle"}),
    "BMP without compression": ("BMP", "RGB", {}),
    "PPM without compression": ("PPM", "RGB", {}),
    "TIFF without compression": ("TIFF", "RGB", {}),
}
Damage = Callable[[bytes, int, np.random.Generator], bytes]


def _over(data: bytes, place: int, new: bytes) -> bytes:
    return data[:place] + new + data[place + len(new) :]


DAMAGES: dict[str, Damage] = {
    "one bit": lambda data, place, rng: _over(data, place, bytes([data[place] ^ 1 << int(rng.integers(8))])),
    "4 bytes": lambda data, place, rng: _over(data, place, rng.bytes(4)),
    "512 bytes zero": lambda data, place, rng: _over(data, place, bytes(512)),
    "512 bytes random": lambda data, place, rng: _over(data, place, rng.bytes(512)),
    "512 bytes lost": lambda data, place, rng: data[:place] + data[place + 512 :],
    "512 bytes twice": lambda data, place, rng: data[: place + 512] + data[place:],
    "cut": lambda data, place, rng: data[:place],
    "cut, filled with zeros": lambda data, place, rng: data[:place] + bytes(len(data) - place),
    "line ends": lambda data, place, rng: data.replace(b"\n", b"\r\n"),
}


def picture(seed: int, mode: str) -> Image.Image:
    """Returns a small painting with some grain."""
    image = np.asarray(paint(seed, 0, (320, 240)).convert("RGB"))
    grain = np.random.default_rng(seed).normal(0, 4, (*image.shape[:2], 1))
    made = Image.fromarray((image + grain).clip(0, 255).astype(np.uint8))
    if mode == "RGBA":
        y, x = np.mgrid[0:240, 0:320]
        made.putalpha(Image.fromarray((300 - 1.6 * np.hypot(x - 160, y - 120)).clip(0, 255).astype(np.uint8)))
    return made.quantize(200) if mode == "P" else made.convert(mode)


def encode(seed: int, name: str) -> bytes:
    """Returns picture `seed` as a file of the format `name`."""
    format, mode, options = FORMATS[name]
    stream = io.BytesIO()
    picture(seed, mode).save(stream, format, **options)
    return stream.getvalue()


def pillow(data: bytes) -> NDArray[np.int64] | None:
    """Returns what plain Pillow makes of a file, about as a square, or None where it fails."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB").resize((85, 64), Image.Resampling.BOX)
    except Exception:
        return None
    return np.asarray(image).astype(np.int64)


def outcome(data: bytes) -> str:
    """Returns what preparation says of a file: a reason, its flags, or nothing."""
    try:
        return ", ".join(flag for flag in square(data, RECIPE).flags if flag != "enlarged")
    except Rejected as rejected:
        return rejected.reason


def table(count: int, seed: int = 0, names: Sequence[str] = tuple(FORMATS)) -> dict[str, dict[str, Counter[str]]]:
    """Returns, by format and damage, how many damages were made, were harmful, were found, and were harmless but
    rejected or flagged; under the damage `sound`, how many sound files were flagged."""
    rows: dict[str, dict[str, Counter[str]]] = {}
    for name in names:
        files = [encode(i, name) for i in range(5)]
        sound = [pillow(data) for data in files]
        row = rows[name] = {damage: Counter() for damage in ("sound", *DAMAGES)}
        row["sound"].update(flagged=sum(bool(outcome(data)) for data in files), made=len(files))
        for damage, damaged in DAMAGES.items():
            rng = np.random.default_rng([seed, len(name), len(damage)])
            for i in range(count):
                data, before = files[i % len(files)], sound[i % len(files)]
                place = int(rng.integers(len(data) // 8, max(len(data) // 8 + 1, len(data) - 600)))
                bad = damaged(data, place, rng)
                after = pillow(bad)
                assert before is not None
                harmful = after is None or after.shape != before.shape or float(np.abs(after - before).mean()) > LIMIT
                found = bool(outcome(bad))
                row[damage].update(
                    made=bad != data, harmful=harmful, found=harmful and found, harmless_found=found and not harmful
                )
    return rows


def cost(rounds: int) -> dict[str, float]:
    """Returns, by format, the CPU time of `square` over that of plain Pillow's decoding to the same square."""
    ratios = {}
    for name, (_, mode, options) in FORMATS.items():
        stream = io.BytesIO()
        picture(0, "RGB").resize((1600, 1200)).convert(mode if mode != "P" else "RGB").save(
            stream, FORMATS[name][0], **options
        )
        data, times = stream.getvalue(), []
        for _ in range(rounds):
            began = process_time()
            square(data, RECIPE)
            times.append(process_time() - began)
        ratios[name] = 1000 * statistics.median(times)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=FORMATS, default=list(FORMATS), help="some of the formats")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = table(options.count, options.seed, options.only)
    print("| format | " + " | ".join(DAMAGES) + " |")
    print("|---|" + "---|" * len(DAMAGES))
    for name, row in rows.items():
        cells = [f"{row[d]['found']} of {row[d]['harmful']}" if row[d]["harmful"] else "-" for d in DAMAGES]
        print(f"| {name} | " + " | ".join(cells) + " |")
    made = sum(cell["made"] for row in rows.values() for damage, cell in row.items() if damage != "sound")
    strict = sum(cell["harmless_found"] for row in rows.values() for cell in row.values())
    flagged = sum(row["sound"]["flagged"] for row in rows.values())
    print(f"{made:,} damages; {strict:,} harmless ones were rejected or flagged; sound files: {flagged} of them")


if __name__ == "__main__":
    main()
