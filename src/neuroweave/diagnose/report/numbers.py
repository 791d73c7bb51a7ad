"""Numbers as people read them, and which direction an interval allows to name."""

from __future__ import annotations

import math

from neuroweave.diagnose.results.records import Estimate

PRACTICALLY = 0.001  # a ratio that lies wholly within 0.1 % of 1 is called practically the same
TOO_NOISY = 1.5  # a speed ratio's interval that spans more than this factor says nothing
MOST_DECIMALS = 7


def number(value: float, *, least: int = 0) -> str:
    """Four significant digits or decimals, at least `least` decimals; an exponent for the very large or small."""
    size = abs(value)
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    if size < 1000 and value == int(value):
        return str(int(value))  # an exact 1 or 0 is not the same as 1.000
    if size >= 1e9 or size < 1e-4:
        return f"{value:.3g}"
    if size >= 1000:
        return f"{float(f'{value:.4g}'):,.0f}"
    decimals = 1 if size >= 100 else 2 if size >= 10 else 3 if size >= 1 else 4
    return f"{value:.{max(decimals, least)}f}"


def decimals_for(estimate: Estimate, reference: float | None = None) -> int:
    """Decimals that show how wide the interval is and, where it leaves `reference` out, that it does."""
    if estimate.low is None or estimate.high is None:
        return 0
    gaps = [estimate.high - estimate.low]
    if reference is not None and estimate.excludes(reference):
        gaps += [abs(end - reference) for end in (estimate.value, estimate.low, estimate.high)]
    gaps = [gap for gap in gaps if 0 < gap < math.inf]
    return min(MOST_DECIMALS, max((-math.floor(math.log10(gap)) for gap in gaps), default=0))


def value_of(estimate: Estimate, reference: float | None = None) -> str:
    return number(estimate.value, least=decimals_for(estimate, reference))


def interval(estimate: Estimate, reference: float | None = None) -> str:
    """`low to high`, or an empty text."""
    if estimate.low is None or estimate.high is None:
        return ""
    least = decimals_for(estimate, reference)
    return f"{number(estimate.low, least=least)} to {number(estimate.high, least=least)}"


def with_interval(estimate: Estimate, reference: float | None = None) -> str:
    """`value (95 % interval low to high)`."""
    between = interval(estimate, reference)
    return f"{value_of(estimate, reference)} ({f'95 % interval {between}' if between else 'no interval'})"


def bracketed(estimate: Estimate, reference: float | None = None) -> str:
    """`value [low, high]`."""
    between = interval(estimate, reference)
    return value_of(estimate, reference) + (f" [{between.replace(' to ', ', ')}]" if between else "")


def percent(estimate: Estimate) -> str:
    """`93.1 % (92.5 to 93.7)`."""
    between = (
        "" if not interval(estimate) else f" ({100 * (estimate.low or 0):.1f} to {100 * (estimate.high or 0):.1f})"
    )
    return f"{100 * estimate.value:.1f} %{between}"


def share(part: int, whole: int) -> str:
    """`93.1 %`; 0 % and 100 % only where they are exact."""
    if part in (0, whole):
        return "100 %" if part else "0 %"
    percentage = 100 * part / whole
    return "under 0.1 %" if percentage < 0.1 else "over 99.9 %" if percentage > 99.9 else f"{percentage:.1f} %"


def reading(
    estimate: Estimate, reference: float, *, above: str = "higher", below: str = "lower", tolerance: float = 0.0
) -> str:
    """`above` or `below` the reference of "no difference", or why neither can be said.

    An interval that lies wholly within `tolerance` of the reference reads "practically the same".
    """
    if estimate.value == reference and {estimate.low, estimate.high} <= {None, reference}:
        return "identical"
    if estimate.low is None or estimate.high is None or not math.isfinite(estimate.value):
        return "no interval"
    if tolerance and reference - tolerance <= estimate.low and estimate.high <= reference + tolerance:
        return "practically the same"
    if not estimate.excludes(reference):
        return "within noise"
    return above if estimate.value > reference else below


def speed_reading(ratio: Estimate) -> str:
    """`faster` or `slower`, or why neither can be said."""
    if ratio.low and ratio.high and ratio.high / ratio.low > TOO_NOISY:
        return "too noisy to tell"
    return reading(ratio, 1.0, above="faster", below="slower")
