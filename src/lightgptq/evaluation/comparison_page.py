"""A comparison as one HTML page: pictures are drawn inline, nothing is fetched from anywhere."""

from __future__ import annotations

import math
from html import escape

from lightgptq.evaluation.bootstrap import Interval
from lightgptq.evaluation.comparison import CheckpointFigures, Comparison
from lightgptq.evaluation.damage import worst_modules

# Colours that also people who see no red or green can tell apart (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
WIDTH, ROW = 720, 28
LISTED = 12

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .2rem .8rem; text-align: right }
td:first-child, th:first-child { text-align: left; padding-left: 0 } tr { border-bottom: 1px solid #ddd }
small { color: #666 } svg { max-width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif }
"""


def comparison_page(found: Comparison) -> str:
    """The page as text."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{escape(found.original)}: quantized checkpoints</title><style>{STYLE}</style>",
        f"<h1>{escape(found.original)}</h1>",
        f"<p>Perplexity {_figure(found.perplexity, 3)} on {escape(found.text)}: {found.tokens} tokens in "
        f"{found.windows} windows. Intervals hold 95 % of bootstrap draws over windows.</p>",
        _table(found),
        "<h2>Distance to the original</h2><p>KL divergence in nats per token, logarithmic.</p>",
        _kl_chart(found.checkpoints),
        _differences(found),
        "<h2>Error of each block's output</h2><p>Squared error over the energy of the original's output, with "
        "everything before the block quantized as well; logarithmic.</p>",
        _block_chart(found.checkpoints),
        *(_modules(c) for c in found.checkpoints if c.modules),
    ]
    return "\n".join(parts) + "</html>\n"


def _table(found: Comparison) -> str:
    head = ("checkpoint", "perplexity", "KL", "KL p95", "KL max", "top-1", "bits per weight", "MB", "seconds")
    rows = []
    for c in found.checkpoints:
        cells = (
            escape(c.label),
            _figure(c.perplexity, 3),
            _figure(c.kl, 5),
            f"{c.kl_p95:.4f}",
            f"{c.kl_max:.3f}",
            _figure(c.top1_agreement, 4),
            f"{c.bits_per_weight:.3f}",
            f"{c.size_bytes / 1e6:.1f}",
            "" if c.seconds is None else f"{c.seconds:.0f}",
        )
        rows.append("<tr>" + "".join(f"<td>{cell}" for cell in cells))
    return "<table><tr>" + "".join(f"<th>{h}" for h in head) + "".join(rows) + "</table>"


def _differences(found: Comparison) -> str:
    items = [f"<li>{escape(d.verdict)} <small>({_figure(d.kl, 5)} nats)</small>" for d in found.differences]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _kl_chart(checkpoints: list[CheckpointFigures]) -> str:
    """One line a checkpoint: the mean as a dot, its interval as a bar."""
    values = [v for c in checkpoints for v in (c.kl.low, c.kl.value, c.kl.high) if v > 0]
    if not values:
        return "<p>No checkpoint differs from the original.</p>"
    scale = _LogScale(values, 200, WIDTH - 60)
    height = ROW * len(checkpoints) + 30
    parts = [scale.grid(height - 24)]
    for row, c in enumerate(checkpoints):
        y, colour = ROW * row + 18, COLOURS[row % len(COLOURS)]
        low, mid, high = (scale.at(v) for v in (c.kl.low, c.kl.value, c.kl.high))
        parts.append(
            f'<text x="0" y="{y + 4}">{escape(c.label[:30])}</text>'
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="6" '
            f'opacity="0.35"/><circle cx="{mid:.1f}" cy="{y}" r="5" fill="{colour}"/>'
        )
    return _svg(height, parts)


def _block_chart(checkpoints: list[CheckpointFigures]) -> str:
    """One curve a checkpoint over the blocks."""
    values = [b.error for c in checkpoints for b in c.blocks if b.error > 0]
    if not values:
        return "<p>No block's output differs.</p>"
    height, left, bottom = 300, 60, 260
    scale = _LogScale(values, bottom, 15)
    count = max(len(c.blocks) for c in checkpoints)
    step = (WIDTH - left - 20) / max(1, count - 1)
    parts = [scale.grid_rows(left, WIDTH - 20)]
    for i in range(0, count, max(1, count // 12)):
        parts.append(
            f'<text x="{left + i * step:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#666">{i}</text>'
        )
    for index, c in enumerate(checkpoints):
        colour = COLOURS[index % len(COLOURS)]
        points = [(left + i * step, scale.at(b.error)) for i, b in enumerate(c.blocks) if b.error > 0]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        label = f'<text x="{left + 10 + 160 * (index % 4)}" y="{bottom + 36 + 16 * (index // 4)}" fill="{colour}">'
        parts.append(f"{label}● {escape(c.label[:20])}</text>")
    return _svg(height + 16 * (len(checkpoints) // 4), parts)


def _modules(checkpoint: CheckpointFigures) -> str:
    """The most damaged modules, with bars."""
    worst = worst_modules(checkpoint.modules, LISTED)
    if not worst:
        return ""
    top = max(m.relative_loss or 0.0 for m in worst) or 1.0
    rows = "".join(
        f"<tr><td>{escape(m.name)}<td>{m.bits}<td>{m.relative_loss:.2e}"
        '<td style="text-align:left"><svg width="200" height="12">'
        f'<rect width="{200 * (m.relative_loss or 0) / top:.0f}" height="12" fill="#0072b2"/></svg>'
        for m in worst
    )
    return (
        f"<h2>{escape(checkpoint.label)}: modules that lose most</h2>"
        "<p>Squared error of the output over the energy of the output, on the calibration text.</p>"
        f"<table><tr><th>module<th>bits<th>loss<th>{rows}</table>"
    )


class _LogScale:
    """Positions of positive values between two ends of an axis."""

    def __init__(self, values: list[float], start: float, end: float) -> None:
        self.low, self.high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        self.high = max(self.high, self.low + 1)
        self.start, self.end = start, end

    def at(self, value: float) -> float:
        share = (math.log10(max(value, 10.0**self.low)) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def grid(self, bottom: float) -> str:
        """Upright lines at powers of ten."""
        return "".join(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}" stroke="#ddd"/>'
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" fill="#666">{_power(p)}</text>'
            for p, x in self._powers()
        )

    def grid_rows(self, left: float, right: float) -> str:
        """Level lines at powers of ten."""
        return "".join(
            f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#666">{_power(p)}</text>'
            for p, y in self._powers()
        )

    def _powers(self) -> list[tuple[int, float]]:
        return [(p, self.at(10.0**p)) for p in range(self.low, self.high + 1)]


def _power(exponent: int) -> str:
    return f"{10.0**exponent:g}"


def _svg(height: float, parts: list[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}">{"".join(parts)}</svg>'


def _figure(interval: Interval, digits: int) -> str:
    return (
        f"{interval.value:.{digits}f} <small>{interval.low:.{digits}f} to {interval.high:.{digits}f}</small>"
    )
