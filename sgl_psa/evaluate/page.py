"""The HTML of a report: one page without network, for wide and narrow, light and dark screens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --paper: #fff; --soft: #556; --line: #dde2e9;
  --head: #f0f3f7; --best: #dcf1dd; --loss: #a32f2f; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe5ee; --paper: #14181f; --soft: #a3adbb;
  --line: #333c48; --head: #222933; --best: #1f4527; --loss: #f09090; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1240px;
  padding: 1rem clamp(.7rem, 3vw, 2rem); color: var(--ink); background: var(--paper); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
p.note { color: var(--soft); margin: .3rem 0 .8rem; max-width: 52rem; }
.wide { overflow-x: auto; } .scroll { overflow: auto; max-height: 36rem; }
table { border-collapse: separate; border-spacing: 0; font-size: 13px;
  font-variant-numeric: tabular-nums; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
thead th { background: var(--head); position: sticky; top: 0; z-index: 1; vertical-align: bottom; }
tbody th { font-weight: 400; }
tr > :first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
thead tr > :first-child { background: var(--head); z-index: 2; }
td.best { background: var(--best); font-weight: 600; } td.loss { color: var(--loss); }
small { color: var(--soft); font-weight: 400; }
.plots { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill,
  minmax(min(100%, 340px), 1fr)); }
.plots > svg { width: 100%; height: auto; background: #fff; border-radius: 4px; padding: .4rem; }
pre { background: var(--head); padding: .7rem; overflow-x: auto; }
@media (max-width: 600px) { tbody tr > :first-child { min-width: 8.5rem; white-space: normal; }
  th, td { padding: .2rem .4rem; } }
"""


def page(title: str, sections: Sequence[str]) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><main>\n<h1>{title}</h1>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def plot_grid(svgs: Sequence[str]) -> str:
    """Plots side by side, as many as the screen has room for."""
    return '<div class="plots">' + "\n".join(svgs) + "</div>"


def table(
    caption: str,
    head: Sequence[str],
    lines: Sequence[Sequence[tuple[str, str]]],
    scroll: bool = False,
) -> str:
    """A table of (class, HTML) cells; the first of a line is its header.

    Args:
        caption: read aloud, not shown.
        scroll: keep a long table in a box of its own.
    """
    columns = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = []
    for (_, name), *cells in lines:
        others = "".join(
            f'<td class="{mark}">{cell}</td>' if mark else f"<td>{cell}</td>"
            for mark, cell in cells
        )
        body.append(f'<tr><th scope="row">{name}</th>{others}</tr>')
    return (
        f'<div class="{"scroll" if scroll else "wide"}" tabindex="0"><table>'
        f"<caption>{caption}</caption><thead><tr>{columns}</tr></thead><tbody>\n"
        + "\n".join(body)
        + "</tbody></table></div>"
    )


def text(value: Any) -> str:
    """A value of a row as it is shown."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
