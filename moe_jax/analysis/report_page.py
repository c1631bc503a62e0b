"""The page around a report: its HTML frame, its style and its parts. Nothing is loaded from anywhere else."""

import base64
import html
import io
import re
from collections.abc import Sequence
from typing import Any

_STYLE = """
:root { color-scheme: light; --ink: #1f2933; --muted: #616e7c; --line: #e4e7eb; --paper: #ffffff; --accent: #2b5f8a; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7fa; color: var(--ink); line-height: 1.5;
       font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
       font-size: 16px; }
main { max-width: 1000px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 12px; }
h3 { font-size: .95rem; margin: 14px 0 4px; color: var(--accent); }
header .kind { color: var(--accent); font-weight: 600; font-size: .85rem; letter-spacing: .04em;
  text-transform: uppercase; }
.facts, .caption, figcaption { color: var(--muted); font-size: .9rem; }
.facts { margin: 0 0 18px; }
nav { display: flex; flex-wrap: wrap; gap: 6px 16px; margin: 18px 0; font-size: .9rem; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
section, .headline { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 20px;
                     margin: 0 0 18px; box-shadow: 0 1px 2px rgba(31, 41, 51, .04); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px; margin-bottom: 16px; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; background: #fbfcfd; }
.card span { display: block; color: var(--muted); font-size: .82rem; }
.card b { display: block; font-size: 1.75rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.verdict { border-left: 4px solid var(--muted); background: #f5f7fa; padding: 10px 14px; margin: 0 0 14px;
  border-radius: 0 6px 6px 0; }
.verdict.good { border-color: #2a9d8f; background: #eefaf7; }
.verdict.mixed { border-color: #d9a441; background: #fdf8ec; }
.verdict.bad { border-color: #c8553d; background: #fdf1ee; }
.problems { border: 1px solid #ecd9a8; background: #fdf8ec; border-radius: 10px; padding: 14px 20px;
  margin: 0 0 18px; font-size: .92rem; }
.problems ul { margin: 6px 0 0; padding-left: 20px; }
.missing { color: var(--muted); font-style: italic; margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--muted); font-weight: 600; border-bottom: 2px solid var(--line); }
th, td { padding: 5px 22px 5px 0; vertical-align: top; }
td { border-bottom: 1px solid var(--line); }
.numbers th:not(:first-child), .numbers td:not(:first-child) { text-align: right; padding: 5px 0 5px 26px; }
.first tr:nth-child(2) td { font-weight: 600; }
.numbers td:not(:first-child) { white-space: nowrap; }
.headlines th:nth-child(2), .headlines td:nth-child(2) { text-align: left; white-space: normal; }
.headline > :last-child { margin-bottom: 0; }
.settings td:first-child { color: var(--muted); white-space: nowrap; }
.settings td:last-child { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .84rem;
  overflow-wrap: anywhere; padding-right: 0; }
.groups { columns: 3 260px; column-gap: 32px; }
.groups > div { break-inside: avoid; }
.groups table { width: 100%; }
.groups h3 { margin-top: 0; padding-top: 10px; }
figure { margin: 0 0 8px; }
figure + figure { margin-top: 26px; }
.scroll + figure { margin-top: 22px; }
figure img { display: block; width: 100%; height: auto; }
figcaption { margin-top: 8px; }
figcaption em { font-style: normal; font-weight: 600; color: var(--ink); }
.sample { background: #fbfcfd; border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px;
  margin: 10px 0 0;
          white-space: pre-wrap; overflow-wrap: anywhere; font: .84rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
mark { background: #dceaf5; color: inherit; border-radius: 3px; padding: 1px 0; }
footer { color: var(--muted); font-size: .85rem; text-align: center; }
@media (max-width: 640px) {
  main { padding: 18px 10px 40px; } section, .headline { padding: 14px; }
  figure img { width: 720px; max-width: none; }
}
@media print { body { background: white; } section, .headline { box-shadow: none; break-inside: avoid;
  } nav { display: none; } }
"""

_PAGE = (
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>"""
    + _STYLE.replace("{", "{{").replace("}", "}}")
    + """</style>
</head>
<body>
<main>
<header><div class="kind">{kind}</div><h1>{name}</h1><p class="facts">{facts}</p></header>
{problems}
<div class="headline">{headline}</div>
<nav>{contents}</nav>
{body}
<footer>Written by moe_jax; everything on this page is inside this one file.</footer>
</main>
</body>
</html>
"""
)


def page(kind: str, name: str, facts: Sequence[str], problems: str, headline: str, contents: Sequence[str],
         body: Sequence[str]) -> str:
    """The whole page; `kind`, `name` and `facts` are text, everything else is HTML."""
    return _PAGE.format(
        kind=escape(kind), title=escape(f"{name} – {kind.lower()}"), name=escape(name),
        facts=" · ".join(escape(fact) for fact in facts), problems=problems, headline=headline,
        contents=" ".join(contents), body="\n".join(body))


def escape(value: Any) -> str:
    """Text as HTML; control characters, which browsers drop, become their visible pictures (U+2400...)."""
    visible = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda match: chr(0x2400 + ord(match.group())), str(value))
    return html.escape(visible)


def png_of(figure: Any) -> bytes:
    """A Matplotlib figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def figure_block(png: bytes, alternative: str, caption: str) -> str:
    """The picture inside the page, with its text for those who do not see it and its caption (HTML)."""
    data = base64.b64encode(png).decode()
    return (f'<figure><div class="scroll"><img alt="{escape(alternative)}" src="data:image/png;base64,{data}"></div>'
            f"<figcaption>{caption}</figcaption></figure>")


def table_block(header: Sequence[str] | None, rows: Sequence[Sequence[Any]], kind: str = "numbers") -> str:
    """Rows of text as a table; `kind` is a class of the style: numbers (right-aligned but for the first column), settings."""
    head = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>" if header else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}">{head}{body}</table></div>'
