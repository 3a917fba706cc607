"""The snapshot of a checkout: which files it holds, and that everything runs from it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gan_dist.config.schema import presets
from gan_dist.distributed.preflight import sources
from gan_dist.utils.errors import UserError
from gan_dist.utils.system import code_version
from launch import snapshot

ROOT = Path(__file__).parents[2]


def git(root: Path, *words: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run(["git", "-C", str(root), *identity, *words], check=True, capture_output=True)


def test_a_snapshot_holds_what_is_there_and_nothing_that_git_ignores(tmp_path: Path) -> None:
    root, copy = tmp_path / "checkout", tmp_path / "copy"
    copy.mkdir()
    for name, text in {"a/kept.py": "x = 1\n", "gone.py": "", ".gitignore": "big/\n*.pt\n"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    commit = snapshot.commit_of(root)
    assert commit and re.fullmatch(r"[0-9a-f]{12}", commit)
    (root / "a/kept.py").write_text("x = 2\n")
    (root / "new file.py").write_text("")
    (root / "gone.py").unlink()
    for name in ("big/data.bin", "model.pt", "data/paintings64/shard-000000.tar", "a/data/new.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    snapshot.take(root, copy)
    archive = zipfile.ZipFile(copy / "code.zip")
    assert set(archive.namelist()) == {"a/kept.py", "a/data/new.py", "new file.py", ".gitignore", "gan_dist/COMMIT"}
    assert archive.read("a/kept.py") == b"x = 2\n"
    assert snapshot.commit_of(root) == snapshot.commit_in(copy) == f"{commit}-dirty"
    assert archive.read("gan_dist/COMMIT").decode() == f"{commit}-dirty\n"


def test_a_checkout_of_another_owner_is_read_as_its_owner_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "checkout"
    root.mkdir()
    for name, text in {".gitignore": "/*.zip\n", "code.py": "", "train.zip": "x"}.items():
        (root / name).write_text(text)
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    commit = snapshot.commit_of(root)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own way to try this as one user
    refused = subprocess.run(["git", "-C", str(root), "status"], capture_output=True, text=True, check=False)
    assert "dubious ownership" in refused.stderr
    assert [str(name) for name in snapshot.files_of(root)] == [".gitignore", "code.py"]
    assert commit and snapshot.commit_of(root) == commit and not capsys.readouterr().err
    (root / ".git" / "HEAD").write_text("nonsense")
    assert Path("train.zip") in snapshot.files_of(root)
    assert ".gitignore and the commit are not known" in capsys.readouterr().err  # and not in silence


def test_a_checkout_without_git_is_copied_without_environments_and_data(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    for name in (
        "gan_dist/data/a.py",
        "data/set.tar",
        "env/pyvenv.cfg",
        "env/lib/x.py",
        ".hidden/y.py",
        "runs/r/state.pt",
        "README.md",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    assert sorted(map(str, snapshot.files_of(root))) == ["README.md", "gan_dist/data/a.py"]
    assert snapshot.commit_of(root) is None


@pytest.mark.parametrize("with_git", [True, False])
def test_a_snapshot_holds_no_earlier_run_and_follows_links_to_code(with_git: bool, tmp_path: Path) -> None:
    root, copy = tmp_path / "checkout", tmp_path / "deep" / "copy"
    for name in (
        "launch/cli.py",
        "configs/config.yaml",
        "out/notes.py",
        "out/r1/launch/1/job.json",
        "out/r1/logs/1-batch.log",
        "out/r2/launch/2/code.zip",  # killed while it was submitted
        "out/old/launch/2/code/launch/cli.py",
        "out/local/checkpoints/latest",
        "out/local/config.yaml",
        "out/new/launch/3/config.yaml",
        "home/doctor/words",
        "../elsewhere/x.py",
        "../elsewhere/table.csv",
        "../pictures/1.png",
        "../pictures/more/2.py",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    (root / "same").symlink_to("configs")
    (root / "other").symlink_to("../elsewhere")
    (root / "pictures").symlink_to(tmp_path / "pictures")
    (root / "gone").symlink_to("nowhere")
    if with_git:
        git(root, "init", "-q")
        git(root, "init", "-q", "another")  # listed as a directory
        git(root, "add", "launch", "configs", "same", "other", "gone", "home/doctor/words")
    copy.mkdir(parents=True)
    snapshot.take(root, copy, [root / "out/new", root / "home", root, tmp_path])
    names = set(zipfile.ZipFile(copy / "code.zip").namelist())
    tracked = {"home/doctor/words"} if with_git else set()
    links = {"same/config.yaml", "other/x.py"}  # of a directory elsewhere its modules, of one without any nothing
    assert names == {"launch/cli.py", "configs/config.yaml", "out/notes.py", "gan_dist/COMMIT"} | links | tracked
    assert snapshot.commit_in(copy) is None


def test_what_an_archive_would_break_is_told_before_anything_is_queued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "checkout"
    beside = "from pathlib import Path\n\ntable = Path(__file__).with_name('table.csv').read_text()\n"
    texts = {
        "gan_dist/model/mine.py": beside,
        "gan_dist/model/table.csv": "1,2\n",
        "gan_dist/words.py": "text = '__file__ of torch'  # __file__\nimport torch\nwhere = torch.__file__\n",
        "gan_dist/broken.py": "__file__ = (",
        "mylib/__init__.py": "print(__path__)\n",
        "mylib/fast.cpython-311-x86_64-linux-gnu.so": "ELF",
        "tests/test_mine.py": beside,
        ".ci/smoke.py": beside,
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name in ("archive", "files"):
        (tmp_path / name).mkdir()
    snapshot.take(root, tmp_path / "archive")
    (line,) = capsys.readouterr().err.splitlines()
    assert "gan_dist/model/mine.py (__file__), mylib/__init__.py (__path__), mylib/fast.cpython-311" in line
    assert line.startswith("note: ") and "job.unpack=true" in line and "words.py" not in line and "test_" not in line
    snapshot.take(root, tmp_path / "files", unpacked=True)
    assert not capsys.readouterr().err
    words = [sys.executable, "-c", "import mine; print(mine.table)"]
    done = subprocess.run(words, cwd=tmp_path / "files/code/gan_dist/model", capture_output=True, text=True, check=True)
    assert done.stdout == "1,2\n\n"
    snapshot.link(tmp_path / "files", tmp_path / "another")
    assert (tmp_path / "another/code/gan_dist/model/table.csv").stat().st_nlink == 2


def test_nothing_of_this_checkout_needs_to_be_unpacked() -> None:
    assert snapshot.lost_in_archive(ROOT, snapshot.files_of(ROOT)) == []


def test_data_in_the_checkout_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "MAX_MIB", 1)
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "train.zip").write_bytes(b"0" * 2**21)
    with pytest.raises(UserError, match=r"train\.zip most of all"):
        snapshot.take(tmp_path / "checkout", tmp_path / "copy")


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of this checkout."""
    folder = tmp_path_factory.mktemp("taken")
    snapshot.take(snapshot.CHECKOUT, folder)
    return folder


