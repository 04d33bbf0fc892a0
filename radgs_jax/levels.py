"""Vertebral levels by VerSe number: their names and their spacing."""

import numpy as np

PITCH_MM = {3: 17.0, 8: 19.0, 12: 21.0, 16: 23.5, 18: 27.0, 20: 32.5, 22: 35.5, 24: 35.5}
"""Typical distance in an adult, mm, from a vertebra's centre to the centre of the next one below, by VerSe number; values between
the listed levels are interpolated. Chosen by hand. It only sets where the search looks for neighbours: the coarsest level of a
refinement captures 10 mm and more, so spines that are a third larger or smaller are covered; at half or twice the pitch the search
would start between two vertebrae or at the wrong one."""


def level_name(label: int) -> str:
    """Name of a VerSe label, such as 'L1' for 20."""
    for first, last, letter in ((1, 7, "C"), (8, 19, "T"), (20, 25, "L")):
        if first <= label <= last:
            return f"{letter}{label - first + 1}"
    return {26: "sacrum", 28: "T13"}.get(label, f"label {label}")


def neighbours_mm(label: int) -> tuple[float, float]:
    """Positions along the spine, in mm, of the vertebrae below and above VerSe number `label`, from `PITCH_MM`; up is positive."""
    below, above = np.interp([label, label - 1], list(PITCH_MM), list(PITCH_MM.values()))
    return -below, above
