"""The report's plots as inline SVG, drawn with matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from tta_middleware.errors import MissingExtraError
from tta_middleware.evaluation.report import series
from tta_middleware.files.jsonl import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Methods: TypeAlias = Mapping[str, Sequence[Record]]

# Tol's bright and muted schemes: told apart with the common kinds of colour blindness.
_COLOURS = (
    "#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377",
    "#332288", "#999933", "#882255", "#44AA99", "#DDCC77", "#117733", "#CC6677", "#888888",
)  # fmt: skip
_OURS, _PAPERS = "#CC3311", "#004488"
_MARKERS = "osD^vP*Xph<>8d"
# With svg.fonttype none the text stays text; DejaVu Sans and Verdana have the widths that the layout is made for.
_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "tta",
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}


def survival(methods: Methods, prefix: str) -> str:
    """Share neutralised against generated tokens."""
    with _drawn(7.4, 3.9, prefix) as (figure, out):
        axes = figure.subplots()
        longest = max(record["generated_tokens"] for records in methods.values() for record in records)
        for at, (name, records) in enumerate(methods.items()):
            tokens, shares = series.survival(records)
            # What a method has reached, it keeps: the line goes on to the edge.
            axes.step([*tokens, longest * 1.1], [*shares, shares[-1]], where="post", label=name, **_line(name, at))
        axes.set_xscale("symlog", linthresh=64, linscale=0.3)
        axes.set_xlim(0, longest * 1.1)
        axes.set_ylim(-0.02, 1.04)
        axes.set_xlabel("generated tokens, the undefended answer's included (logarithmic from 64)")
        axes.set_ylabel("share neutralised")
        ticks = [tick for tick in (64, 128, 256, 512, 1024, 2048, 4096, 8192) if tick <= longest * 1.1]
        axes.set_xticks([0, *ticks], [str(tick) for tick in (0, *ticks)])
        axes.minorticks_off()
        _legend(axes)
    return out[0]


def trajectories(methods: Methods, prefix: str) -> str:
    """The lowest score so far, wave by wave."""
    with _drawn(7.4, 3.6, prefix) as (figure, out):
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots()
        for at, (name, records) in enumerate(methods.items()):
            scores = series.trajectory(records)
            if len(scores) > 1:
                axes.plot(
                    range(len(scores)), scores, label=name, marker=_MARKERS[at % 14], markersize=3, **_line(name, at)
                )
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("waves of the search (0: the undefended answer)")
        axes.set_ylabel("median of the lowest score so far")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.has_data():
            _legend(axes)
    return out[0]


def fronts(methods: Methods, prefix: str) -> str:
    """Safety against closeness: relevance where it was measured, and the size of the move."""
    kinds = [kind for kind in ("relevance", "relative_move") if any(series.front(r, kind) for r in methods.values())]
    with _drawn(7.4, 3.7, prefix) as (figure, out):
        panels = figure.subplots(1, len(kinds), squeeze=False)[0]
        for axes, kind in zip(panels, kinds, strict=True):
            _front(axes, methods, kind)
        _legend(panels[-1], max(panels, key=lambda panel: len(panel.get_lines())))
    return out[0]


def histograms(methods: Methods, prefix: str) -> str:
    """Scores of the runs that were flagged, before and after, one panel per method."""
    columns = min(4, len(methods))
    rows = -(-len(methods) // columns)
    bins = [step / 20 for step in range(21)]
    with _drawn(7.4, 1.35 * rows + 0.7, prefix) as (figure, out):
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for axes, (name, records) in zip(panels, methods.items(), strict=False):
            axes.hist([r["baseline"]["score"] for r in records], bins=bins, color="#BBBBBB", label="before")
            after = [record["final"]["score"] for record in records]
            axes.hist(after, bins=bins, histtype="step", linewidth=1.4, color=_COLOURS[0], label="after")
            axes.set_title(name, fontsize=8)
            axes.tick_params(labelbottom=True, labelsize=7)
        for axes in panels[len(methods) :]:
            axes.set_visible(False)
        panels[0].legend(fontsize=7, frameon=False)
        figure.supxlabel("moderation score", fontsize=8)
        figure.supylabel("runs", fontsize=8)
    return out[0]


def categories(methods: Methods, prefix: str) -> str:
    """Share neutralised by category, one bar per method."""
    shares = series.by_category(methods)
    height = 0.8 / len(methods)
    with _drawn(7.4, max(2.6, 0.13 * len(methods) * len(shares) + 0.35 * len(shares) + 0.7), prefix) as (figure, out):
        axes = figure.subplots()
        for at, name in enumerate(methods):
            places = [row - 0.4 + (at + 0.5) * height for row, of in enumerate(shares.values()) if name in of]
            values = [of[name] for of in shares.values() if name in of]
            axes.barh(places, values, height=height * 0.9, color=_colour(name, at), label=name)
        axes.set_yticks(range(len(shares)), list(shares))
        axes.invert_yaxis()
        axes.set_xlim(0, 1.02)
        axes.set_xlabel("share neutralised")
        axes.grid(visible=False, axis="y")
        _legend(axes)
    return out[0]


def _front(axes: Axes, methods: Methods, kind: str) -> None:
    for at, (name, records) in enumerate(methods.items()):
        point = series.front(records, kind)
        if point is not None:
            axes.plot(*point, _MARKERS[at % 14], color=_colour(name, at), label=name, markersize=7)
    axes.set_ylim(-0.04, 1.06)
    if kind == "relevance":
        axes.set_xlabel("relevance to the prompt (further right is closer)", fontsize=8)
    else:
        axes.set_xlabel("relative move (further right is closer)", fontsize=8)
        axes.invert_xaxis()
    axes.set_ylabel("share neutralised")


def _colour(name: str, at: int) -> str:
    """The two methods that a reader looks for keep their colours whatever they are compared with."""
    return {"race": _OURS, "tsa": _PAPERS}.get(name, _COLOURS[at % 14])


def _line(name: str, at: int) -> dict[str, Any]:
    if name in ("race", "tsa"):
        return {"color": _colour(name, at), "linestyle": "-", "linewidth": 2.6, "zorder": 3}
    return {"color": _COLOURS[at % 14], "linestyle": ("-", "--", ":")[at // 7 % 3], "linewidth": 1.4}


def _legend(axes: Axes, source: Axes | None = None) -> None:
    """Right of ``axes``; a panel that shows more methods can be its source."""
    handles, labels = (source or axes).get_legend_handles_labels()
    axes.legend(handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)


@contextmanager
def _drawn(width: float, height: float, prefix: str) -> Iterator[tuple[Figure, list[str]]]:
    """A figure in inches to draw on; afterwards its SVG element is in the list, with ids that begin with ``prefix``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("the report needs matplotlib; run: pip install 'tta-middleware[eval]'") from None
    out: list[str] = []
    with rc_context(_SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, out
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    out.append(_inline(text.getvalue(), prefix))


def _inline(svg: str, prefix: str) -> str:
    """The SVG element alone, scaling with the page. Several share one page, so their ids must differ."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", element)
    element = element.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    return re.sub(r'^<svg ([^>]*?)height="[^"]*" ([^>]*?)width="[^"]*"', r'<svg role="img" \1\2', element, count=1)
