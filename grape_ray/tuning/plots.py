"""The plots of a sweep's page: drawn by matplotlib as SVG, and made part of the page, whose colours
they take.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from grape_ray.tuning.trials import TrialRow

if TYPE_CHECKING:  # matplotlib takes a second to import, so it is imported when a plot is made
    from matplotlib.axes import Axes

# role -> (colour on light paper, on dark); a plot is drawn in the first and says the role instead
PALETTE = {
    "ink": ("#1b1f24", "#e6e9ec"),
    "soft": ("#5c6670", "#9aa5b1"),
    "line": ("#d8dee4", "#343b43"),
    "paper": ("#ffffff", "#14181c"),
    "tile": ("#f4f6f8", "#1d2329"),
    "run": ("#8ba3bd", "#5f7c9b"),
    "best": ("#c2410c", "#fb8c4e"),
    "burn": ("#1d6fa5", "#5fb3e6"),
}
_SETTINGS: dict[Any, object] = {
    "svg.fonttype": "none",  # text stays text: it can be selected, read aloud, and is small
    "svg.hashsalt": "grape-ray",  # without it the ids in the SVG are random
    "text.parse_math": False,  # a $ in a name is a $
    "font.family": "DejaVu Sans",  # comes with matplotlib, which measures with it
    "font.size": 11,
    "axes.formatter.useoffset": False,
    "axes.edgecolor": PALETTE["line"][0],
    "axes.labelcolor": PALETTE["soft"][0],
    "text.color": PALETTE["soft"][0],
    "xtick.color": PALETTE["soft"][0],
    "ytick.color": PALETTE["soft"][0],
    "grid.color": PALETTE["line"][0],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_DECADE = 8.0  # values whose ratio is larger get a logarithmic axis
_FEW = 6  # so many different integers, or fewer, get a place each
_SMALLEST_BAR = 0.003  # of the axis: an attempt that ended at once is seen


@dataclass(frozen=True)
class Span:
    """One attempt of a run: from its first charge to the last that was heard of it, in seconds."""

    row: TrialRow
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Plot:
    """A plot in the page.

    Attributes:
        caption: what stands above it, and is its accessible name. svg: an element for HTML.
        wide: whether it takes a line for itself.
    """

    caption: str
    svg: str
    wide: bool = False


def by_parameter(
    name: str, label: str, metric: str, rows: Sequence[TrialRow], best: TrialRow | None
) -> Plot:
    """Score against one varied field: a dot a run, larger the longer it trained."""
    tips: dict[str, str] = {}

    def draw(axes: Axes) -> None:
        place = _fit_axis(axes, [row.values[name] for row in rows])
        longest = max(row.steps for row in rows) or 1
        for row in _best_last(rows, best):
            size = 6 + 8 * row.steps / longest
            at, colour = [place(row.values[name])], _colour(row, best)
            axes.plot(
                at, [row.score or 0.0], "o", ms=size, color=colour, gid=_tip(tips, about(row))
            )
        axes.set(xlabel=label, ylabel=metric)

    summary = f"{len(rows)} runs" + (f"; the best is {about(best)}" if best else "")
    return _plot(f"by-{name}", f"{metric} by {label}", summary, draw, tips)


def over_steps(metric: str, rows: Sequence[TrialRow], best: TrialRow | None) -> Plot:
    """The scores of each run as it went on."""
    tips: dict[str, str] = {}

    def draw(axes: Axes) -> None:
        for row in _best_last(rows, best):
            steps, scores = zip(*((step, score) for _, step, score in row.reports))
            look = {"color": _colour(row, best), "linewidth": 2.5 if row is best else 1.5}
            axes.plot(steps, scores, **look, gid=_tip(tips, about(row)))
            axes.plot(steps[-1:], scores[-1:], "o", ms=6, **look, gid=_tip(tips, about(row)))
        axes.set_xlim(left=0)
        axes.set(xlabel="step", ylabel=metric)

    summary = f"{len(rows)} runs, a line each"
    return _plot("over-steps", f"{metric} as trials go on", summary, draw, tips)


def timeline(rows: Sequence[TrialRow], spans: Sequence[Span], best: TrialRow | None) -> Plot:
    """When each run trained: a bar an attempt."""
    tips: dict[str, str] = {}
    places = {row.run: place for place, row in enumerate(reversed(rows))}
    last_s = max(span.end_s for span in spans)

    def draw(axes: Axes) -> None:
        for span in spans:
            length = max(span.end_s - span.start_s, _SMALLEST_BAR * last_s)
            look = {"height": 0.7, "color": _colour(span.row, best)}
            (bar,) = axes.barh(places[span.row.run], length, left=span.start_s, **look)
            bar.set_gid(_tip(tips, about(span.row)))
        axes.set_yticks([])
        axes.set(xlabel="seconds since the first charge", ylabel="run")

    height = 60 + 18 * max(len(rows), 5)
    summary = f"{len(spans)} attempts of {len(rows)} runs in {last_s:.0f} seconds"
    caption = "When each run trained, a bar an attempt"
    return _plot("timeline", caption, summary, draw, tips, height=height)


def budget(curve: Sequence[tuple[float, float]], epsilon: float) -> Plot:
    """Epsilon of the steps charged so far, (seconds, epsilon) each, below the sweep's own."""

    def draw(axes: Axes) -> None:
        seconds, spent = zip(*curve)
        axes.step(seconds, spent, where="post", color=PALETTE["burn"][0], linewidth=2)
        axes.axhline(epsilon, color=PALETTE["soft"][0], linestyle=(0, (4, 4)), linewidth=1)
        label = f"the sweep's budget, epsilon {epsilon:g}"
        at = axes.get_yaxis_transform()  # x in parts of the axis, y in epsilon
        axes.text(1, 0.98 * epsilon, label, ha="right", va="top", transform=at)
        axes.set_ylim(0, 1.1 * epsilon)
        axes.set(xlabel="seconds since the first charge", ylabel="epsilon")

    summary = f"epsilon {curve[-1][1]:.3g} of {epsilon:g} after {curve[-1][0]:.0f} seconds"
    caption = "Epsilon of the steps charged so far, all trials together"
    return _plot("budget", caption, summary, draw, {}, width=640)


