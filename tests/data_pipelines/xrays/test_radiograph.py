"""X-rays from files: what their numbers mean, and which pixels are valid."""

import dataclasses
import struct

import ct_files
import dicom_forms
import nibabel
import numpy as np
import pydicom
import pytest
import xray_files
from PIL import Image
from xray_files import SHAPE

from data_pipelines.xrays import radiograph
from radgs_jax import errors

PLAIN = radiograph.ReadOptions(values="intensity", air=xray_files.AIR, collimator=False)


def stored_as(kind, path, image):
    if kind in ("png", "tiff"):
        Image.fromarray(image).save(path, kind)
    elif kind == "deflated tiff":
        Image.fromarray(image).save(path, "tiff", compression="tiff_adobe_deflate")
    elif kind == "float tiff":
        Image.fromarray(image.astype(np.float32)).save(path, "tiff")
    elif kind == "npy":
        np.save(path.with_suffix(".npy"), image)
        path.with_suffix(".npy").rename(path)
    else:  # the affine must not turn the image
        affine = np.diag([-0.3, -0.2, 1.0, 1.0])
        nibabel.Nifti1Image(image.T if kind == "nifti 2d" else image.T[:, :, None], affine).to_filename(path)


@pytest.mark.parametrize("kind", ["png", "tiff", "deflated tiff", "float tiff", "npy", "nifti", "nifti 2d"])
def test_every_kind_of_file_holds_the_same_picture(kind, tmp_path):
    path = tmp_path / ("xray.nii.gz" if "nifti" in kind else "xray")
    stored_as(kind, path, xray_files.pixels())
    got = radiograph.read(path, None, PLAIN)
    np.testing.assert_allclose(got.line_integrals, xray_files.expected(), atol=2e-6)
    assert got.line_integrals.dtype == np.float32 and got.valid.all() and got.camera is None
    np.testing.assert_array_equal(got.file_from_image, np.eye(3))


def test_a_nifti_picture_needs_no_affine_and_is_scaled_as_it_says(tmp_path):
    data = nibabel.Nifti1Image(xray_files.pixels().T[:, :, None, None], None).to_bytes()
    data = xray_files.patched(data, 80, struct.pack("<3f", 0.0, 0.0, 0.0))
    got = radiograph.read(xray_files.written(tmp_path, "bare.nii", data), None, PLAIN)
    np.testing.assert_allclose(got.line_integrals, xray_files.expected(), atol=2e-6)
    path = xray_files.written(tmp_path, "scaled.nii", xray_files.patched(data, 112, struct.pack("<2f", 0.5, 100.0)))
    np.testing.assert_array_equal(radiograph.read_stored(path), 0.5 * xray_files.pixels() + 100.0)
    with pytest.raises(errors.InputError, match=r"long.nii: size: found \d+ bytes"):
        radiograph.read(xray_files.written(tmp_path, "long.nii", data + b"\0"), None, PLAIN)


def test_what_the_numbers_mean_is_never_guessed(tmp_path):
    path = tmp_path / "xray.npy"
    np.save(path, xray_files.pixels())
    with pytest.raises(errors.InputError, match=r"xray.npy: values: found nothing .* wanted --values="):
        radiograph.read(path)
    with pytest.raises(errors.InputError, match="log_scale"):
        radiograph.read(path, None, radiograph.ReadOptions(values="log"))
    with pytest.raises(errors.InputError, match="a median of"):
        radiograph.read(path, None, radiograph.ReadOptions(values="line_integrals"))


def test_flat_and_dark_images_are_divided_and_taken_off(tmp_path):
    v, u = np.mgrid[: SHAPE[0], : SHAPE[1]]
    line = 0.5 + 0.05 * v + 0.03 * u
    dark, gain = 100.0 + u, 3.0e4 + 50.0 * v
    np.save(tmp_path / "xray.npy", dark + 0.8 * gain * np.exp(-line))
    np.save(tmp_path / "flat.npy", dark + gain)
    np.save(tmp_path / "dark.npy", dark)
    options = radiograph.ReadOptions(
        values="intensity", flat=tmp_path / "flat.npy", dark=tmp_path / "dark.npy", air=0.8, collimator=False
    )
    got = radiograph.read(tmp_path / "xray.npy", None, options)
    np.testing.assert_allclose(got.line_integrals, line, atol=2e-4)
    assert got.origin["air_from"] == "flat and option"
    np.save(tmp_path / "flat.npy", gain[:-1])
    with pytest.raises(errors.InputError, match=r"flat.npy: flat: shape: found \(39, 56\)"):
        radiograph.read(tmp_path / "xray.npy", None, options)


