"""What the values of a label map mean: known numberings, numberings in words (`--labels`), and which values leave it open."""

import re
import typing

import numpy as np
from absl import logging

from radgs_jax import errors
from radgs_jax import levels

NAMES = tuple(
    [f"vertebrae_C{n}" for n in range(1, 8)]
    + [f"vertebrae_T{n}" for n in range(1, 13)]
    + [f"vertebrae_L{n}" for n in range(1, 6)]
)
"""TotalSegmentator's class names of vertebrae, from head to feet."""
VERSE_BY_NAME = {
    **{name: number for number, name in enumerate(NAMES, 1)},
    **{"vertebrae_L6": levels.L6, "vertebrae_T13": levels.T13},
    **{"sacrum": levels.SACRUM, "vertebrae_S1": levels.SACRUM, "coccyx": levels.COCCYX},
}
"""VerSe numbers by class name, with those of other programs. TotalSegmentator separates S1 from the sacrum, VerSe does not."""
VERSE_LARGEST = max(levels.ORDER)
"""Largest VerSe number."""
BONES = "bones"
"""The numbering of a mask of bones beyond the spine: value v becomes the label levels.FIRST_BONE + v, which has no neighbours."""
LABEL_MAPS = {
    "verse": {number: number for number in levels.ORDER},
    # `total_v1` and `total` in TotalSegmentator's map_to_binary.py. Both count vertebrae from L5 up to C1.
    "totalsegmentator_v1": {**{18 + i: 24 - i for i in range(24)}, 92: 26},
    "totalsegmentator": {**{27 + i: 24 - i for i in range(24)}, 25: 26, 26: 26},
}
"""VerSe number by label value; values that are not listed become 0. `totalsegmentator` is the task `total` of version 2."""
LARGEST_CERVICAL = 7
"""VerSe number of C7. Values that end here or below are those of the neck, or of any part of the spine counted from 1."""
LARGEST_COUNT = 12
"""Most vertebrae of a part of the spine: the thoracic ones, counted from 1. Values from 1 to this number or fewer are those, or the
neck and the upper chest in VerSe's numbers."""
GRAMMAR = "verse, totalsegmentator, totalsegmentator_v1, binary:L1, lumbar:1-5, or VALUES:LEVELS such as 1-5:L1-L5"
"""What `parse_labels` takes, for error messages."""

_REGIONS = {"cervical": tuple(range(1, 8)), "thoracic": tuple(range(8, 20)), "lumbar": tuple(range(20, 26))}
_ANY = -1
"""Stands for every value above 0 in what `parse_labels` returns."""


def parse_labels(text: str, source: object = "flags", field: str = "--labels") -> dict[int, int]:
    """What the values of a label map mean, from words.

      NAME             a key of LABEL_MAPS, or 'bones'
      binary:LEVEL     every value above 0 is that vertebra; there is one such value
      REGION:VALUES    cervical, thoracic or lumbar, its first level first: 'lumbar:1-5' counts L1 to L5 from the head,
                       'lumbar:5-1' from the feet
      VALUES:LEVELS    as many values as levels: '255:L1', '1-4:T11-L2', '3-1:20-22'

    VALUES is a number or a run A-B in either direction; a LEVEL is a VerSe number or a name (20, L1, T13, S1, sacrum), LEVELS one
    of these or a run from head to feet, in which T13 and L6 count only as its ends. Rules of the last three forms combine by
    commas. Values that no rule names become 0.

    Args:
      text: the words.
      source, field: named in errors.

    Returns:
      VerSe number by value; the value -1 stands for every value above 0.

    Raises:
      InputError: the words are none of these, a value is named twice or not within 1 to 255, or a run has another length.
    """
    name = text.strip().lower()
    if name == BONES:
        return {value: levels.FIRST_BONE + value for value in range(1, 256 - levels.FIRST_BONE)}
    if name in LABEL_MAPS:
        return LABEL_MAPS[name]
    found: dict[int, int] = {}
    for rule in name.split(","):
        values, numbers = _rule(rule.strip(), lambda: errors.fail(source, field, repr(text), GRAMMAR))
        if len(values) != len(numbers):
            counts = f"{len(values)} values for {len(numbers)} levels in {rule.strip()!r}"
            errors.fail(source, field, counts, "as many values as levels")
        for value, number in zip(values, numbers):
            if value in found or _ANY in found or found and value == _ANY:
                errors.fail(source, field, f"a value that {text!r} names twice", "every value once")
            found[value] = number
    return found


def _rule(rule, fail: typing.Callable[[], typing.NoReturn]):
    """(values, VerSe numbers) of one rule."""
    left, _, right = rule.partition(":")
    if left == "binary":
        number = levels.level_number(right)
        return ([_ANY], [number]) if number is not None else fail()
    if left in _REGIONS:
        values = _run(right, fail)
        return values, _REGIONS[left][: len(values)]
    return _run(left, fail), _levels(right, fail)


