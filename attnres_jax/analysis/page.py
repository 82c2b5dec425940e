"""A self-contained HTML page: style, pictures inline, nothing fetched from anywhere."""

import base64
import html
import io

import matplotlib
from matplotlib.figure import Figure

_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_CSS = """
:root { color-scheme: light; --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --wash: #f6f8fa; --warn: #9a6700; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 FONTS; -webkit-text-size-adjust: 100%; }
main { max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.6rem, 4vw, 2.2rem); line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 .35rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .4rem; }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
p { margin: 0 0 .9rem; }
ul { margin: 0 0 1rem; padding-left: 1.2rem; }
li { margin-bottom: .4rem; }
.meta { color: var(--soft); font-size: .9rem; margin-bottom: 1.6rem; }
.lead { font-size: 1.1rem; }
.warning { border-left: 4px solid var(--warn); background: #fff8e5; padding: .8rem 1rem; margin: 0 0 1.5rem; }
.warning p { margin: 0 0 .4rem; } .warning p:last-child { margin: 0; }
.scroll { overflow-x: auto; margin: 0 0 1.25rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .9rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--ink); vertical-align: bottom; }
th:first-child, td.left { text-align: left; }
th:first-child { padding-left: 0; font-weight: 500; position: sticky; left: 0; background: #fff; }
tbody tr:hover :is(td, th) { background: var(--wash); }
.swatch { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .45em; }
.grid { display: grid; gap: 2rem 2.5rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; max-width: 36rem; height: auto; }
figcaption { color: var(--soft); font-size: .9rem; line-height: 1.5; margin-top: .5rem; max-width: 36rem; }
summary { cursor: pointer; font-weight: 600; margin-bottom: .75rem; }
@media (max-width: 40rem) {
  main { padding: 1.5rem 1rem 3rem; } th, td { padding: .4rem .6rem; } .lead { font-size: 1.05rem; }
  table { font-size: .85rem; } th:first-child { white-space: normal; min-width: 6.5rem; }
}
@media print { figure, tr { break-inside: avoid; } details > * { display: block; } }
""".replace("FONTS", _FONTS)


def page(title: str, body: str) -> str:
    """A whole document; `body` is HTML, `title` is text."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def picture(figure: Figure, title: str, alt: str, caption: str) -> str:
    """A titled figure: the drawing inline, what it shows for those who cannot see it (`alt`), how to read it."""
    return (
        f'<figure>\n<h3>{html.escape(title)}</h3>\n<img alt="{html.escape(alt)}" src="{data_uri(figure)}">\n'
        f"<figcaption>{html.escape(caption)}</figcaption>\n</figure>"
    )


def data_uri(figure: Figure) -> str:
    """The figure as an SVG in base64; its text stays text, set in the reader's own fonts."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "attnres_jax"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    # Laid out with matplotlib's own font, which is wider than what a browser has: nothing grows out of its place.
    svg = file.getvalue().decode().replace("'DejaVu Sans'", _FONTS)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def table(header: list[str], rows: list[list[str]], *, left: bool = False) -> str:
    """Rows of text under a header of HTML, the first cell of a row being its heading; wider ones scroll sideways."""
    head = "".join(f'<th scope="col"{_class(left)}>{cell}</th>' for cell in header)
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td{_class(left)}>{html.escape(cell)}</td>" for cell in rest)
        lines.append(f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>')
    body = "\n".join(lines)
    inner = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return f'<div class="scroll" tabindex="0"><table>\n{inner}\n</table></div>'


def paragraphs(lines: list[str] | tuple[str, ...], tag: str = "p") -> str:
    """Lines of text, each in an element of its own."""
    return "\n".join(f"<{tag}>{html.escape(line)}</{tag}>" for line in lines)


def _class(left: bool) -> str:
    return ' class="left"' if left else ""