def test_the_air_value_is_a_stated_quantile_of_the_field(tmp_path):
    image = np.full(SHAPE, 1000.0, np.float32)
    image[:, :30] = 8000.0
    image[0, 0] = 60000.0  # one hot pixel is not air
    np.save(tmp_path / "xray.npy", image)
    got = radiograph.read(tmp_path / "xray.npy", None, radiograph.ReadOptions(values="intensity", collimator=False))
    assert got.origin["air"] == 8000.0 and got.origin["air_from"].startswith("0.995 quantile")
    np.testing.assert_allclose(got.line_integrals[5, 50], np.log(8.0), rtol=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_logarithmic_numbers(sign, tmp_path):
    line = xray_files.expected()
    np.save(tmp_path / "xray.npy", (5000.0 - sign * 700.0 * line).astype(np.float32))
    options = radiograph.ReadOptions(values="log", sign=sign, log_scale=700.0, air=5000.0, collimator=False)
    np.testing.assert_allclose(radiograph.read(tmp_path / "xray.npy", None, options).line_integrals, line, atol=1e-5)


def test_saturated_and_dead_pixels_do_not_count_and_stay_finite(tmp_path):
    image = xray_files.pixels().astype(np.uint16)
    image[3, 4], image[7, 9], image[8, 2] = 65535, 0, 65534
    Image.fromarray(image).save(tmp_path / "xray.png")
    got = radiograph.read(tmp_path / "xray.png", None, PLAIN)
    assert np.argwhere(~got.valid).tolist() == [[3, 4], [7, 9]]
    assert np.isfinite(got.line_integrals).all() and got.line_integrals[7, 9] == radiograph.LINE_INTEGRAL_RANGE[1]
    line = xray_files.expected().astype(np.float32)
    line[2, 2], line[5, 5] = np.nan, np.inf
    np.save(tmp_path / "line.npy", line)
    got = radiograph.read(
        tmp_path / "line.npy", None, radiograph.ReadOptions(values="line_integrals", collimator=False)
    )
    assert np.argwhere(~got.valid).tolist() == [[2, 2], [5, 5]] and np.isfinite(got.line_integrals).all()


def exposure(bits, sign):
    """Line integrals, the air value and stored numbers that use at most about half of the range of `bits`."""
    full = 2**bits - 1
    v, u = np.mgrid[: SHAPE[0], : SHAPE[1]]
    line = 0.02 + 0.006 * v + 0.005 * u + 0.01 * ((u * v) % 5)
    # All numbers are in the lower half of the range: an upright image is dim, an inverted one bright.
    air = 0.47 * full if sign > 0 else 0.97 * full
    counts = np.rint(air * np.exp(-line)).astype(np.uint16)
    stored = counts if sign > 0 else full - counts
    assert stored.max() < 0.53 * full and stored.min() > 0
    return line, air, stored.astype(np.uint16)


def said(bits, **options):
    return radiograph.ReadOptions(values="intensity", bits=bits, collimator=False, **options)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["DX", "XA", "png", "tiff", "npy", "float tiff", "nifti"])
def test_line_integrals_are_right_at_every_depth_in_both_senses(kind, bits, sign, tmp_path):
    """The largest number of each image fits into fewer bits than the panel has."""
    line, air, stored = exposure(bits, sign)
    if kind in ("DX", "XA"):
        tags = {"Modality": kind, "BitsStored": bits, "HighBit": bits - 1, "PixelIntensityRelationshipSign": sign}
        options = radiograph.ReadOptions(air=air, collimator=False)
        got = xray_files.read_dicom(tmp_path, options, PixelData=stored.tobytes(), **tags)
        found, valid = got.line_integrals[:, ::-1], got.valid
    else:
        path = tmp_path / ("xray.nii.gz" if kind == "nifti" else "xray")
        stored_as(kind, path, stored)
        got = radiograph.read(path, None, said(bits, air=air, sign=sign))
        found, valid = got.line_integrals, got.valid
        if sign > 0:  # upright intensities need no bits
            same = radiograph.read(path, None, said(None, air=air))
            np.testing.assert_array_equal(same.line_integrals, found)
            assert same.valid.all()
    np.testing.assert_allclose(found, line, atol=0.6 / (0.4 * 2**bits * np.exp(-line.max())))
    assert valid.all() and got.origin["bits"] == bits and got.origin["sign"] == sign