def test_a_snapshot_is_a_handful_of_files(taken: Path) -> None:
    """One of each source file, and its compiled form, is what a submission was before."""
    shell = {f"slurm/{name}.sh" for name in ("lib", "checks", "plain")}
    written = {str(file.relative_to(taken)) for file in taken.rglob("*") if file.is_file()}
    assert written == {"code.zip"} | shell
    archived = zipfile.ZipFile(taken / "code.zip").namelist()
    assert len(archived) == len(set(archived)) > 200 and {"slurm/train.sbatch", "launch/job/rank.py"} <= set(archived)
    snapshot.link(taken, taken / "another")
    again = {str(file.relative_to(taken / "another")) for file in (taken / "another").rglob("*") if file.is_file()}
    assert again == written and (taken / "another" / "code.zip").stat().st_nlink == 2


READS = """
import pkgutil, importlib, gan_dist, launch
from gan_dist.utils.system import own_files
names = [m.name for p in (gan_dist, launch) for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")]
for name in names:
    if not name.endswith("__main__"):
        assert ".zip/" in importlib.import_module(name).__file__, name
from gan_dist.config.schema import Config, presets
from gan_dist.distributed.preflight import sources
from gan_dist.report.report import templates
assert len(names) > 100 and own_files().is_dir()
assert Config.model_fields["seed"].description
for name in ("run", "runs", "page", "parts"):
    templates.get_template(name + ".html")
templates.globals["asset"]("report.js")
from gan_dist.utils.system import code_version
print(sources(), sorted(presets()), code_version())
"""


