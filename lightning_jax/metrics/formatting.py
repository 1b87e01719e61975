"""Numbers as people read them: counts, bytes, durations, learning rates."""

import math

_DECIMAL = ("", "k", "M", "B", "T", "P", "E")
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def count(number: float) -> str:
    """Three significant digits with a suffix: 999, 1.23k, 45.6M, 456B (short scale: B is 1e9)."""
    if not math.isfinite(number):
        return str(number)
    if abs(number) < 1000 and number == int(number):
        return str(int(number))
    return _scaled(number, 1000, _DECIMAL, "")


def size(number_of_bytes: float) -> str:
    """Bytes in binary units with three significant digits: 512 B, 1.90 GiB."""
    return _scaled(number_of_bytes, 1024, _BINARY, " ")


def duration(seconds: float) -> str:
    """The two largest units: 45s, 4m10s, 3h02m, 12d07h."""
    if not math.isfinite(seconds):
        return "n/a"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)
    if days:
        return f"{days}d{hours_left:02d}h"
    if hours:
        return f"{hours}h{minutes_left:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def scientific(number: float) -> str:
    """A learning rate: 3.00e-4, and 0 for zero."""
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    mantissa, exponent = f"{number:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _scaled(number: float, base: int, suffixes: tuple[str, ...], space: str) -> str:
    power = 0
    # 999.5 already prints as 1000 with three digits, so it moves on to the next suffix.
    while abs(number) >= (999.5 if base == 1000 else base) and power < len(suffixes) - 1:
        number /= base
        power += 1
    digits = 0 if abs(number) >= 99.95 or (power == 0 and number == int(number)) else 1 if abs(number) >= 9.995 else 2
    return f"{number:.{digits}f}{space}{suffixes[power]}"