def test_photometric_interpretation_inverts_nothing(tmp_path):
    """It is about display. Only PixelIntensityRelationshipSign is about the X-rays."""
    line, air, stored = exposure(12, -1)
    for shown in ("MONOCHROME1", "MONOCHROME2"):
        tags = {"PhotometricInterpretation": shown, "PixelIntensityRelationshipSign": -1}
        got = xray_files.read_dicom(
            tmp_path, radiograph.ReadOptions(air=air, collimator=False), PixelData=stored.tobytes(), **tags
        )
        np.testing.assert_allclose(got.line_integrals[:, ::-1], line, atol=1e-3)


@pytest.mark.parametrize("kind", ["png", "tiff", "npy", "float tiff", "nifti"])
def test_the_depth_of_an_inverted_picture_is_never_guessed(kind, tmp_path):
    """Neither from its largest number nor from the 16 bits of its data type."""
    path = tmp_path / ("xray.nii.gz" if kind == "nifti" else "xray")
    stored_as(kind, path, exposure(12, -1)[2])
    with pytest.raises(
        errors.InputError, match=r"xray\S*: bits: found nothing, with inverted .* wanted --bits=N"
    ) as caught:
        radiograph.read(path, None, said(None, sign=-1))
    assert "\n" not in str(caught.value)
    with pytest.raises(
        errors.InputError,
        match=r"--bits \(ReadOptions.bits\): found 10 with pixels from .* to 1\d\d\d.*, wanted 0 to 1023",
    ):
        radiograph.read(path, None, said(10, sign=-1))


def test_bits_must_be_what_the_numbers_can_have(tmp_path):
    path = tmp_path / "xray.npy"
    np.save(path, exposure(12, -1)[2])
    for bits in (0, 5, 33, 12.0, "12", True):
        with pytest.raises(
            errors.InputError, match=r"--bits \(ReadOptions.bits\): found .* wanted a whole number from 6 to 32"
        ):
            radiograph.read(path, None, said(bits))
    with pytest.raises(errors.InputError, match=r"--bits \(ReadOptions.bits\): found 12 with --values=line_integrals"):
        radiograph.read(path, None, radiograph.ReadOptions(values="line_integrals", bits=12))
    np.save(path, exposure(12, -1)[2].astype(np.int16) - 300)
    with pytest.raises(errors.InputError, match=r"--bits \(ReadOptions.bits\): found 12 with pixels from -"):
        radiograph.read(path, None, said(12, sign=-1))


def test_the_option_bits_overrides_the_tags(tmp_path):
    """Many machines write BitsStored 16, as allocated, although the panel has 12 bits."""
    line, air, stored = exposure(12, -1)
    tags = {"BitsStored": 16, "HighBit": 15, "PixelIntensityRelationshipSign": -1, "PixelData": stored.tobytes()}
    got = xray_files.read_dicom(tmp_path, radiograph.ReadOptions(air=air, bits=12, collimator=False), **tags)
    np.testing.assert_allclose(got.line_integrals[:, ::-1], line, atol=1e-3)