def _run(text, fail):
    """The values of 'A' or 'A-B'."""
    match = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", text)
    if not match:
        fail()
    first = int(match[1])
    last = int(match[2]) if match[2] else first
    if not (1 <= first <= 255 and 1 <= last <= 255):
        fail()
    return list(range(first, last + 1)) if first <= last else list(range(first, last - 1, -1))


def _levels(text, fail):
    """The VerSe numbers of 'LEVEL' or 'LEVEL-LEVEL'."""
    ends = [levels.level_number(end) for end in text.split("-")]
    if None in ends or len(ends) > 2:
        fail()
    first, last = levels.ORDER.index(ends[0]), levels.ORDER.index(ends[-1])
    if first > last:
        fail()
    return [n for n in levels.ORDER[first : last + 1] if n in ends or n not in levels.SOMETIMES]


def check_name(label_map: str | None) -> None:
    """Checks a numbering that Python code gives.

    Raises:
      ValueError: it is neither None nor what `parse_labels` takes.
    """
    if label_map is not None and ":" not in label_map and label_map not in (*LABEL_MAPS, BONES):
        raise ValueError(
            f"label_map is {label_map!r}, wanted one of {', '.join(LABEL_MAPS)}, {BONES}, or VALUES:LEVELS"
        )


def to_verse(values: np.ndarray, label_map: dict[int, int]) -> np.ndarray:
    """Converts label values (any shape, integers 0 to 255) to VerSe numbers, uint8.

    `label_map` is a value of LABEL_MAPS or of `parse_labels`.
    """
    table = np.zeros(256, np.uint8)
    if _ANY in label_map:
        table[1:] = label_map[_ANY]
    for value, number in label_map.items():
        if value != _ANY:
            table[value] = number
    return table[values]


def apply(path: object, values: np.ndarray, present: list[int], label_map: str) -> np.ndarray:
    """Converts label values (any shape, integers 0 to 255) to VerSe numbers, uint8, by the words `label_map`.

    Args:
      path: the label map's file, named in errors.
      present: the values above 0 that occur.

    Raises:
      InputError: as `parse_labels`; none of the values occurs; or a rule 'binary' meets several values.
    """
    meaning = parse_labels(label_map, path, "labels")
    if _ANY in meaning and len(present) > 1:
        wanted = f"one value above 0 for {label_map!r}, or a rule for each such as {present[0]}:L1"
        errors.fail(path, "labels", f"the values {_listed(present)}", wanted)
    others = [value for value in present if _ANY not in meaning and not meaning.get(value)]
    if others == present:
        errors.fail(path, "labels", f"the values {_listed(present)}", f"values that {label_map!r} names")
    if others and meaning is LABEL_MAPS["verse"]:
        logging.warning("%s: labels: the values %s are no VerSe numbers, ignored", path, _listed(others))
    return to_verse(values, meaning)


def check_clear(path: object, present: list[int], counts_up: bool) -> None:
    """Refuses values that are VerSe numbers but may as well be a count from 1, or a mask of a single vertebra.

    Args:
      path: the label map's file, named in errors.
      present: the values above 0 that occur, ascending.
      counts_up: they increase from the feet up.

    Raises:
      InputError: it cannot be told what they are. The line names the words that tell.
    """
    if len(present) == 1 and (present[0] == 1 or present[0] > VERSE_LARGEST):
        wanted = "a word on which vertebra that is: --labels=binary:20 --label=20 for L1 (VerSe's numbers)"
        own = ", or --labels=verse for C1" if present[0] == 1 else ""
        errors.fail(path, "labels", f"a mask of one value, {present[0]}", wanted + own)
    if not present or present[-1] > LARGEST_COUNT or present[-1] > LARGEST_CERVICAL and present[0] > 1:
        return
    first, last = present[0], present[-1]
    run = f"{last}-{first}" if counts_up else f"{first}-{last}"
    region = "thoracic" if last > 6 else "lumbar"
    top = 8 if last > 6 else 20
    neck = f"--labels=verse ({levels.level_name(first)} to {levels.level_name(last)})"
    # A count that starts beyond 1 belongs to levels beyond the region's first.
    other = f"{region}:{run}"
    if first > 1:
        names = levels.level_name(top + first - 1), levels.level_name(top + last - 1)
        other = f"{run}:{names[0]}-{names[1]}" if first < last else f"{first}:{names[0]}"
    found = f"the values {_listed(present)}, which may be the neck or a count"
    wanted = f"a word on what they are: {neck}, or such as --labels={other} --label={top + first - 1}"
    errors.fail(path, "labels", found, wanted)


def _listed(present):
    return ", ".join(map(str, present[:12])) + (", ..." if len(present) > 12 else "")
