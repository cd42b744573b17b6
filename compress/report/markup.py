"""Writing SVG elements, with every attribute and text escaped."""

from __future__ import annotations

from collections.abc import Mapping

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
