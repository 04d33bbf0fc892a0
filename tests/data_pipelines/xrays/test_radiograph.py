"""X-rays from files: what their numbers mean, which pixels count, and cameras that point where the machine pointed."""

import json
import struct

import ct_files
import nibabel
import numpy as np
import pydicom
import pytest
import test_malformed_xrays as malformed
from PIL import Image
from scipy import ndimage

from data_pipelines.io import camera_files
from data_pipelines.phantom import generate
from data_pipelines.simulation import carm
from data_pipelines.simulation import quick
from data_pipelines.xrays import collimator
from data_pipelines.xrays import radiograph
from radgs_jax import attenuation
from radgs_jax import errors

SHAPE = malformed.SHAPE
AIR = 4000.0
PLAIN = radiograph.ReadOptions(values="intensity", air=AIR, collimator=False)
XA = radiograph.ReadOptions(air=AIR, collimator=False)


def expected(air=AIR):
    return -np.log(malformed.pixels() / air)


def written(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return path


def read_dicom(tmp_path, options=XA, calibration=None, **tags):
    return radiograph.read(written(tmp_path, "xray.dcm", malformed.dicom(**tags)), calibration, options)


# ---- one image in every kind of file


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
    else:  # the axes of an affine must not turn the picture
        affine = np.diag([-0.3, -0.2, 1.0, 1.0])
        nibabel.Nifti1Image(image.T if kind == "nifti 2d" else image.T[:, :, None], affine).to_filename(path)


@pytest.mark.parametrize("kind", ["png", "tiff", "deflated tiff", "float tiff", "npy", "nifti", "nifti 2d"])
def test_every_kind_of_file_holds_the_same_picture(kind, tmp_path):
    path = tmp_path / ("xray.nii.gz" if "nifti" in kind else "xray")
    stored_as(kind, path, malformed.pixels())
    got = radiograph.read(path, None, PLAIN)
    np.testing.assert_allclose(got.line_integrals, expected(), atol=2e-6)
    assert got.line_integrals.dtype == np.float32 and got.valid.all() and got.camera is None
    np.testing.assert_array_equal(got.file_from_image, np.eye(3))


def test_a_nifti_picture_needs_no_affine_and_is_scaled_as_it_says(tmp_path):
    data = nibabel.Nifti1Image(malformed.pixels().T[:, :, None, None], None).to_bytes()
    data = malformed.patched(data, 80, struct.pack("<3f", 0.0, 0.0, 0.0))
    got = radiograph.read(written(tmp_path, "bare.nii", data), None, PLAIN)
    np.testing.assert_allclose(got.line_integrals, expected(), atol=2e-6)
    path = written(tmp_path, "scaled.nii", malformed.patched(data, 112, struct.pack("<2f", 0.5, 100.0)))
    np.testing.assert_array_equal(radiograph.read_stored(path), 0.5 * malformed.pixels() + 100.0)
    with pytest.raises(errors.InputError, match=r"long.nii: size: found \d+ bytes"):
        radiograph.read(written(tmp_path, "long.nii", data + b"\0"), None, PLAIN)


def test_what_the_numbers_mean_is_never_guessed(tmp_path):
    path = tmp_path / "xray.npy"
    np.save(path, malformed.pixels())
    with pytest.raises(errors.InputError, match=r"xray.npy: values: found nothing .* wanted option values="):
        radiograph.read(path)
    with pytest.raises(errors.InputError, match="log_scale"):
        radiograph.read(path, None, radiograph.ReadOptions(values="log"))
    with pytest.raises(errors.InputError, match="a median of"):
        radiograph.read(path, None, radiograph.ReadOptions(values="line_integrals"))


# ---- intensities, logarithms, references


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
    line = expected()
    np.save(tmp_path / "xray.npy", (5000.0 - sign * 700.0 * line).astype(np.float32))
    options = radiograph.ReadOptions(values="log", sign=sign, log_scale=700.0, air=5000.0, collimator=False)
    np.testing.assert_allclose(radiograph.read(tmp_path / "xray.npy", None, options).line_integrals, line, atol=1e-5)


def test_saturated_and_dead_pixels_do_not_count_and_stay_finite(tmp_path):
    image = malformed.pixels().astype(np.uint16)
    image[3, 4], image[7, 9], image[8, 2] = 65535, 0, 65534
    Image.fromarray(image).save(tmp_path / "xray.png")
    got = radiograph.read(tmp_path / "xray.png", None, PLAIN)
    assert np.argwhere(~got.valid).tolist() == [[3, 4], [7, 9]]
    assert np.isfinite(got.line_integrals).all() and got.line_integrals[7, 9] == radiograph.LINE_INTEGRAL_RANGE[1]
    line = expected().astype(np.float32)
    line[2, 2], line[5, 5] = np.nan, np.inf
    np.save(tmp_path / "line.npy", line)
    got = radiograph.read(
        tmp_path / "line.npy", None, radiograph.ReadOptions(values="line_integrals", collimator=False)
    )
    assert np.argwhere(~got.valid).tolist() == [[2, 2], [5, 5]] and np.isfinite(got.line_integrals).all()


# ---- bits, and numbers that run the other way


def exposure(bits, sign):
    """Line integrals, the air value and stored numbers that need no more than half of the range that `bits` give."""
    full = 2**bits - 1
    v, u = np.mgrid[: SHAPE[0], : SHAPE[1]]
    line = 0.02 + 0.006 * v + 0.005 * u + 0.01 * ((u * v) % 5)
    # Numbers stay low where an upright picture is dim, and an inverted one bright.
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
    """The largest number of each picture would need a bit less than its detector has."""
    line, air, stored = exposure(bits, sign)
    if kind in ("DX", "XA"):
        tags = {"Modality": kind, "BitsStored": bits, "HighBit": bits - 1, "PixelIntensityRelationshipSign": sign}
        options = radiograph.ReadOptions(air=air, collimator=False)
        got = read_dicom(tmp_path, options, PixelData=stored.tobytes(), **tags)
        found, valid = got.line_integrals[:, ::-1], got.valid
    else:
        path = tmp_path / ("xray.nii.gz" if kind == "nifti" else "xray")
        stored_as(kind, path, stored)
        got = radiograph.read(path, None, said(bits, air=air, sign=sign))
        found, valid = got.line_integrals, got.valid
        if sign > 0:  # an upright picture needs no depth
            same = radiograph.read(path, None, said(None, air=air))
            np.testing.assert_array_equal(same.line_integrals, found)
            assert same.valid.all()
    np.testing.assert_allclose(found, line, atol=0.6 / (0.4 * 2**bits * np.exp(-line.max())))
    assert valid.all() and got.origin["bits"] == bits and got.origin["sign"] == sign


def test_photometric_interpretation_turns_nothing_round(tmp_path):
    """It is about the screen; the sign of the intensity relationship alone is about the X-rays."""
    line, air, stored = exposure(12, -1)
    for shown in ("MONOCHROME1", "MONOCHROME2"):
        tags = {"PhotometricInterpretation": shown, "PixelIntensityRelationshipSign": -1}
        got = read_dicom(
            tmp_path, radiograph.ReadOptions(air=air, collimator=False), PixelData=stored.tobytes(), **tags
        )
        np.testing.assert_allclose(got.line_integrals[:, ::-1], line, atol=1e-3)


@pytest.mark.parametrize("kind", ["png", "tiff", "npy", "float tiff", "nifti"])
def test_the_depth_of_an_inverted_picture_is_never_guessed(kind, tmp_path):
    """Not from its largest number, and not from the 16 bits that it happens to be kept in."""
    path = tmp_path / ("xray.nii.gz" if kind == "nifti" else "xray")
    stored_as(kind, path, exposure(12, -1)[2])
    with pytest.raises(
        errors.InputError, match=r"xray\S*: bits: found nothing, with inverted .* wanted option bits="
    ) as told:
        radiograph.read(path, None, said(None, sign=-1))
    assert "\n" not in str(told.value)
    with pytest.raises(
        errors.InputError, match=r"option bits: found 10 with pixels from .* to 1\d\d\d.*, wanted 0 to 1023"
    ):
        radiograph.read(path, None, said(10, sign=-1))


def test_bits_must_be_what_the_numbers_can_have(tmp_path):
    path = tmp_path / "xray.npy"
    np.save(path, exposure(12, -1)[2])
    for bits in (0, 5, 33, 12.0, "12", True):
        with pytest.raises(errors.InputError, match="option bits: found .* wanted a whole number from 6 to 32"):
            radiograph.read(path, None, said(bits))
    with pytest.raises(errors.InputError, match="option bits: found 12 with values='line_integrals'"):
        radiograph.read(path, None, radiograph.ReadOptions(values="line_integrals", bits=12))
    np.save(path, exposure(12, -1)[2].astype(np.int16) - 300)
    with pytest.raises(errors.InputError, match="option bits: found 12 with pixels from -"):
        radiograph.read(path, None, said(12, sign=-1))


def test_said_bits_go_before_the_tags(tmp_path):
    """Many machines write the 16 bits that they allocate where their detectors have 12."""
    line, air, stored = exposure(12, -1)
    tags = {"BitsStored": 16, "HighBit": 15, "PixelIntensityRelationshipSign": -1, "PixelData": stored.tobytes()}
    got = read_dicom(tmp_path, radiograph.ReadOptions(air=air, bits=12, collimator=False), **tags)
    np.testing.assert_allclose(got.line_integrals[:, ::-1], line, atol=1e-3)


def test_inverted_references_are_turned_round_like_their_x_ray(tmp_path):
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
    flat = written(tmp_path, "flat.dcm", malformed.dicom(BitsStored=14, HighBit=13, **tags))
    with pytest.raises(errors.InputError, match="flat.dcm: flat: BitsStored: found 14, wanted the X-ray's 12"):
        read_dicom(tmp_path, radiograph.ReadOptions(flat=flat, collimator=False), **tags)


def test_inversion_comes_before_the_rescaling_unless_that_inverts(tmp_path):
    """The tags' sign is about stored numbers (PS3.3 C.8.11.3.1.2); a slope below 0 has turned them round already."""
    line, air, stored = exposure(12, -1)

    def lines(scale, slope, intercept, **tags):
        options = radiograph.ReadOptions(air=scale * air, collimator=False)
        tags = {"RescaleSlope": slope, "RescaleIntercept": intercept, "PixelIntensityRelationshipSign": -1, **tags}
        return read_dicom(tmp_path, options, PixelData=stored.tobytes(), **tags).line_integrals[:, ::-1]

    np.testing.assert_allclose(lines(1, 1.0, 0.0), line, atol=1e-3)
    np.testing.assert_allclose(lines(2, 2.0, 0.0), line, atol=1e-3)
    np.testing.assert_allclose(lines(2, -2.0, 8190.0), line, atol=1e-3)
    # Where the rescaling says where no X-rays are, the bits do not matter.
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
    got = read_dicom(tmp_path, options, RescaleSlope=slope, RescaleIntercept=9000.0, PixelData=stored.tobytes(), **tags)
    np.testing.assert_allclose(got.line_integrals[:, ::-1], line, atol=1e-3)


@pytest.mark.parametrize("tag", [None, -1])
def test_a_table_may_fall_and_then_the_low_end_is_saturated(tag, tmp_path):
    """The modality LUT of an XA image makes X-rays of its logarithm, whichever way that was stored."""
    line, air, _ = exposure(12, 1)
    entries = np.rint(8.0 * air * np.exp(-np.arange(4096) / 1000.0)).astype(np.uint16)
    stored = np.rint(1000.0 * line).astype(np.uint16)
    stored[3, 4], stored[6, 7] = 0, 4095
    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTData, table.ModalityLUTType = [4096, 0, 16], entries.tobytes(), "US"
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "OW"
    options = radiograph.ReadOptions(air=8.0 * air, collimator=False)
    tags = {"PixelIntensityRelationship": "LOG", "ModalityLUTSequence": [table], "PixelData": stored.tobytes()}
    got = read_dicom(tmp_path, options, PixelIntensityRelationshipSign=tag, **tags)
    assert np.argwhere(~got.valid[:, ::-1]).tolist() == [[3, 4]]
    valid = got.valid[:, ::-1]
    np.testing.assert_allclose(got.line_integrals[:, ::-1][valid], stored[valid] / 1000.0, atol=5e-3)
    with pytest.raises(errors.InputError, match=r"LUTData: found entries from \d+ to \d+ with sign \+1"):
        read_dicom(tmp_path, options, PixelIntensityRelationshipSign=1, **tags)


@pytest.mark.parametrize("values", ["intensity", "log"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["dicom", "npy", "float npy"])
def test_the_most_exposed_end_is_saturated_whichever_way_numbers_run(kind, bits, sign, values, tmp_path):
    """`saturation` is a stored number: from it upwards, or downwards where fewer is brighter; else the end of the range."""
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
            got = read_dicom(tmp_path, options, PixelData=stored.tobytes(), **tags)
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


# ---- DICOM pixels


def test_dicom_numbers_are_rescaled_but_never_windowed(tmp_path):
    reference = read_dicom(tmp_path).line_integrals
    shown = read_dicom(
        tmp_path,
        PhotometricInterpretation="MONOCHROME1",
        PresentationLUTShape="INVERSE",
        WindowCenter=900,
        WindowWidth=200,
    )
    np.testing.assert_array_equal(shown.line_integrals, reference)
    scaled = read_dicom(tmp_path, RescaleSlope=2.0, RescaleIntercept=150.0)
    np.testing.assert_allclose(
        scaled.line_integrals[:, ::-1], -np.log((2.0 * malformed.pixels() + 150) / AIR), atol=1e-5
    )


def test_dicom_signs_logs_and_tables(tmp_path):
    line = expected()[:, ::-1]  # XA tags without PatientOrientation: as seen facing the patient
    inverted = (4095 - malformed.pixels()).astype(np.uint16).tobytes()
    got = read_dicom(tmp_path, PixelIntensityRelationshipSign=-1, PixelData=inverted)
    np.testing.assert_allclose(got.line_integrals, line, atol=1e-5)
    table = pydicom.Dataset()
    entries = np.minimum(np.arange(4096) ** 2 // 300, 65535).astype(np.uint16)
    table.LUTDescriptor, table.LUTData, table.ModalityLUTType = [4096, 0, 16], entries.tobytes(), "US"
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "OW"
    got = read_dicom(tmp_path, PixelIntensityRelationship="LOG", ModalityLUTSequence=[table])
    np.testing.assert_allclose(
        got.line_integrals, np.log(AIR / entries[malformed.pixels()])[:, ::-1].clip(-1), atol=1e-5
    )
    options = radiograph.ReadOptions(log_scale=500.0, air=3000.0, collimator=False)
    dx = {"Modality": "DX", "PixelIntensityRelationship": "LOG", "PixelIntensityRelationshipSign": -1}
    got = read_dicom(tmp_path, options, **dx)
    np.testing.assert_allclose(got.line_integrals, ((malformed.pixels() - 3000.0) / 500.0)[:, ::-1].clip(-1), atol=1e-5)
    with pytest.raises(errors.InputError, match="values"):
        read_dicom(tmp_path, options, **dx, PresentationIntentType="FOR PRESENTATION")
    with pytest.raises(errors.InputError, match="values"):
        read_dicom(tmp_path, Modality="CR", PixelIntensityRelationship=None)


def test_frames_are_chosen_not_guessed(tmp_path):
    second = malformed.pixels() + 40
    movie = {"NumberOfFrames": 2, "PixelData": malformed.pixels().tobytes() + second.tobytes()}
    with pytest.raises(errors.InputError, match="wanted a frame from 0 to 1: there are 2"):
        read_dicom(tmp_path, **movie)
    got = read_dicom(tmp_path, radiograph.ReadOptions(air=AIR, collimator=False, frame=1), **movie)
    np.testing.assert_allclose(got.line_integrals, -np.log(second / AIR)[:, ::-1], atol=1e-5)
    turning = read_dicom(
        tmp_path, radiograph.ReadOptions(air=AIR, collimator=False, frame=1), PositionerMotion="DYNAMIC", **movie
    )
    assert turning.camera is None and "still" in turning.origin["camera"]


def test_saturation_and_padding_follow_the_tags(tmp_path):
    image = malformed.pixels()
    image[5, 6], image[9, 9] = 4095, 17
    got = read_dicom(tmp_path, PixelData=image.tobytes(), PixelPaddingValue=17)
    assert np.argwhere(~got.valid[:, ::-1]).tolist() == [[5, 6], [9, 9]]


def test_shutters_close_what_the_tags_say(tmp_path):
    """Tags count from 1 and give row before column; the mask turns with the image."""
    v, u = np.mgrid[1 : SHAPE[0] + 1, 1 : SHAPE[1] + 1]
    got = read_dicom(
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


# ---- cameras


@pytest.mark.parametrize(
    "primary, secondary, orientation",
    [(0, 0, None), (25, -12, None), (-90, 5, None), (90, 0, None), (180, 0, None), (35, 20, ["L", "F"])]
    + [(0, 0, ["F", "L"]), (0, 0, ["R", "F"]), (10, 5, ["L", "H"]), (12, -8, ["H", "R"]), (180, 0, ["L", "F"])],
)
def test_a_bead_is_where_the_standard_puts_it(primary, secondary, orientation, tmp_path):
    """Independent of carm: source, bead and detector plane in patient axes, the image as the tags describe it."""
    a, b = np.radians([primary, secondary])
    detector = np.array([-np.sin(a) * np.cos(b), np.cos(a) * np.cos(b), np.sin(b)])  # where it stands, R A S
    bead = np.array([2.0, -1.5, 1.2])
    source = -700.0 * detector
    hit = source + (bead - source) * 1100.0 / ((bead - source) @ detector)
    offset = hit - 400.0 * detector
    up = np.array([np.sin(a) * np.sin(b), -np.cos(a) * np.sin(b), np.cos(b)])  # head side of the detector
    aside = np.cross(up, detector)  # to the right of an observer there who looks to the source
    across, down = aside, -up  # the picture as that observer sees it
    if orientation is not None:
        left = aside if abs(primary) < 90 else -aside
        axes = {"L": left, "R": -left, "F": -up, "H": up}
        across, down = (axes[word] for word in orientation)
    dv, du = 0.2, 0.3
    column = offset @ across / du + 0.5 * (SHAPE[1] - 1)
    row = offset @ down / dv + 0.5 * (SHAPE[0] - 1)
    image = malformed.pixels()
    image[int(np.rint(row)), int(np.rint(column))] = 4000
    got = read_dicom(
        tmp_path,
        PixelData=image.tobytes(),
        PositionerPrimaryAngle=float(primary),
        PositionerSecondaryAngle=float(secondary),
        PatientOrientation=orientation,
        ImagerPixelSpacing=[dv, du],
    )
    view = got.camera
    assert (view.height, view.width) == got.line_integrals.shape
    point = view.camera_from_world[:3, :3] @ bead + view.camera_from_world[:3, 3]
    pixel = view.intrinsics[:2] * point[:2] / point[2] + view.intrinsics[2:]
    np.testing.assert_allclose((got.file_from_image @ [*pixel, 1])[:2], [column, row], atol=1e-6)
    nearest = np.rint(pixel).astype(int)
    assert got.line_integrals[nearest[1], nearest[0]] == got.line_integrals.min()
    swapped = orientation in (["F", "L"], ["H", "R"])
    assert got.pixel_mm == ((dv, du) if swapped else (du, dv))
    assert (got.source_detector_mm, got.source_isocentre_mm) == (1100.0, 700.0)


def test_dicom_angles_are_opposite_to_the_carms(tmp_path):
    for dicom_angles, ours in (((180.0, 0.0), (0, 0)), ((-90.0, 0.0), (90, 0)), ((-170.0, 7.0), (10, -7))):
        view = read_dicom(
            tmp_path, PositionerPrimaryAngle=dicom_angles[0], PositionerSecondaryAngle=dicom_angles[1]
        ).camera
        np.testing.assert_allclose(view.camera_from_world, carm.extrinsics(*ours, 700.0), atol=1e-12)


def test_without_full_geometry_there_is_no_camera(tmp_path):
    for tags in ({"ImagerPixelSpacing": None}, {"DistanceSourceToPatient": 0.0}, {"FieldOfViewRotation": 90.0}):
        got = read_dicom(tmp_path, **tags)
        assert got.camera is None and got.origin["camera"].startswith("none: ")


def test_a_calibration_goes_before_the_tags_and_may_have_any_form(tmp_path):
    K, E, P = malformed.projection()
    big = np.array([[4, 0, 1.5], [0, 4, 1.5], [0, 0, 1.0]]) @ P  # of an image of four times the pixels
    forms = {
        "p.json": {"P": P.tolist()},
        "ke.json": {"K": K.tolist(), "E": E.tolist()},
        "views.json": {"views": [{"P": np.eye(3, 4).tolist()}, {"P": P.tolist()}]},
        "named.json": {"lat": {"P": P.tolist()}},
        "binned.json": {"P": big.tolist(), "height": 4 * SHAPE[0] + 3, "width": 4 * SHAPE[1]},
        "p.txt": "\n".join(" ".join(map(repr, row)) for row in (-1e-5 * P).tolist()).encode(),
    }
    np.save(tmp_path / "p.npy", P)
    for name in [*forms, "p.npy"]:
        path = written(tmp_path, name, forms[name]) if name in forms else tmp_path / name
        options = radiograph.ReadOptions(air=AIR, collimator=False, view=1 if name == "views.json" else None)
        got = read_dicom(tmp_path, options, path)
        np.testing.assert_allclose(got.camera.intrinsics, [3600, 5400, 27, 19], rtol=1e-9, err_msg=name)
        np.testing.assert_allclose(got.camera.camera_from_world, E, atol=1e-8, err_msg=name)
        np.testing.assert_array_equal(got.file_from_image, np.eye(3))
    with pytest.raises(
        errors.InputError, match="views.json: option view: found None, wanted a whole number from 0 to 1"
    ):
        read_dicom(tmp_path, XA, tmp_path / "views.json")


def test_a_mirrored_image_is_turned_with_its_calibration(tmp_path):
    _, E, P = malformed.projection()
    stored = np.array([[-1, 0, SHAPE[1] - 1], [0, 1, 0], [0, 0, 1.0]]) @ P
    path = written(tmp_path, "p.json", {"P": stored.tolist()})
    with pytest.raises(errors.InputError, match="a mirrored camera"):
        read_dicom(tmp_path, XA, path)
    got = read_dicom(tmp_path, radiograph.ReadOptions(air=AIR, collimator=False, mirrored=True), path)
    np.testing.assert_allclose(got.camera.intrinsics, [3600, 5400, 27, 19], rtol=1e-9)
    np.testing.assert_allclose(got.line_integrals, expected()[:, ::-1], atol=1e-5)
    pixel = P @ [5.0, -7.0, 3.0, 1.0]
    in_file = stored @ [5.0, -7.0, 3.0, 1.0]
    np.testing.assert_allclose(got.file_from_image @ (pixel / pixel[2]), in_file / in_file[2], atol=1e-9)


# ---- collimators


@pytest.fixture(scope="module")
def anatomy():
    """Line integrals (6, 400, 320) of a phantom's trunk, dense laterals among them."""
    made = generate.make_phantom(30002, generate.PhantomConfig(spacing_mm=(3.0, 3.0, 3.5)))
    mu = attenuation.from_hounsfield(made.hu.astype(np.float32))
    angles = ((0, 0), (90, 0), (12, -10), (80, 9), (100, -14), (-14, 4))
    views = np.stack([carm.extrinsics(*pair, 700.0) for pair in angles])
    rng = np.random.default_rng(0)
    world_from_ct = carm.sample_world_from_ct(rng, made.centroids[22])
    k = np.tile([1500.0, 1450.0, 159.5, 199.5], (len(views), 1))
    return np.asarray(quick.render(mu, made.affine, world_from_ct, k, views, (400, 320), 4.0))


def exposed(line_integrals, field, seed, scatter=0.3, photons=2e4):
    """Counts behind leaves that let 0.2 % through, with penumbra, scatter and noise."""
    rng = np.random.default_rng(seed)
    open_part = ndimage.gaussian_filter(field.astype(float), 1.0)
    primary = np.exp(-line_integrals) * (open_part + 0.002 * (1 - open_part))
    mean = primary + scatter * ndimage.gaussian_filter(primary, 0.12 * field.shape[1])
    return rng.poisson(mean * photons) + rng.normal(0, 2, field.shape)


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def test_an_open_field_has_no_border(anatomy):
    for seed, line in enumerate(anatomy):
        for scatter in (0.0, 0.3, 1.0):
            found = collimator.find(exposed(line, np.ones(line.shape, bool), seed, scatter))
            assert found.kind == "none" and found.mask.all(), (seed, scatter)
    assert collimator.find(np.full((200, 300), 7.0)).kind == "none"
    assert collimator.find(np.random.default_rng(0).poisson(50, (200, 300))).kind == "none"


@pytest.mark.parametrize("scatter", [0.1, 0.3, 1.0])
def test_straight_leaves_are_found_where_they_are(anatomy, scatter):
    height, width = anatomy[0].shape
    v, u = np.mgrid[:height, :width]
    for seed, line in enumerate(anatomy):
        rng = np.random.default_rng(seed)
        turn = np.radians(rng.uniform(-6, 6))
        centre = np.array([width, height]) / 2 + rng.uniform(-20, 20, 2)
        half = rng.uniform(0.25, 0.42, 2) * [width, height]
        x = (u - centre[0]) * np.cos(turn) + (v - centre[1]) * np.sin(turn)
        y = (v - centre[1]) * np.cos(turn) - (u - centre[0]) * np.sin(turn)
        field = (np.abs(x) < half[0]) & (np.abs(y) < half[1])
        found = collimator.find(exposed(line, field, seed, scatter))
        assert found.kind == "rectangle" and len(found.lines) == 4, seed
        assert overlap(found.mask, field) >= 0.98, (seed, overlap(found.mask, field))


@pytest.mark.parametrize("scatter", [0.0, 0.3])
def test_round_diaphragms_are_found_where_they_are(anatomy, scatter):
    height, width = anatomy[0].shape
    v, u = np.mgrid[:height, :width]
    for seed, line in enumerate(anatomy):
        rng = np.random.default_rng(100 + seed)
        centre = np.array([width, height]) / 2 + rng.uniform(-15, 15, 2)
        field = np.hypot(u - centre[0], v - centre[1]) < rng.uniform(0.35, 0.55) * width
        found = collimator.find(exposed(line, field, seed, scatter))
        assert found.kind == "circle" and overlap(found.mask, field) >= 0.98, seed


def test_one_leaf_alone_and_the_penumbra(anatomy, tmp_path):
    field = np.zeros(anatomy[0].shape, bool)
    field[:, 41:] = True
    np.save(tmp_path / "xray.npy", exposed(anatomy[0], field, 0))
    got = radiograph.read(tmp_path / "xray.npy", None, radiograph.ReadOptions(values="intensity"))
    assert got.origin["collimator"] == "rectangle found"
    edge = np.argmax(got.valid, 1)
    assert (np.abs(edge - 41 - radiograph.PENUMBRA_PX) <= 2).mean() > 0.99 and not got.valid[:, :38].any()


def test_a_calibration_of_swapped_axes_disagrees_with_the_pixel_aspect(tmp_path):
    K, E, _ = malformed.projection()
    K[0, 0], K[1, 1] = K[1, 1], K[0, 0]
    path = written(tmp_path, "k.json", {"K": K.tolist(), "E": E.tolist()})
    with pytest.raises(errors.InputError, match="fx / fy: found 1.5, wanted 0.6667"):
        read_dicom(tmp_path, XA, path)
    read_dicom(tmp_path, XA, path, ImagerPixelSpacing=None)
    with pytest.raises(errors.InputError, match="fx / fy"):
        read_dicom(tmp_path, XA, path, ImagerPixelSpacing=None, PixelAspectRatio=[2, 3])


def test_the_view_is_one_that_a_case_file_takes(tmp_path):
    view = read_dicom(tmp_path).camera
    again = camera_files.read_view("case", "views[0]", camera_files.view_json(view, "AP"), SHAPE)
    np.testing.assert_allclose(again.camera_from_world, view.camera_from_world)


@pytest.mark.parametrize(
    "syntax,coded",
    [(malformed.JPEG2000Lossless, ct_files.jpeg_2000), (malformed.JPEGLosslessSV1, ct_files.jpeg_lossless)],
)
def test_compressed_frames(tmp_path, syntax, coded):
    data = malformed.encapsulated(syntax, coded(malformed.pixels()), BitsStored=16, HighBit=15)
    got = radiograph.read(written(tmp_path, "xray.dcm", data), None, XA)
    np.testing.assert_allclose(got.line_integrals[:, ::-1], expected(), atol=1e-5)


def test_the_views_of_an_acquisition(tmp_path):
    """NPY files hold line integrals and need a calibration; DICOM brings both by itself."""
    plain = tmp_path / "xray.npy"
    np.save(plain, expected().astype(np.float32))
    dicom = written(tmp_path, "xray.dcm", malformed.dicom())
    _, _, P = malformed.projection()
    calibration = written(tmp_path, "views.json", [{"P": P.tolist()}, {"P": P.tolist()}])
    first, second = radiograph.read_views([plain, plain], calibration)
    np.testing.assert_allclose(first.line_integrals, expected(), atol=1e-5)
    np.testing.assert_allclose(first.camera.camera_from_world, second.camera.camera_from_world)
    (nominal,) = radiograph.read_views([dicom], None, XA)
    assert nominal.origin["camera"] == "DICOM tags, nominal"
    with pytest.raises(errors.InputError, match="views: found 2, wanted a list of 1"):
        radiograph.read_views([plain], calibration)
    with pytest.raises(errors.InputError, match="xray.npy: camera: found none"):
        radiograph.read_views([plain])
