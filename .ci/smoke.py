"""What an installation can do, without pytest: paint, prepare, train three steps, continue to the fourth, report."""

import tempfile
from pathlib import Path

import gan_dist
from gan_dist.config.schema import preset
from gan_dist.data.prepare.synthetic import paint_folder
from gan_dist.report.report import make_report

SMALL = ["model.resolution=32", "model.g_channels=8", "model.d_channels=8", "train.global_batch=8"]

if __name__ == "__main__":
    print("gan_dist from", Path(gan_dist.__file__).parent)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        paint_folder(root / "paintings", 24)
        gan_dist.prepare([root / "paintings"], root / "shards", resolution=32)
        words = [*SMALL, f"data.shards={root / 'shards'}"]
        for steps in (3, 4):
            outcome = gan_dist.train(preset("paintings64"), words, run_dir=root / "run", max_steps=steps, console=False)
            assert outcome.step == steps, outcome
        assert "</html>" in make_report(root / "run").read_text(encoding="utf-8")  # templates are part of the package
    print("trained, stopped and continued; the report was written")
