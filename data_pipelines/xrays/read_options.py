"""What the caller knows about an X-ray and its file may not say."""

import dataclasses
import pathlib

import numpy as np

from radgs_jax import errors

VALUES = ("line_integrals", "intensity", "log")
"""Meanings of the stored numbers."""
BITS_RANGE = (6, 32)
"""Fewest and most bits of a stored number: DICOM's tag BitsStored is 6 or more, and no supported file has more than 32."""


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """What the caller knows about an X-ray and its file may not say. Commands have a flag of the same name for each but `view`.

    Attributes:
      values: meaning of the stored numbers. 'line_integrals': -ln(I / I0). 'intensity': proportional to the X-rays that
        arrived, plus `dark`. 'log': log_scale * ln(I) + constant. None: from DICOM tags.
      sign: +1 if more X-rays give larger stored numbers, -1 if smaller. None: from the DICOM tag, else +1.
      bits: number of bits of a stored number, which is from 0 to 2**bits - 1. None: DICOM's BitsStored. Inverted intensities
        (sign -1) are counted from 2**bits - 1, so it is required for them in other files: neither the image's largest number
        nor its data type shows how many bits the panel has. Pictures of 8 bits are made for display as a rule, so they are
        read only with 8.
      log_scale: stored units per unit of ln(I), with values='log', on the scale of `air`.
      air: number of the unattenuated beam, after the file's own rescaling, and after inversion if intensity is inverted (so
        that 0 is no X-rays). With `flat`, the ratio of this exposure to that of the flat field. None: 1 with `flat`, else
        `radiograph.AIR_QUANTILE` of the pixels inside the collimator.
      flat, dark: files of the same size as the X-ray: the beam without a patient, and the panel without a beam.
      saturation: stored number of a saturated pixel. Larger numbers (with sign -1: smaller ones) are saturated as well. None:
        the end of the range of `bits` with most X-rays; for integers without `bits`, 0 with sign -1, else the image's largest
        number if it is 2**n - 1 with n at least 10, else none.
      frame: number of the frame in a file with several, from 0.
      collimator: search for a border if the file gives none.
      mirrored: the file shows the mirror image of the source's view. Image and calibration are mirrored together.
      view: number or name of the entry in a calibration with several.
    """

    values: str | None = None
    sign: int | None = None
    bits: int | None = None
    log_scale: float | None = None
    air: float | None = None
    flat: pathlib.Path | str | None = None
    dark: pathlib.Path | str | None = None
    saturation: float | None = None
    frame: int | None = None
    collimator: bool = True
    mirrored: bool = False
    view: int | str | None = None


def named(field: str, value: object = None) -> str:
    """How a message names an option, for users of commands and of Python: '--frame=2 (ReadOptions.frame)'.

    Args:
      field: the field of ReadOptions.
      value: a value to name with it, or None.
    """
    return f"--{field}{'' if value is None else f'={value}'} (ReadOptions.{field})"


def any_values() -> str:
    """The ways to say what numbers mean, for messages."""
    return f"{', '.join(f'--values={value}' for value in VALUES[:-1])} or {named('values', VALUES[-1])}"


def check(path: pathlib.Path | str, options: ReadOptions) -> None:
    """Checks options that need no image. `path` is named in errors.

    Raises:
      InputError: an option has a value that it cannot have.
    """
    if options.values not in (None, *VALUES):
        errors.fail(path, named("values"), repr(options.values), any_values())
    if options.sign not in (None, 1, -1):
        errors.fail(path, named("sign"), options.sign, "1 or -1")
    bits, (low, high) = options.bits, BITS_RANGE
    if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or not low <= bits <= high):
        errors.fail(path, named("bits"), repr(bits), f"a whole number from {low} to {high}")
    frame = options.frame
    if frame is not None and (isinstance(frame, bool) or not isinstance(frame, int)):
        errors.fail(path, named("frame"), repr(frame), "one whole number for each X-ray")
    for name in ("log_scale", "air", "saturation"):
        number = getattr(options, name)
        if number is not None and not (np.isfinite(number) and (name == "saturation" or number > 0)):
            wanted = "a finite number" + (" above 0" if name != "saturation" else "")
            errors.fail(path, named(name), number, wanted)


def check_meaning(path: pathlib.Path | str, options: ReadOptions, values: str | None) -> None:
    """Checks that the options fit the meaning of the stored numbers, `values`. `path` is named in errors.

    Raises:
      InputError: the meaning is unknown, or an option is missing or superfluous with it.
    """
    if values is None:
        errors.fail(path, "values", "nothing that says what the pixels mean", any_values())
    if values == "log" and options.log_scale is None:
        wanted = f"{named('log_scale', 'S')}: stored units per unit of ln(I), with --values=log"
        errors.fail(path, "log_scale", "nothing", wanted)
    if values != "intensity" and options.dark is not None:
        errors.fail(path, named("dark"), f"a dark image with --values={values}", "one with --values=intensity only")
    if values == "line_integrals":
        if options.flat is not None or options.air is not None:
            errors.fail(path, "--air, --flat", "a reference for line integrals", "none: they have it in them")
        if options.bits is not None:
            found = f"{options.bits} with --values=line_integrals"
            wanted = (
                "none with line integrals, which are no stored numbers; --values=intensity or --values=log otherwise"
            )
            errors.fail(path, named("bits"), found, wanted)
