"""SVG elements, with every attribute and text escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from markupsafe import Markup, escape

Attribute = str | float | None


def number(value: float) -> str:
    """A coordinate, to a hundredth, without trailing zeros."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def element(tag: str, attributes: Mapping[str, Attribute] | None = None, *children: str) -> str:
    """An element as markup, attributes of None left out. Children that are no markup are escaped."""
    parts = [
        f' {name}="{escape(value if isinstance(value, str) else number(value))}"'
        for name, value in (attributes or {}).items()
        if value is not None
    ]
    return Markup(f"<{tag}{''.join(parts)}>{Markup().join(children)}</{tag}>")


def text(x: float, y: float, words: str, css_class: str = "", anchor: str = "middle") -> str:
    """A line of text."""
    return element("text", {"x": x, "y": y, "class": css_class or None, "text-anchor": anchor}, words)


def line(x1: float, y1: float, x2: float, y2: float, css_class: str) -> str:
    """A straight line."""
    return element("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "class": css_class})


def joined(points: Iterable[tuple[float, float]]) -> str:
    """The `points` of a polyline or a polygon."""
    return " ".join(f"{number(x)},{number(y)}" for x, y in points)


def shape(kind: str, x: float, y: float, size: float = 5.5) -> str:
    """A square for `baseline`, a diamond for `final`, a dot for any other kind of mark."""
    if kind == "baseline":
        corner = {"x": x - size, "y": y - size, "width": 2 * size, "height": 2 * size, "rx": 1.5}
        return element("rect", {**corner, "class": "mark"})
    if kind == "final":
        d = size * 1.4
        path = f"M{x:.2f} {y - d:.2f}l{d:.2f} {d:.2f}l{-d:.2f} {d:.2f}l{-d:.2f} {-d:.2f}z"
        return element("path", {"d": path, "class": "mark"})
    return element("circle", {"cx": x, "cy": y, "r": size - 1, "class": "mark"})


def told(css_class: str, tip: str, *parts: str, focus: str = "0") -> str:
    """Parts that say ``tip`` under a pointer, to a screen reader, and to a keyboard unless ``focus`` is `-1`."""
    return element("g", {"class": css_class, "tabindex": focus}, *parts, element("title", None, tip))
