"""The pieces of a report's HTML: the page itself, sections, tables, films with their slider. Everything is escaped."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from gan_dist.report.films import Frame
from gan_dist.report.history import Entry
from gan_dist.runs.metrics_file import format_time

ASSETS = Path(__file__).parent / "assets"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""What the page may load: nothing that does not stand in it."""


def document(title: str, body: str) -> str:
    """Returns the whole page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}: gan_dist</title>\n"
        f"<style>\n{(ASSETS / 'report.css').read_text(encoding='utf-8')}</style></head>\n<body><main>\n{body}\n"
        f"<footer>Written by gan_dist on {format_time(time.time())}. This page needs no network.</footer></main>\n"
        f"<script>\n{(ASSETS / 'report.js').read_text(encoding='utf-8')}</script></body></html>\n"
    )


def section(title: str, lead: str, content: str) -> str:
    """Returns a part of the page under a heading; `lead` and `content` are HTML."""
    told = f'<p class="lead">{lead}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{told}{content}</section>"


def remark(line: str) -> str:
    """Returns a line that stands where there is nothing to show."""
    return f'<p class="none">{escape(line)}</p>'


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as one {"section.key": value}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def shown(value: Any) -> str:
    """Returns a value as HTML text, as a configuration file would have it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(" ".join(map(str, value)) if isinstance(value, list) else str(value))


def table(heads: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], row_class: str = "") -> str:
    """Returns a table that scrolls on its own where it is too wide. Heads and cells are HTML, row names text."""
    top = "".join(f"<th>{head}</th>" for head in heads)
    mark = f' class="{row_class}"' if row_class else ""
    body = "".join(
        f"<tr{mark}><th>{escape(name)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for name, cells in rows
    )
    head = f"<thead><tr>{top}</tr></thead>" if heads else ""
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def facts(values: Mapping[str, Any]) -> str:
    """Returns a table of names and values."""
    return table((), ((key, (shown(value),)) for key, value in flatten(values).items()))


def film_script(frames: Sequence[Frame], key: str) -> str:
    """Returns the element that carries a film's frames for the slider."""
    content = json.dumps([{"step": frame.step, "src": frame.src} for frame in frames])
    return f'<script type="application/json" id="{key}">{content}</script>'


def reel(count: int, told: str) -> str:
    """Returns the slider, with its button, for films of `count` frames."""
    return (
        '<div class="reel"><button type="button">Play</button>'
        f'<input type="range" min="0" max="{count - 1}" value="{count - 1}" step="1" aria-label="How far in training">'
        f"<output>{told}</output></div>"
    )


def history(told: Sequence[Entry]) -> str:
    """Returns what happened, as a line through time."""
    if not told:
        return remark("Nothing is recorded yet.")
    items = "".join(
        f'<li class="{escape(entry.kind, quote=True)}"><b>{escape(entry.title)}</b><time>{escape(entry.when)}</time>'
        + (f"<p>{escape(entry.detail)}</p>" if entry.detail else "")
        + "</li>"
        for entry in told
    )
    return f'<ol class="history">{items}</ol>'


def command(what: str, words: str) -> str:
    """Returns a command to copy, under what it is for."""
    return (
        f'<h3>{escape(what)}</h3><div class="command"><pre>{escape(words)}</pre>'
        '<button type="button" data-copy>Copy</button></div>'
    )
