"""The order of levels: T13 is 28 and lies between T12 and L1; neighbours, names and distances follow the order."""

import numpy as np
import pytest

from radgs_jax import levels

FULL = tuple(range(1, 25)) + (26,)


def test_the_order_is_anatomical():
    assert levels.ORDER[17:22] == (18, 19, 28, 20, 21) and levels.ORDER[-4:] == (24, 25, 26, 27)
    assert sorted(levels.ORDER) == list(range(1, 29)) and levels.VERTEBRAE[-1] == 25
    assert levels.in_order({28, 20, 26, 19, 120, 27}) == [19, 28, 20, 26, 27]


@pytest.mark.parametrize(
    ("present", "chain"),
    [
        (FULL, (18, 19, 20, 21)),
        (FULL + (28,), (19, 28, 20)),
        (FULL + (25,), (24, 25, 26)),
        (FULL + (27,), (24, 26, 27)),
        ((22, 28, 20), (28, 20)),
    ],
)
def test_neighbours_are_those_of_the_spine(present, chain):
    for upper, lower in zip(chain, chain[1:]):
        assert levels.below(upper, present) == lower and levels.above(lower, present) == upper
        assert levels.steps(upper, lower, present) == 1 and levels.steps(lower, upper, present) == -1


def test_only_levels_that_may_be_absent_are_passed_over():
    assert levels.above(19, (17, 19)) is None and levels.below(17, (17, 19)) is None
    assert levels.above(1, FULL) is None and levels.below(27, FULL) is None
    assert levels.above(20, (18, 20)) is None
    # Bones beyond the spine have no neighbours.
    assert levels.above(120, (119, 120, 121)) is None and levels.below(0, (0, 1)) is None


@pytest.mark.parametrize("label", range(1, 25))
def test_without_t13_and_l6_neighbours_are_the_numbers_beside(label):
    vertebrae = tuple(range(1, 25))
    assert levels.above(label, vertebrae) == (label - 1 if label > 1 else None)
    assert levels.below(label, vertebrae) == (label + 1 if label < 24 else None)
    assert all(levels.steps(label, other, vertebrae) == other - label for other in vertebrae)


def test_steps_count_the_extra_levels_that_are_there():
    assert levels.steps(18, 21, FULL) == 3 and levels.steps(18, 21, FULL + (28,)) == 4
    assert levels.steps(28, 21, FULL + (28,)) == 2 and levels.steps(24, 26, FULL) == 1
    assert levels.steps(24, 26, FULL + (25,)) == 2 and levels.steps(20, 20, FULL) == 0
    assert levels.steps(0, 3, (0, 1, 2, 3)) == 3


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("L1", 20), ("l5", 24), ("L6", 25), ("T13", 28), ("C7", 7), ("t1", 8), ("S1", 26), ("sacrum", 26), ("S", 26),
        ("Coccyx", 27), ("20", 20), ("28", 28), (" 7 ", 7), ("vertebrae_L1", 20), ("vertebrae_S1", 26),
        ("T14", None), ("L7", None), ("C0", None), ("0", None), ("29", None), ("-1", None), ("", None), ("L", None),
        ("1.0", None), ("²", None), ("9" * 50, None), ("label 30", None),
    ],
)  # fmt: skip
def test_names_and_numbers_are_read(text, number):
    assert levels.level_number(text) == number


def test_every_name_is_read_back():
    for label in levels.ORDER:
        assert levels.level_number(levels.level_name(label)) == label
    assert levels.level_name(40) == "label 40"


def test_distances():
    """Those of vertebrae without T13 are interpolated between the numbers; T13 lies between T12 and L1."""
    numbers, pitches = list(levels.PITCH_MM), list(levels.PITCH_MM.values())
    for label in range(1, 28):
        expected = np.interp([label, label - 1], numbers, pitches)
        assert levels.neighbours_mm(label) == (-expected[0], expected[1])
    below, above = levels.neighbours_mm(28)
    assert above == -levels.neighbours_mm(19)[0] and 29 < above < -below < 32.5
    assert levels.pitch_mm(22, 24, FULL) == pytest.approx(71.0)
    assert levels.pitch_mm(19, 20, FULL) == pytest.approx(29.75)
    assert levels.pitch_mm(19, 20, FULL + (28,)) == pytest.approx(29.75 + 31.125)
