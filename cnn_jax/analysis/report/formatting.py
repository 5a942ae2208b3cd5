"""Numbers and shapes for people."""

# No-break space, multiplication sign and dash.
SPACE, TIMES, DASH = "\u00a0", "\u00d7", "\u2013"


def count(number: float) -> str:
    """1234567 -> "1,234,567"."""
    return f"{number:,.0f}"


def short(number: float) -> str:
    """1234567 -> "1.23 M", in at most three digits."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{SPACE}{unit}"
    return f"{number:.3g}"


def percent(share: float | None) -> str:
    """0.8731 -> "87.3 %"; None -> a dash. A share below 1 is never written as 100.0 %."""
    if share is None:
        return DASH
    rounded = f"{100 * share:.1f}"
    if rounded == "100.0" and share < 1:
        return f">{SPACE}99.9{SPACE}%"
    return f"<{SPACE}0.1{SPACE}%" if rounded == "0.0" and share > 0 else f"{rounded}{SPACE}%"


def duration(seconds: float | None) -> str:
    """754.2 -> "12 min 34 s"; None -> a dash."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.{1 if seconds < 9.95 else 0}f}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    large, small, units = minutes, rest, ("min", "s")
    if minutes >= 60:
        large, small, units = *divmod(minutes, 60), ("h", "min")
    whole = f"{large}{SPACE}{units[0]}"
    return f"{whole} {small}{SPACE}{units[1]}" if small else whole


def shape(sizes: tuple[int, ...]) -> str:
    """(28, 28, 1) -> "28 x 28 x 1", with signs of multiplication."""
    return f"{SPACE}{TIMES}{SPACE}".join(
        f"{size:,}" if len(sizes) == 1 else str(size) for size in sizes
    )


def plural(number: int, noun: str) -> str:
    """(2, "epoch") -> "2 epochs"."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"
