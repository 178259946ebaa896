"""Text of numbers, intervals and durations, and text from outside that cannot affect the text around it."""

import re

from kdlib_faces.evaluation.summary import MeasuredValue, Unit

__all__ = [
    "NOT_MEASURED", "amount", "count", "interval", "isolate", "level", "milliseconds", "percent", "points",
    "seconds", "shorten", "visible",
]  # fmt: skip

NOT_MEASURED = "–"
_SPACE = "\u00a0"  # no line break between a number and its unit
_UNRESOLVED = f"{_SPACE}†"


def amount(measured: MeasuredValue, unit: Unit) -> str:
    """A value in its unit, with a dagger where the test set is too small for its false accept rate.

    Examples:
        >>> amount(MeasuredValue(0.99184), "rate").replace(_SPACE, " "), amount(MeasuredValue(-0.0123), "score")
        ('99.18 %', '−0.012')
    """
    if measured.value is None:
        return NOT_MEASURED
    texts = {"rate": percent(measured.value, 2), "auc": f"{measured.value:.4f}", "score": f"{measured.value:.3f}"}
    return _minus(texts.get(unit, f"{measured.value:.4g}")) + ("" if measured.resolvable else _UNRESOLVED)


def interval(measured: MeasuredValue, unit: Unit) -> str:
    """The interval in the unit of the value, empty where there is none."""
    if measured.low is None or measured.high is None or measured.value is None:
        return ""
    if unit == "rate":
        return _minus(f"{100 * measured.low:.2f} to {100 * measured.high:.2f}")
    digits = 4 if unit == "auc" else 3
    return _minus(f"{measured.low:.{digits}f} to {measured.high:.{digits}f}")


def points(difference: float | None, unit: Unit) -> str:
    """A difference with its sign; rates and AUC in points (hundredths).

    Examples:
        >>> points(0.0123, "rate"), points(-0.5, "score")
        ('+1.23', '−0.500')
    """
    if difference is None:
        return NOT_MEASURED
    return _minus(f"{100 * difference:+.2f}" if unit in ("rate", "auc") else f"{difference:+.3f}")


def percent(rate: float, digits: int = 1) -> str:
    """0.8123 as '81.2 %'."""
    return f"{100 * rate:.{digits}f}{_SPACE}%"


def level(confidence: float) -> str:
    """0.95 as '95 %'."""
    return f"{100 * confidence:g}{_SPACE}%"


def count(number: float | None) -> str:
    """A large count in three figures: 1003136 as '1.00 M', 12345 as '12.3 k', 900 as '900'."""
    if number is None:
        return NOT_MEASURED
    for threshold, size, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if number >= threshold:
            scaled = number / size
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{_SPACE}{unit}"
    return f"{number:,.0f}"


def seconds(duration: float | None) -> str:
    """52.3 as '52 s', 130 as '2 min 10 s', 9000 as '2 h 30 min'."""
    if duration is None:
        return NOT_MEASURED
    whole = round(duration)
    if whole < 90:
        return f"{duration:.1f} s" if whole < 10 else f"{whole} s"
    if whole < 5400:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def milliseconds(duration: float | None) -> str:
    """8.4213 as '8.42 ms'."""
    return NOT_MEASURED if duration is None else f"{duration:.3g} ms"


_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_RIGHT_TO_LEFT = re.compile(
    "[\u0590-\u08ff\u200e\u200f\u202a-\u202e\u2066-\u2069\ufb1d-\ufdff\ufe70-\ufeff\U00010800-\U00010fff\U0001e800-\U0001efff]"
)
_ISOLATE, _END = "\u2068", "\u2069"


def visible(text: str) -> str:
    """Control characters and lone surrogates as escapes, such as `\\x1b`; line breaks and tabs stay."""
    return _CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)


def isolate(text: str) -> str:
    """Text with right-to-left characters or direction marks between the characters that keep it apart from its neighbors."""
    if not _RIGHT_TO_LEFT.search(text):
        return text
    kept, depth = [], 0
    for character in text:
        if character != _END or depth:  # an end without a start would end the isolation
            kept.append(character)
            depth += (character in "\u2066\u2067\u2068") - (character == _END)
    return f"{_ISOLATE}{''.join(kept)}{_END * (depth + 1)}"


def shorten(text: str, limit: int = 60) -> str:
    """One line without control characters, cut with an ellipsis."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _minus(text: str) -> str:
    return text.replace("-", "−")
