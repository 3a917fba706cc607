"""README keeps up with the house: its map names every module, and its commands are commands."""

from __future__ import annotations

import re
from pathlib import Path

import typer.main

from gan_dist.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def mapped() -> set[Path]:
    """Returns the files that the map names; a bold row sets the directory of the rows below it."""
    found, room = set(), Path()
    for row in re.findall(r"^\| (\S.*?) \|", README.split("## The house")[1], re.MULTILINE):
        names = re.findall(r"`([\w./-]+)`", row)
        if row.startswith("**"):
            room = Path(names[0] if names else "")
        else:
            found |= {room / name for name in names}
    return found


def test_the_map_names_every_module_and_nothing_else() -> None:
    modules = {path.relative_to(ROOT) for path in (*(ROOT / "gan_dist").rglob("*.py"), *(ROOT / "launch").glob("*.py"))}
    modules = {path for path in modules if path.name != "__init__.py" and path != Path("launch/__main__.py")}
    listed = {path for path in mapped() if path.suffix == ".py"}
    assert not modules - listed, "README's map lacks a line for these"
    assert not listed - modules, "README's map names these, which do not exist"
    assert not [path for path in mapped() if not (ROOT / path).exists()]


def test_every_command_in_readme_exists() -> None:
    commands = set(getattr(typer.main.get_command(app), "commands", {}))
    used = set(re.findall(r"gan-dist ([a-z]+)|-m gan_dist ([a-z]+)", README + (ROOT / "CONTRIBUTING.md").read_text()))
    named = {name for pair in used for name in pair if name}
    assert {"demo", "prepare", "verify", "train", "sample"} <= named
    assert named <= commands


def test_every_link_in_readme_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_wheelhouse_and_lock_commands_stay_those_that_ci_tries() -> None:
    """What README tells people to type without a network is what .ci/run types, options and all."""
    script = re.sub(r"--quiet |\"", "", (ROOT / ".ci/run").read_text(encoding="utf-8"))
    for options in (
        "download --only-binary :all: --require-hashes -r requirements.lock -d",
        "install --require-hashes -r requirements.lock",
        "install --no-deps -e .",
        "--require-hashes -r requirements.lock",
        "install --no-index --no-deps --no-build-isolation -e .",
    ):
        assert options in README and options in script, options
