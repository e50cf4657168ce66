"""Colours as WCAG 2.2 sees them."""

from __future__ import annotations

import numpy as np


def linear(colour: str) -> np.ndarray:
    """Linear RGB, [3] in [0, 1], of "#rrggbb" or of a browser's "rgb(r, g, b)"."""
    if colour.startswith("#"):
        numbers = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    else:
        numbers = [int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    parts = np.array(numbers) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def luminance(colour: str) -> float:
    return float(linear(colour) @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(colour) + 0.05 for colour in (one, other)), reverse=True)
    return light / dark
