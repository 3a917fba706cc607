"""README, CONTRIBUTING and docs keep up with the code: folders, links, commands, options and configuration keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from gan_dist.cli.main import app
from gan_dist.config.schema import Config
from launch.cli import app as launch_app
from launch.options import ClusterOptions

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
COMMANDS: dict[str, Any] = {
    "gan-dist": typer.main.get_command(app),
    "-m gan_dist": typer.main.get_command(app),
    "-m launch": typer.main.get_command(launch_app),
}
CALL = re.compile(r"(?<![\w/.-])(gan-dist|-m gan_dist|-m launch) ([a-z]+)\b(?: (step|loader|prepare)\b)?([^\n`#|]*)")
pages = pytest.mark.parametrize("page", TEXTS)


def calls(text: str) -> Iterator[tuple[str, Any, str, str]]:
    """Yields (program, its command line, the command's name, the words after it) of all calls that a text names."""
    for program, name, inner, words in CALL.findall(text.replace("\\\n", " ")):
        group = COMMANDS[program]
        if name == "bench" and inner:
            group, name = group.commands["bench"], inner
        yield program, group, name, words


def anchors(text: str) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_map_names_every_folder_of_code_and_nothing_else() -> None:
    mapped = set(re.findall(r"`([\w./-]+)/`", README.split("## Map")[1]))
    packages = {
        str(path.parent.relative_to(ROOT))
        for home in ("gan_dist", "launch")
        for path in ROOT.glob(f"{home}/**/*.py")
        if "__pycache__" not in path.parts
    }
    assert packages - {"gan_dist"} <= mapped, "README's map lacks a line for these"
    assert not [folder for folder in mapped if not (ROOT / folder).is_dir()], (
        "README's map names folders that do not exist"
    )


def test_readme_links_to_every_page() -> None:
    assert {f"docs/{page.name}" for page in ROOT.glob("docs/*.md")} <= set(re.findall(r"\]\(([^)#]+)", README))


@pages
def test_every_link_leads_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"(?:\]\(|src=\")([^)#:\"]*)#?([^)\"]*)[)\"]", TEXTS[page]):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), f"{target}#{anchor}"


@pages
def test_every_file_named_is_there(page: str) -> None:
    named = re.findall(r"`((?:gan_dist|launch|slurm|tests|configs|docs|\.ci)/[\w./-]*)`", TEXTS[page])
    assert not [name for name in named if not (ROOT / name).exists()]


@pages
def test_every_command_and_option_exists(page: str) -> None:
    for program, group, name, words in calls(TEXTS[page]):
        command = group.commands.get(name)
        assert command, f"{program} {name}"
        options = {"--help"} | {
            option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        if program == "-m launch" and name == "prepare":  # the rest is gan-dist prepare's
            options |= {option for each in COMMANDS["gan-dist"].commands["prepare"].params for option in each.opts}
        assert set(re.findall(r"(?<!\S)--?[a-z][\w-]*", words)) <= options, f"{program} {name}{words}"


def test_the_commands_that_matter_are_explained() -> None:
    named = {(program, name) for text in TEXTS.values() for program, _, name, _ in calls(text)}
    for program in ("gan-dist", "-m launch"):
        missing = set(COMMANDS[program].commands) - {name for by, name in named if by == program}
        assert missing <= {"bench"}, f"no page names {program} {missing}"


@pages
def test_every_configuration_key_exists(page: str) -> None:
    sections = {**Config.model_fields, **ClusterOptions.model_fields}
    found = re.findall(rf"\b({'|'.join(sections)})\.([a-z_]+)(?==)|`({'|'.join(sections)})\.([a-z_]+)[`:]", TEXTS[page])
    for section, key in ((a or c, b or d) for a, b, c, d in found):
        model = sections[section].annotation
        assert key in getattr(model, "model_fields", {}), f"{section}.{key}"


def test_wheelhouse_and_lock_commands_stay_those_that_ci_tries() -> None:
    """What the pages tell people to type without a network is what .ci/run types, options and all."""
    script = re.sub(r"--quiet |--no-compile |\"", "", (ROOT / ".ci/run").read_text(encoding="utf-8"))
    for options in (
        "download --only-binary :all: --require-hashes -r requirements.lock -d",
        "install --require-hashes -r requirements.lock",
        "install --no-deps -e .",
        "--require-hashes -r requirements.lock",
        "install --no-index --no-deps --no-build-isolation -e .",
    ):
        assert options in TEXTS["docs/installation.md"] and options in script, options