def about(row: TrialRow) -> str:
    """A run in one line."""
    values = ", ".join(f"{short(name)} {value_text(value)}" for name, value in row.values.items())
    if row.score is None:
        return f"{row.run}: {values}"
    return f"{row.run}: {row.score:.4f} after {row.steps} steps; {values}"


def short(name: str) -> str:
    """A field's name as a person reads it: `learning rate` for `method.learning_rate`."""
    return name.rpartition(".")[2].replace("_", " ")


def value_text(value: object) -> str:
    """A value of a field as a person reads it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _fit_axis(axes: Axes, values: Sequence[Any]) -> Callable[[Any], float]:
    """Sets the x axis for these values, and returns where each of them lies: a place for each of
    few values or texts, logarithmic where they span about a decade, linear otherwise.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    distinct = len(set(map(str, values)))
    few = distinct == 1 or (distinct <= _FEW and all(isinstance(v, int) for v in values))
    if few or len(numbers) < len(values):
        ordered = sorted(values) if len(numbers) == len(values) else sorted(values, key=str)
        names = list(dict.fromkeys(map(value_text, ordered)))
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.5, len(names) - 0.5)
        return lambda value: float(names.index(value_text(value)))
    if min(numbers) > 0 and max(numbers) / min(numbers) > _DECADE:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if max(numbers) / min(numbers) < 300 else (1,))
        )
        axes.xaxis.set_major_formatter(lambda value, place: f"{value:.3g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    return float


def _plot(
    name: str, caption: str, summary: str, draw: Callable[[Axes], None], tips: dict[str, str],
    width: int = 420, height: int = 250,
) -> Plot:  # fmt: skip
    """Draws on axes of this size in CSS pixels."""
    import matplotlib
    from matplotlib.figure import Figure

    text = io.BytesIO()
    # The only way to these settings is matplotlib's own table; it is as before afterwards.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # nothing of the user's own style
        for key, value in _SETTINGS.items():
            matplotlib.rcParams[key] = value
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        axes = figure.add_subplot()
        for patch in (figure.patch, axes.patch):
            patch.set_visible(False)
        draw(axes)
        figure.savefig(text, format="svg", metadata=_NO_METADATA)
    return Plot(caption, _for_html(text.getvalue(), name, caption, summary, tips), width > 420)


def _for_html(svg: bytes, name: str, caption: str, summary: str, tips: dict[str, str]) -> str:
    """The SVG as an element of a page: with ids that no other plot has, the page's colours, an
    accessible name and description, and a text for each mark that appears under the pointer.
    """
    root = ElementTree.fromstring(svg)
    for parent in root.iter():
        parent.text = (parent.text or "").strip()
        for child in list(parent):
            child.tail = None
            if child.tag.endswith("}style"):  # it would hold for the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # in HTML the names need no namespace
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        found = attributes.get("id", "")
        if element.tag == "g":  # matplotlib names every group, and nothing refers to one
            attributes.pop("id", None)
        element.attrib.clear()
        element.attrib.update({k: _of_page(k, value, name) for k, value in attributes.items()})
        if found in tips:
            element.insert(0, _element("title", tips[found]))
    for size in ("width", "height"):
        del root.attrib[size]
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title {name}-desc"}
    root.insert(0, _element("title", caption, id=f"{name}-title"))
    root.insert(1, _element("desc", summary, id=f"{name}-desc"))
    return ElementTree.tostring(root, encoding="unicode")


def _of_page(key: str, value: str, name: str) -> str:
    """An attribute's value with ids of this plot alone, and the page's colours."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return f"#{name}-{value[1:]}"
    for role, (light, _) in PALETTE.items():
        value = value.replace(light, f"var(--{role})")
    return value.replace("url(#", f"url(#{name}-")


def _element(tag: str, text: str, **attributes: str) -> ElementTree.Element:
    made = ElementTree.Element(tag, attributes)
    made.text = text
    return made


def _tip(tips: dict[str, str], text: str) -> str:
    """Keeps a mark's text, and returns the id to give the mark."""
    found = f"mark-{len(tips)}"
    tips[found] = text
    return found


def _colour(row: TrialRow, best: TrialRow | None) -> str:
    return PALETTE["best" if row is best else "run"][0]


def _best_last(rows: Iterable[TrialRow], best: TrialRow | None) -> list[TrialRow]:
    """Drawn last, so that nothing lies over it."""
    return sorted(rows, key=lambda row: row is best)