def test_inverted_references_are_made_upright_like_their_x_ray(tmp_path):
    line, air, _ = exposure(14, -1)
    v, u = np.mgrid[: SHAPE[0], : SHAPE[1]]
    dark, gain = 200.0 + u, 0.9 * air + 10.0 * v
    for name, counts in {"flat": dark + gain, "dark": dark, "xray": dark + gain * np.exp(-line)}.items():
        np.save(tmp_path / f"{name}.npy", (2**14 - 1 - np.rint(counts)).astype(np.uint16))
    references = {name: tmp_path / f"{name}.npy" for name in ("flat", "dark")}
    got = radiograph.read(tmp_path / "xray.npy", None, said(14, sign=-1, **references))
    np.testing.assert_allclose(got.line_integrals, line, atol=3e-4)
    np.save(tmp_path / "flat.npy", np.full(SHAPE, 2**14, np.uint16) - np.eye(*SHAPE, dtype=np.uint16))
    with pytest.raises(errors.InputError, match=r"flat.npy: bits: found 14 with pixels from 16383 to 16384"):
        radiograph.read(tmp_path / "xray.npy", None, said(14, sign=-1, **references))
    tags = {"Modality": "DX", "PixelIntensityRelationshipSign": -1}
    flat = xray_files.written(tmp_path, "flat.dcm", xray_files.dicom(BitsStored=14, HighBit=13, **tags))
    with pytest.raises(errors.InputError, match="flat.dcm: flat: BitsStored: found 14, wanted the X-ray's 12"):
        xray_files.read_dicom(tmp_path, radiograph.ReadOptions(flat=flat, collimator=False), **tags)


def test_inversion_comes_before_the_rescaling_unless_that_inverts(tmp_path):
    """The tags' sign is about stored numbers (PS3.3 C.8.11.3.1.2); a negative slope inverts them already."""
    line, air, stored = exposure(12, -1)

    def lines(scale, slope, intercept, **tags):
        options = radiograph.ReadOptions(air=scale * air, collimator=False)
        tags = {"RescaleSlope": slope, "RescaleIntercept": intercept, "PixelIntensityRelationshipSign": -1, **tags}
        return xray_files.read_dicom(tmp_path, options, PixelData=stored.tobytes(), **tags).line_integrals[:, ::-1]

    np.testing.assert_allclose(lines(1, 1.0, 0.0), line, atol=1e-3)
    np.testing.assert_allclose(lines(2, 2.0, 0.0), line, atol=1e-3)
    np.testing.assert_allclose(lines(2, -2.0, 8190.0), line, atol=1e-3)
    # If the rescaling defines the number of no X-rays, the bits do not matter.
    np.testing.assert_allclose(lines(2, -2.0, 8190.0, BitsStored=14, HighBit=13), line, atol=1e-3)
    wanted = r"RescaleSlope, RescaleIntercept: found \({}\) with sign {}, wanted {}"
    with pytest.raises(errors.InputError, match=wanted.format("2.0, 150.0", "-1", "one that falls")):
        lines(1, 2.0, 150.0)
    with pytest.raises(
        errors.InputError, match=wanted.format("-1.0, 4095.0", r"\+1", "a rescaling that rises, or sign -1")
    ):
        lines(1, -1.0, 4095.0, PixelIntensityRelationshipSign=1)
    with pytest.raises(errors.InputError, match="PixelRepresentation: found 1 with inverted intensities"):
        lines(1, 1.0, 0.0, PixelRepresentation=1)


