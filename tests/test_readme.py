"""README keeps up with the house: its map names every folder, and its commands are commands."""

from __future__ import annotations

import re
from pathlib import Path

import typer.main

from gan_dist.cli.main import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_map_names_every_folder_of_code_and_nothing_else() -> None:
    mapped = set(re.findall(r"`([\w./-]+)/`", README.split("## The house")[1]))
    packages = {
        str(path.parent.relative_to(ROOT))
        for room in ("gan_dist", "launch")
        for path in ROOT.glob(f"{room}/**/__init__.py")
    }
    assert packages - {"gan_dist"} <= mapped, "README's map lacks a line for these"
    assert not [folder for folder in mapped if not (ROOT / folder).is_dir()], (
        "README's map names folders that do not exist"
    )


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
