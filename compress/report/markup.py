"""Writing HTML and SVG elements, with every attribute and text escaped."""

from __future__ import annotations

import html
from collections.abc import Mapping

Attribute = str | float | None


def escape(value: object) -> str:
    """``value`` as text that is safe between tags and within quoted attributes."""
    return html.escape(str(value), quote=True)


def number(value: float) -> str:
    """A coordinate, to a hundredth, without trailing zeros."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def element(tag: str, attributes: Mapping[str, Attribute] | None = None, *children: str) -> str:
    """An element with its end tag. ``children`` are markup already; attributes that are None are left out."""
    parts = [
        f' {name}="{escape(value if isinstance(value, str) else number(value))}"'
        for name, value in (attributes or {}).items()
        if value is not None
    ]
    return f"<{tag}{''.join(parts)}>{''.join(children)}</{tag}>"


def tag(name: str, css_class: str, *children: str) -> str:
    """An element with a class."""
    return element(name, {"class": css_class or None}, *children)