def test_what_reads_files_of_its_own_finds_them_in_the_archive(taken: Path, tmp_path: Path) -> None:
    """Nothing is left of this checkout in the way: neither the directory nor an installed package."""
    env = {**os.environ, "PYTHONPATH": str(taken / "code.zip"), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", READS], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commit = snapshot.commit_of(snapshot.CHECKOUT)
    assert code_version() == commit  # what a run's environment.json says
    assert done.stdout.strip() == f"{sources()} {sorted(presets())} {commit}"


COMPILES = """
import torch
from gan_dist.config.schema import Config
from gan_dist.model import batchnorm_triton, networks
from tests.model.test_batchnorm_kernels_compiled import _compile

for module in (batchnorm_triton, networks):
    assert ".zip/" in module.__file__
assert ".visible .entry _normalise_kernel" in _compile("_normalise_kernel", "fp32", 90).asm["ptx"]
model = Config(data={"shards": "anywhere"}, model={"resolution": 32, "g_channels": 8}).model
generator, latents = networks.build_generator(model.model_dump()).eval(), torch.randn(2, model.latent_dim)
assert torch.equal(torch.compile(generator, backend="eager", fullgraph=True)(latents), generator(latents))
"""


def test_kernels_and_graphs_compile_from_the_archive(taken: Path, tmp_path: Path) -> None:
    """Triton and torch.compile read the source of what they compile, where the archive's importer has it."""
    pytest.importorskip("triton", reason="needs Triton, which torch brings on Linux")
    env = {**os.environ, "PYTHONPATH": str(taken / "code.zip"), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    env["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run([sys.executable, "-c", COMPILES], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_file_of_gan_dist_is_looked_for_beside_a_module() -> None:
    """In an archive there is nothing beside it: `own_files` finds what belongs to the package."""
    files = [file.relative_to(ROOT) for file in (ROOT / "gan_dist").rglob("*.py")]
    assert len(files) > 50 and snapshot.lost_in_archive(ROOT, files) == []


def test_the_definition_of_the_image_copies_what_there_is() -> None:
    """CI runs its %post without a network; what it needs of the checkout is in every checkout."""
    text = (ROOT / "slurm" / "gan-dist.def").read_text()
    sections = dict(re.findall(r"^%(\w+)\n((?:(?:    .*)?\n)*)", text, re.MULTILINE))
    assert list(sections) == ["arguments", "files", "post", "environment", "runscript", "test"]
    copied = [line.split() for line in sections["files"].splitlines() if line and "{{" not in line]
    assert copied and all((ROOT / source).exists() and at == f"/opt/source/{source}" for source, at in copied)
    for name in ("post", "runscript", "test"):
        subprocess.run(["bash", "-n"], input=sections[name], text=True, check=True)
    arguments = re.findall(r"(\w+)=", sections["arguments"])
    assert set(re.findall(r"\{\{ (\w+) \}\}", text)) == set(arguments) == {"base", "wheelhouse"}


def test_steps_of_a_job_run_from_a_checkout_and_from_an_archive(taken: Path, tmp_path: Path) -> None:
    """By any Python 3, without any package."""
    for code in (ROOT, taken / "code.zip"):
        (tmp_path / "facts").write_text("job=7\nrestart=0\nstatus=0\n")
        words = [shutil.which("python3") or sys.executable, "-ISB", str(code / "launch" / "job")]
        done = subprocess.run([*words, "finish", "begin", str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 0 and (tmp_path / "verdict").read_text() == "begin 0\n", done.stderr
        (tmp_path / "verdict").unlink()
        bare = subprocess.run([*words, "preflight"], env={}, capture_output=True, text=True)
        assert bare.returncode == 1 and bare.stdout.startswith("the environment does not reach Python"), bare
