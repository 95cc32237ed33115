"""How numbers are written for people: significant digits, per cent, fixed decimals by kind of number."""

from __future__ import annotations

from collections.abc import Callable


def significant(value: float, digits: int = 3) -> str:
    """`digits` significant digits, with an exponent only where plain digits would be hard to read."""
    if value == 0:
        return "0"
    if value < 0:
        return f"−{significant(-value, digits)}"
    if 1e-4 <= abs(value) < 1e9:
        return f"{float(f'{value:.{digits}g}'):,.10g}" if abs(value) < 1e6 else f"{float(f'{value:.{digits}g}'):,.0f}"
    return f"{value:.{digits - 1}e}"


def percent(fraction: float | None, digits: int = 3) -> str:
    """A fraction in per cent; 'unknown' for None."""
    return "unknown" if fraction is None else f"{significant(100 * fraction, digits)} %"


def counted(count: int, noun: str) -> str:
    """As in '1 frame', '2 frames'."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


FORMATS: dict[str, Callable[[float], str]] = {
    "divergence": lambda value: f"{value:.4f}",
    "percent": percent,
    "percent_error": lambda value: percent(value, 2),
    "energy": lambda value: f"{value:.2f}".replace("-", "−"),
    "length": lambda value: f"{value:.3f}",
    "degrees": lambda value: f"{value:.1f}",
    "count": lambda value: f"{value:,}",
    "number": significant,
}