@pytest.mark.parametrize("slope", [2.0, -2.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_rescaled_logarithm_runs_the_way_that_its_slope_says(sign, slope, tmp_path):
    line = exposure(12, -1)[0]
    stored = np.rint(2000.0 - sign * 700.0 * line).astype(np.uint16)
    options = radiograph.ReadOptions(log_scale=1400.0, air=2000.0 * slope + 9000.0, collimator=False)
    tags = {"Modality": "DX", "PixelIntensityRelationship": "LOG", "PixelIntensityRelationshipSign": sign}
    got = xray_files.read_dicom(
        tmp_path, options, RescaleSlope=slope, RescaleIntercept=9000.0, PixelData=stored.tobytes(), **tags
    )
    np.testing.assert_allclose(got.line_integrals[:, ::-1], line, atol=1e-3)


@pytest.mark.parametrize("tag", [None, -1])
def test_a_table_may_fall_and_then_the_low_end_is_saturated(tag, tmp_path):
    """The modality LUT of an XA image converts a logarithm to intensity, whatever its sign."""
    line, air, _ = exposure(12, 1)
    entries = np.rint(8.0 * air * np.exp(-np.arange(4096) / 1000.0)).astype(np.uint16)
    stored = np.rint(1000.0 * line).astype(np.uint16)
    stored[3, 4], stored[6, 7] = 0, 4095
    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTData, table.ModalityLUTType = [4096, 0, 16], entries.tobytes(), "US"
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "OW"
    options = radiograph.ReadOptions(air=8.0 * air, collimator=False)
    tags = {"PixelIntensityRelationship": "LOG", "ModalityLUTSequence": [table], "PixelData": stored.tobytes()}
    got = xray_files.read_dicom(tmp_path, options, PixelIntensityRelationshipSign=tag, **tags)
    assert np.argwhere(~got.valid[:, ::-1]).tolist() == [[3, 4]]
    valid = got.valid[:, ::-1]
    np.testing.assert_allclose(got.line_integrals[:, ::-1][valid], stored[valid] / 1000.0, atol=5e-3)
    with pytest.raises(errors.InputError, match=r"LUTData: found entries from \d+ to \d+ with sign \+1"):
        xray_files.read_dicom(tmp_path, options, PixelIntensityRelationshipSign=1, **tags)


@pytest.mark.parametrize("values", ["intensity", "log"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["dicom", "npy", "float npy"])
def test_the_most_exposed_end_is_saturated_whichever_way_numbers_run(kind, bits, sign, values, tmp_path):
    """`saturation` is a stored number; larger ones, or smaller ones if inverted, are saturated. Default: the end of the range."""
    air, stored = exposure(bits, sign)[1:]
    full = 2**bits - 1
    bright, dim = (full, 1) if sign > 0 else (0, full - 1)
    most = int(stored.max() if sign > 0 else stored.min())
    limit = most + sign * (abs(bright - most) // 2)
    stored[2, 3], stored[4, 5], stored[6, 7], stored[8, 9] = bright, limit, limit - sign, dim

    def invalid(saturation):
        options = {"air": air, "saturation": saturation, "log_scale": full / 5.0 if values == "log" else None}
        if kind == "dicom":
            tags = {"Modality": "DX", "PixelIntensityRelationship": {"intensity": "LIN", "log": "LOG"}[values]}
            tags |= {"PixelIntensityRelationshipSign": sign, "BitsStored": bits, "HighBit": bits - 1}
            options = radiograph.ReadOptions(collimator=False, **options)
            got = xray_files.read_dicom(tmp_path, options, PixelData=stored.tobytes(), **tags)
            return np.argwhere(~got.valid[:, ::-1]).tolist(), got.origin["saturation"]
        np.save(tmp_path / "xray.npy", stored if kind == "npy" else stored.astype(np.float32))
        options = radiograph.ReadOptions(values=values, bits=bits, sign=sign, collimator=False, **options)
        got = radiograph.read(tmp_path / "xray.npy", None, options)
        return np.argwhere(~got.valid).tolist(), got.origin["saturation"]

    assert invalid(None) == ([[2, 3]], bright)
    assert invalid(float(limit)) == ([[2, 3], [4, 5]], limit)


def test_without_bits_only_a_full_scale_that_is_reached_is_saturated(tmp_path):
    path = tmp_path / "xray.npy"
    stored = exposure(12, 1)[2]
    np.save(path, stored)
    assert radiograph.read(path, None, said(None)).origin["saturation"] is None
    stored[3, 4], stored[5, 6] = 4095, 4094
    np.save(path, stored)
    got = radiograph.read(path, None, said(None))
    assert got.origin["saturation"] == 4095 and np.argwhere(~got.valid).tolist() == [[3, 4]]
    assert radiograph.read(path, None, said(14)).valid.all()


def test_dicom_numbers_are_rescaled_but_never_windowed(tmp_path):
    reference = xray_files.read_dicom(tmp_path).line_integrals
    shown = xray_files.read_dicom(
        tmp_path,
        PhotometricInterpretation="MONOCHROME1",
        PresentationLUTShape="INVERSE",
        WindowCenter=900,
        WindowWidth=200,
    )
    np.testing.assert_array_equal(shown.line_integrals, reference)
    scaled = xray_files.read_dicom(tmp_path, RescaleSlope=2.0, RescaleIntercept=150.0)
    np.testing.assert_allclose(
        scaled.line_integrals[:, ::-1], -np.log((2.0 * xray_files.pixels() + 150) / xray_files.AIR), atol=1e-5
    )


def test_dicom_signs_logs_and_tables(tmp_path):
    line = xray_files.expected()[:, ::-1]  # without PatientOrientation, as seen facing the patient
    inverted = (4095 - xray_files.pixels()).astype(np.uint16).tobytes()
    got = xray_files.read_dicom(tmp_path, PixelIntensityRelationshipSign=-1, PixelData=inverted)
    np.testing.assert_allclose(got.line_integrals, line, atol=1e-5)
    table = pydicom.Dataset()
    entries = np.minimum(np.arange(4096) ** 2 // 300, 65535).astype(np.uint16)
    table.LUTDescriptor, table.LUTData, table.ModalityLUTType = [4096, 0, 16], entries.tobytes(), "US"
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "OW"
    got = xray_files.read_dicom(tmp_path, PixelIntensityRelationship="LOG", ModalityLUTSequence=[table])
    np.testing.assert_allclose(
        got.line_integrals, np.log(xray_files.AIR / entries[xray_files.pixels()])[:, ::-1].clip(-1), atol=1e-5
    )
    options = radiograph.ReadOptions(log_scale=500.0, air=3000.0, collimator=False)
    dx = {"Modality": "DX", "PixelIntensityRelationship": "LOG", "PixelIntensityRelationshipSign": -1}
    got = xray_files.read_dicom(tmp_path, options, **dx)
    np.testing.assert_allclose(
        got.line_integrals, ((xray_files.pixels() - 3000.0) / 500.0)[:, ::-1].clip(-1), atol=1e-5
    )
    with pytest.raises(errors.InputError, match="values"):
        xray_files.read_dicom(tmp_path, options, **dx, PresentationIntentType="FOR PRESENTATION")
    with pytest.raises(errors.InputError, match="values"):
        xray_files.read_dicom(tmp_path, Modality="CR", PixelIntensityRelationship=None)


def test_frames_are_chosen_not_guessed(tmp_path):
    second = xray_files.pixels() + 40
    movie = {"NumberOfFrames": 2, "PixelData": xray_files.pixels().tobytes() + second.tobytes()}
    with pytest.raises(
        errors.InputError,
        match=r"--frame \(ReadOptions.frame\): found nothing, wanted --frame=0 to --frame=1 .*: there are 2",
    ):
        xray_files.read_dicom(tmp_path, **movie)
    got = xray_files.read_dicom(
        tmp_path, radiograph.ReadOptions(air=xray_files.AIR, collimator=False, frame=1), **movie
    )
    np.testing.assert_allclose(got.line_integrals, -np.log(second / xray_files.AIR)[:, ::-1], atol=1e-5)
    turning = xray_files.read_dicom(
        tmp_path,
        radiograph.ReadOptions(air=xray_files.AIR, collimator=False, frame=1),
        PositionerMotion="DYNAMIC",
        **movie,
    )
    assert turning.camera is None and "still" in turning.origin["camera"]


def test_saturation_and_padding_follow_the_tags(tmp_path):
    image = xray_files.pixels()
    image[5, 6], image[9, 9] = 4095, 17
    got = xray_files.read_dicom(tmp_path, PixelData=image.tobytes(), PixelPaddingValue=17)
    assert np.argwhere(~got.valid[:, ::-1]).tolist() == [[5, 6], [9, 9]]


def test_shutters_close_what_the_tags_say(tmp_path):
    """Tags count pixels from 1, with the row first. The mask is turned with the image."""
    v, u = np.mgrid[1 : SHAPE[0] + 1, 1 : SHAPE[1] + 1]
    got = xray_files.read_dicom(
        tmp_path,
        CollimatorShape="RECTANGULAR",
        CollimatorLeftVerticalEdge=5,
        CollimatorRightVerticalEdge=50,
        CollimatorUpperHorizontalEdge=-3,
        CollimatorLowerHorizontalEdge=31,
        ShutterShape=["CIRCULAR", "POLYGONAL"],
        CenterOfCircularShutter=[14, 30],
        RadiusOfCircularShutter=22,
        VerticesOfThePolygonalShutter=[1, 1, 1, 57, 41, 57],
    )
    inside = (u >= 5) & (u <= 50) & (v <= 31) & (np.hypot(v - 14, u - 30) <= 22)
    diagonal = (u - 1) / 56 - (v - 1) / 40
    valid, sure = got.valid[:, ::-1], np.abs(diagonal) > 1e-9
    np.testing.assert_array_equal(valid[sure], (inside & (diagonal > 0))[sure])
    assert got.origin["collimator"] == "DICOM tags"


@pytest.mark.parametrize(
    "syntax,coded",
    [(pydicom.uid.JPEG2000Lossless, ct_files.jpeg_2000), (pydicom.uid.JPEGLosslessSV1, ct_files.jpeg_lossless)],
)
def test_compressed_frames(tmp_path, syntax, coded):
    data = xray_files.encapsulated(syntax, coded(xray_files.pixels()), BitsStored=16, HighBit=15)
    got = radiograph.read(xray_files.written(tmp_path, "xray.dcm", data), None, xray_files.XA)
    np.testing.assert_allclose(got.line_integrals[:, ::-1], xray_files.expected(), atol=1e-5)


def test_the_views_of_an_acquisition(tmp_path):
    """NPY files hold line integrals and need a calibration. DICOM files need neither."""
    plain, other = tmp_path / "xray.npy", tmp_path / "other.npy"
    np.save(plain, xray_files.expected().astype(np.float32))
    np.save(other, xray_files.expected()[::-1].astype(np.float32) ** 2)
    dicom = xray_files.written(tmp_path, "xray.dcm", xray_files.dicom())
    K, E, P = xray_files.projection()
    E[2, 3] += 50.0
    calibration = xray_files.written(tmp_path, "views.json", [{"P": P.tolist()}, {"P": (K @ E[:3]).tolist()}])
    first, second = radiograph.read_views([plain, other], calibration)
    np.testing.assert_allclose(first.line_integrals, xray_files.expected(), atol=1e-5)
    np.testing.assert_allclose(second.camera.camera_from_world, E, atol=1e-8)
    (nominal,) = radiograph.read_views([dicom], None, xray_files.XA)
    assert nominal.origin["camera"] == "DICOM tags, nominal"
    with pytest.raises(errors.InputError, match="views: found 2, wanted a list of 1"):
        radiograph.read_views([plain], calibration)
    with pytest.raises(errors.InputError, match="xray.npy: camera: found none"):
        radiograph.read_views([plain])


def test_views_have_frames_and_references_of_their_own(tmp_path):
    """One for each view, or one for all."""
    _, E, P = xray_files.projection()
    turned = E.copy()
    turned[2, 3] += 50.0
    calibration = xray_files.written(
        tmp_path, "views.json", [{"P": P.tolist()}, {"P": (P @ np.linalg.inv(E) @ turned).tolist()}]
    )
    shape = (96, 100)
    runs = [[dicom_forms.body(shape, seed=seed + 10 * view) for seed in range(3)] for view in range(2)]
    paths = []
    for view, frames in enumerate(runs):
        paths.append(
            dicom_forms.saved(tmp_path / f"run{view}.dcm", dicom_forms.header(frames, ImagerPixelSpacing=None))
        )
        np.save(tmp_path / f"flat{view}.npy", np.full(shape, 4000.0 + 50 * view) + np.eye(*shape))
        np.save(tmp_path / f"dark{view}.npy", np.full(shape, 10.0 + view) + np.eye(*shape))
    flats, darks = ([tmp_path / f"{name}{view}.npy" for view in range(2)] for name in ("flat", "dark"))
    options = radiograph.ReadOptions(collimator=False)
    got = radiograph.read_views(paths, calibration, options, flats, darks, [2, 0])
    for view, (xray, frame) in enumerate(zip(got, (2, 0))):
        dark, flat = (10.0 + view) + np.eye(*shape), 4000.0 + 50 * view + np.eye(*shape)
        np.testing.assert_allclose(xray.line_integrals, -np.log((runs[view][frame] - dark) / (flat - dark)), atol=1e-4)
    assert [xray.origin["frame"] for xray in got] == [2, 0]
    same = radiograph.read_views(paths, calibration, dataclasses.replace(options, frame=1), flats[:1], darks[:1])
    assert [xray.origin["frame"] for xray in same] == [1, 1]
    with pytest.raises(
        errors.InputError, match=r"run0.dcm: --frame .*: found 3 values, wanted one for each of 2 X-rays"
    ):
        radiograph.read_views(paths, calibration, options, frames=[0, 1, 2])
    with pytest.raises(
        errors.InputError, match=r"run1.dcm: --frame .*: found --frame=7, wanted --frame=0 to --frame=2"
    ):
        radiograph.read_views(paths, calibration, options, frames=[0, 7])
