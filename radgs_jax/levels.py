"""Vertebral levels by VerSe number: their order from head to feet, their names, their neighbours and their spacing."""

import re
from collections.abc import Collection

import numpy as np

T12, L1, L5, L6, SACRUM, COCCYX, T13 = 19, 20, 24, 25, 26, 27, 28
"""VerSe numbers (https://github.com/anjany/verse) that are named in the code. T13 was added last, so numbers do not run along the
spine."""
ORDER = (*range(1, T12 + 1), T13, *range(L1, COCCYX + 1))
"""VerSe numbers from head to feet: C1-C7 are 1..7, T1-T12 8..19, T13 28, L1-L6 20..25, the sacrum 26, the coccyx 27."""
VERTEBRAE = ORDER[: ORDER.index(SACRUM)]
"""The vertebrae among them, which move each for itself: `ORDER` without sacrum and coccyx."""
SOMETIMES = (T13, L6)
"""Levels that most people do not have. Between the levels beside them nothing is missing where they are absent."""
FIRST_BONE = 100
"""Labels above this are bones beyond the spine: FIRST_BONE plus their value in the mask. They have no neighbours."""
PITCH_MM = {3: 17.0, 8: 19.0, 12: 21.0, 16: 23.5, 18: 27.0, 20: 32.5, 22: 35.5, 24: 35.5}
"""Typical distance in an adult, mm, from a vertebra's centre to the centre of the next one below, by VerSe number; values between
the listed levels are interpolated. Chosen by hand. It only sets where the search looks for neighbours: the coarsest level of a
refinement captures 10 mm and more, so spines that are a third larger or smaller are covered; at half or twice the pitch the search
would start between two vertebrae or at the wrong one."""
_T13_PLACE = 0.5 * (T12 + L1)
"""Where T13 is between the levels of PITCH_MM."""


def level_name(label: int) -> str:
    """Name of a label: 'L1' for the VerSe number 20, 'bone 3' for the value 3 of a mask of other bones."""
    for first, last, letter in ((1, 7, "C"), (8, 19, "T"), (20, 25, "L")):
        if first <= label <= last:
            return f"{letter}{label - first + 1}"
    if label > FIRST_BONE:
        return f"bone {label - FIRST_BONE}"
    return {26: "sacrum", 27: "coccyx", 28: "T13"}.get(label, f"label {label}")


_NUMBERS = {level_name(label).lower(): label for label in ORDER} | {"s1": SACRUM, "s": SACRUM}
"""VerSe numbers by name in lower case. VerSe does not separate S1 from the sacrum."""


def level_number(text: str) -> int | None:
    """VerSe number of a level given by name ('L1', 't13', 'S1', 'sacrum', 'vertebrae_L1') or number ('20'); None for other text."""
    text = re.sub(r"^vertebrae?_", "", text.strip().lower())
    if text.isascii() and text.isdigit():
        return int(text) if len(text) < 4 and int(text) in ORDER else None
    return _NUMBERS.get(text)


def in_order(labels: Collection[int]) -> list[int]:
    """The levels among some labels, from head to feet. Numbers that are no level are left out."""
    return [label for label in ORDER if label in labels]


def above(label: int, present: Collection[int]) -> int | None:
    """The level next above VerSe number `label`, if it is among the labels `present`.

    A level of `SOMETIMES` that is not present is passed over: above L1 is T13 where there is one, otherwise T12. No other level is:
    without T11, nothing is above T12. Labels that are no level have no neighbours.
    """
    return _next(label, present, ORDER[::-1])


def below(label: int, present: Collection[int]) -> int | None:
    """The level next below VerSe number `label`, if it is among the labels `present`; as `above`."""
    return _next(label, present, ORDER)


def _next(label, present, order):
    if label not in order:
        return None
    for other in order[order.index(label) + 1 :]:
        if other in present:
            return other
        if other not in SOMETIMES:
            return None
    return None


def steps(upper: int, lower: int, present: Collection[int]) -> int:
    """Number of levels from `upper` down to `lower`; negative if `lower` is above. Of SOMETIMES, those not in `present` do not
    count.

    A number that is no level is as far off as the numbers differ.
    """
    if upper not in ORDER or lower not in ORDER:
        return lower - upper
    first, last = sorted((ORDER.index(upper), ORDER.index(lower)))
    absent = sum(label in SOMETIMES and label not in (upper, lower, *present) for label in ORDER[first:last])
    count = last - first - absent
    return count if ORDER[first] == upper else -count


def neighbours_mm(label: int) -> tuple[float, ...]:
    """Positions along the spine, in mm, of the vertebrae below and above VerSe number `label`, from `PITCH_MM`; up is positive.

    Empty for a bone beyond the spine.
    """
    if label > FIRST_BONE:
        return ()
    place, before = (_T13_PLACE, T12) if label == T13 else (label, label - 1)
    below_mm, above_mm = np.interp([place, before], list(PITCH_MM), list(PITCH_MM.values()))
    return -below_mm, above_mm


def pitch_mm(upper: int, lower: int, present: Collection[int]) -> float:
    """Typical distance in an adult, mm, from the centre of level `upper` down to that of `lower`, both vertebrae, from `PITCH_MM`.

    Levels between them count as in `steps`.
    """
    between = ORDER[ORDER.index(upper) : ORDER.index(lower)]
    return float(sum(-neighbours_mm(n)[0] for n in between if n == upper or n in present or n not in SOMETIMES))
