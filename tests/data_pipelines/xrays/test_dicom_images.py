"""X-rays in DICOM: every transfer syntax, at clinical sizes; one frame of many; geometry tags that machines write."""

import struct
import tracemalloc

import dicom_forms
import numpy as np
import pydicom
import pytest
import xray_files
from pydicom.uid import ExplicitVRBigEndian
from pydicom.uid import ExplicitVRLittleEndian
from pydicom.uid import ImplicitVRLittleEndian

from data_pipelines.xrays import radiograph
from radgs_jax import errors

CLINICAL = (1024, 1024)


@pytest.fixture(scope="module")
def image():
    return dicom_forms.body(CLINICAL)


@pytest.mark.parametrize(
    "syntax, vr",
    [(ImplicitVRLittleEndian, "OW"), (ExplicitVRLittleEndian, "OW"), (ExplicitVRLittleEndian, "OB")]
    + [(ExplicitVRLittleEndian, "UN"), (ExplicitVRBigEndian, "OW")],  # in big endian, 16 bits are words (PS3.5, 8.1.2)
)
def test_uncompressed_files_of_clinical_size(syntax, vr, image, tmp_path):
    path = dicom_forms.saved(tmp_path / "xray.dcm", dicom_forms.header(image), syntax, vr)
    np.testing.assert_array_equal(radiograph.read_stored(path), image)
    got = radiograph.read(path, None, xray_files.XA)
    assert got.line_integrals.shape == CLINICAL and got.origin["bits"] == 12 and got.valid.all()
    np.testing.assert_allclose(got.line_integrals[:, ::-1], -np.log(image / xray_files.AIR), atol=1e-5)


@pytest.mark.parametrize("size", [120, 180, 181, 182, 256, 512, 2048])
def test_sizes_on_both_sides_of_what_is_read_at_once(size, tmp_path):
    image = dicom_forms.body((size, size + 10))
    path = dicom_forms.saved(tmp_path / "xray.dcm", dicom_forms.header(image))
    np.testing.assert_array_equal(radiograph.read_stored(path), image)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("vr", ["OW", "OB"])
def test_eight_bits_odd_lengths_and_every_frame(syntax, vr, tmp_path):
    """In big endian, bytes in words have changed places, also across the border of two frames of odd size."""
    frames = [dicom_forms.body((301, 307), 8, seed) for seed in range(3)]
    path = dicom_forms.saved(tmp_path / "xray.dcm", dicom_forms.header(frames, 8), syntax, vr)
    for number, image in enumerate(frames):
        np.testing.assert_array_equal(radiograph.read_stored(path, number), image)
    single = dicom_forms.saved(tmp_path / "one.dcm", dicom_forms.header(frames[0], 8), syntax, vr)
    np.testing.assert_array_equal(radiograph.read_stored(single), frames[0])


def test_a_padding_byte_behind_the_pixels_is_no_pixel(tmp_path):
    image = dicom_forms.body((300, 300), 8)
    dataset = dicom_forms.header(image, 8)
    dataset.PixelData = dataset.PixelData + b"\0\0"
    with pytest.raises(errors.InputError, match="PixelData: found 90002 bytes, wanted 90000 for 1 frame"):
        radiograph.read_stored(dicom_forms.saved(tmp_path / "two.dcm", dataset))
    odd = dicom_forms.body((301, 301), 8)
    data = dicom_forms.saved(tmp_path / "odd.dcm", dicom_forms.header(odd, 8)).read_bytes()
    at = data.rindex(b"\xe0\x7f\x10\x00O")
    assert struct.unpack("<L", data[at + 8 : at + 12])[0] == odd.size + 1
    bare = xray_files.written(tmp_path, "bare.dcm", data[: at + 8] + struct.pack("<L", odd.size) + data[at + 12 : -1])
    for path in (tmp_path / "odd.dcm", bare):
        np.testing.assert_array_equal(radiograph.read_stored(path), odd)
    behind = xray_files.written(
        tmp_path, "behind.dcm", data + struct.pack("<HH2sHL", 0xFFFC, 0xFFFC, b"OB", 0, 600) + bytes(600)
    )
    np.testing.assert_array_equal(radiograph.read_stored(behind), odd)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_sequences_and_long_elements_in_front_of_the_pixels(syntax, image, tmp_path):
    """Of undefined length, with an icon that has pixels of its own, a table of 128 KiB and a private element of 5 MB."""
    icon = pydicom.Dataset()
    icon.Rows = icon.Columns = 64
    icon.BitsAllocated, icon.PixelData = 8, bytes(4096)
    icon["PixelData"].VR = "OW"
    table = pydicom.Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [0, 0, 16], "US"
    table.LUTData = (np.arange(2**16) // 2).astype(np.uint16).tobytes()
    table["LUTDescriptor"].VR, table["LUTData"].VR = "US", "OW"
    dataset = dicom_forms.header(image, IconImageSequence=[icon], ModalityLUTSequence=[table])
    dataset.private_block(0x0029, "TEST", create=True).add_new(1, "OB", bytes(5_000_000))
    for keyword in ("IconImageSequence", "ModalityLUTSequence"):
        dataset[keyword].is_undefined_length = True
    path = dicom_forms.saved(tmp_path / "xray.dcm", dataset, syntax)
    got = radiograph.read(path, None, radiograph.ReadOptions(air=2000.0, collimator=False))
    np.testing.assert_allclose(got.line_integrals[:, ::-1], -np.log(np.maximum(image // 2, 1e-30) / 2000.0), atol=1e-5)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_files_without_preamble_or_meta_group(syntax, tmp_path):
    image = dicom_forms.body((400, 420))
    bare = dicom_forms.saved(tmp_path / "bare.dcm", dicom_forms.header(image), syntax, whole=False)
    data = dicom_forms.saved(tmp_path / "whole.dcm", dicom_forms.header(image), syntax).read_bytes()
    headless = xray_files.written(tmp_path, "headless.dcm", data[132:])
    for path in (bare, headless):
        np.testing.assert_array_equal(radiograph.read_stored(path), image)
    cut = xray_files.written(tmp_path, "cut.dcm", bare.read_bytes()[:-1000])
    with pytest.raises(errors.InputError, match="cut.dcm: PixelData: found 167500 pixels, wanted 168000"):
        radiograph.read_stored(cut)


@pytest.mark.parametrize(
    "name", ["JPEGLSLossless", "JPEG2000Lossless", "RLELossless", "JPEGLosslessProcess14_1", "JPEGLosslessProcess14"]
)
def test_compressed_files_of_clinical_size(name, image, tmp_path):
    plain = dicom_forms.saved(tmp_path / "plain.dcm", dicom_forms.header(image))
    path = dicom_forms.compressed(tmp_path / "xray.dcm", plain, name)
    np.testing.assert_array_equal(radiograph.read_stored(path), image)
    data = path.read_bytes()
    cut = xray_files.written(tmp_path, "cut.dcm", data[: len(data) * 2 // 3])
    with pytest.raises(errors.InputError, match="cut.dcm: "):
        radiograph.read_stored(cut)


@pytest.mark.parametrize("name", ["JPEGBaselineProcess1", "JPEGLSLossless", "RLELossless"])
def test_compressed_angiography_of_eight_bits(name, tmp_path):
    image = dicom_forms.body((512, 512), 8)
    plain = dicom_forms.saved(tmp_path / "plain.dcm", dicom_forms.header(image, 8))
    path = dicom_forms.compressed(tmp_path / "xray.dcm", plain, name)
    limit = 12 if "Baseline" in name else 0
    assert np.abs(radiograph.read_stored(path).astype(int) - image).max() <= limit


@pytest.mark.parametrize("name", [None, "JPEGLSLossless", "JPEG2000Lossless", "RLELossless"])
def test_one_frame_of_several(name, tmp_path):
    frames = [dicom_forms.body((512, 512), seed=seed) for seed in range(5)]
    path = dicom_forms.saved(tmp_path / "run.dcm", dicom_forms.header(frames))
    if name:
        path = dicom_forms.compressed(tmp_path / "coded.dcm", path, name)
    for number in (0, 3, 4):
        np.testing.assert_array_equal(radiograph.read_stored(path, number), frames[number])
    for frame, found in ((None, "nothing"), (5, "--frame=5"), (-1, "--frame=-1")):
        with pytest.raises(
            errors.InputError, match=f"found {found}, wanted --frame=0 to --frame=4 .ReadOptions.frame.: there are 5"
        ):
            radiograph.read_stored(path, frame)
    with pytest.raises(errors.InputError, match=r"--frame \(ReadOptions.frame\): found '2', wanted one whole number"):
        radiograph.read(path, None, radiograph.ReadOptions(frame="2"))


def test_a_frame_that_a_single_image_does_not_have(tmp_path):
    path = dicom_forms.saved(tmp_path / "one.dcm", dicom_forms.header(dicom_forms.body((200, 210))))
    assert radiograph.read_stored(path, 0).shape == (200, 210)
    with pytest.raises(errors.InputError, match="found --frame=3, wanted --frame=0, or none: there is 1"):
        radiograph.read_stored(path, 3)


@pytest.mark.parametrize("padding", [b"\xff\xff", b"\0\0\0\0", b"\xff\0", b"\0\xff\xff\xff"])
@pytest.mark.parametrize("name", ["JPEG2000Lossless", "JPEGLSLossless", "JPEGLosslessProcess14_1"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_padding_behind_the_end_of_a_stream(name, padding, pieces, tmp_path):
    image = dicom_forms.body((256, 300))
    plain = dicom_forms.saved(tmp_path / "plain.dcm", dicom_forms.header(image))
    coded = dicom_forms.compressed(tmp_path / "coded.dcm", plain, name)
    (stream,) = dicom_forms.frames_of(coded)
    stream = stream.rstrip(b"\0")
    data = stream + padding + b"\xff" * ((len(stream) + len(padding)) % 2)
    step = 2 * (len(data) // 2 // pieces)
    parts = [data[k * step : None if k == pieces - 1 else (k + 1) * step] for k in range(pieces)]
    path = dicom_forms.fragmented(tmp_path / "padded.dcm", coded, [parts])
    np.testing.assert_array_equal(radiograph.read_stored(path), image)
    for cut in (stream[:-2], stream[: len(stream) // 2] + padding, stream[:-1] + padding):
        path = dicom_forms.fragmented(tmp_path / "cut.dcm", coded, [cut])
        with pytest.raises(errors.InputError, match="cut.dcm: PixelData: found a compressed image that is cut"):
            radiograph.read_stored(path)


@pytest.mark.parametrize("table", [False, True])
def test_frames_of_several_fragments(table, tmp_path):
    frames = [dicom_forms.body((128, 140), seed=seed) for seed in range(3)]
    plain = dicom_forms.saved(tmp_path / "plain.dcm", dicom_forms.header(frames))
    coded = dicom_forms.compressed(tmp_path / "coded.dcm", plain, "JPEG2000Lossless")
    streams = dicom_forms.frames_of(coded)
    pieces = [[stream[:1000], stream[1000:]] for stream in streams]
    path = dicom_forms.fragmented(tmp_path / "pieces.dcm", coded, pieces, table)
    for number in range(3):
        np.testing.assert_array_equal(radiograph.read_stored(path, number), frames[number])
    short = dicom_forms.fragmented(tmp_path / "short.dcm", coded, pieces[:2])
    with pytest.raises(errors.InputError, match=r"short.dcm: PixelData: found 2 frame\(s\) in 4 fragments"):
        radiograph.read_stored(short, 2)


def test_a_long_run_is_not_read_whole(tmp_path):
    """Runs of 3.2 and 0.6 GB, whose other frames are holes in the files: one frame takes the memory of one frame."""
    frame, count = dicom_forms.body((1024, 1024)), 1536
    single = dicom_forms.saved(tmp_path / "run.dcm", dicom_forms.header(frame, NumberOfFrames=1)).read_bytes()
    many = single.replace(b"\x28\x00\x08\x00IS\x02\x001 ", b"\x28\x00\x08\x00IS\x04\x001536")
    at = many.rindex(b"\xe0\x7f\x10\x00OW") + 8
    path = xray_files.written(tmp_path, "run.dcm", many[:at] + struct.pack("<L", count * frame.nbytes))
    with open(path, "r+b") as stream:
        stream.truncate(at + 4 + count * frame.nbytes)
        stream.seek(at + 4 + 1200 * frame.nbytes)
        stream.write(frame.tobytes())
    array = np.lib.format.open_memmap(tmp_path / "run.npy", "w+", np.uint16, (300, 1024, 1024))
    array[200] = frame
    del array
    tracemalloc.start()
    for run, number in ((path, 1200), (tmp_path / "run.npy", 200)):
        np.testing.assert_array_equal(radiograph.read_stored(run, number), frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25
    with pytest.raises(errors.InputError, match="run.npy: --frame .*: found nothing, wanted --frame=0 to --frame=299"):
        radiograph.read_stored(tmp_path / "run.npy")


# ---- tags of the geometry

ODD = {
    "spacing of one number": {"ImagerPixelSpacing": 0.2},
    "negative spacing": {"ImagerPixelSpacing": [0.2, -0.3]},
    "one spacing of zero": {"ImagerPixelSpacing": [0.0, 0.3]},
    "aspect of one zero": {"PixelAspectRatio": [1, 0]},
    "aspect against spacing": {"PixelAspectRatio": [1, 1]},
    "negative distance": {"DistanceSourceToDetector": -1100.0},
    "patient behind the detector": {"DistanceSourceToPatient": 1200.0},
    "an angle of 999": {"PositionerPrimaryAngle": 999.0},
    "two angles": {"PositionerSecondaryAngle": [1.0, 2.0]},
    "orientation of one word": {"PatientOrientation": "L"},
    "orientation of other letters": {"PatientOrientation": ["NA", "NA"]},
}
PLACEHOLDERS = {
    "distance -1": {"DistanceSourceToDetector": -1.0},
    "distance 0": {"DistanceSourceToPatient": 0.0},
    "spacing 0": {"ImagerPixelSpacing": [0.0, 0.0]},
    "spacing -1": {"ImagerPixelSpacing": [-1.0, -1.0]},
    "aspect 0": {"ImagerPixelSpacing": None, "PixelAspectRatio": [0, 0]},
}


def calibration(tmp_path):
    return xray_files.written(tmp_path, "camera.json", [{"P": xray_files.projection()[2].tolist()}])


@pytest.mark.parametrize("tags", [*ODD.values(), *PLACEHOLDERS.values()], ids=[*ODD, *PLACEHOLDERS])
def test_tags_that_a_calibration_replaces_refuse_nothing(tags, tmp_path):
    got = xray_files.read_dicom(tmp_path, xray_files.XA, calibration(tmp_path), **tags)
    assert got.camera is not None and got.origin["camera"].startswith("calibration")
    np.testing.assert_allclose(got.line_integrals, xray_files.expected(), atol=1e-5)


@pytest.mark.parametrize("tags", ODD.values(), ids=list(ODD))
def test_tags_that_cannot_be_true_are_refused_where_they_are_needed(tags, tmp_path):
    with pytest.raises(errors.InputError) as caught:
        xray_files.read_dicom(tmp_path, **tags)
    assert "xray.dcm" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("tags", PLACEHOLDERS.values(), ids=list(PLACEHOLDERS))
def test_placeholders_are_not_known(tags, tmp_path):
    got = xray_files.read_dicom(tmp_path, **tags)
    assert got.camera is None and got.origin["camera"].startswith("none: no ")
    path = xray_files.written(tmp_path, "xray.dcm", xray_files.dicom(**tags))
    with pytest.raises(errors.InputError, match="xray.dcm: camera: found none: no .* --cameras"):
        radiograph.read_views([path], None, xray_files.XA)


def test_text_in_a_geometry_tag_matters_only_without_a_calibration(tmp_path):
    data = xray_files.dicom(DistanceSourceToDetector="111111")
    at = data.index(struct.pack("<HH", 0x0018, 0x1110)) + 8
    path = xray_files.written(tmp_path, "text.dcm", xray_files.patched(data, at, b"abcdef"))
    assert radiograph.read(path, calibration(tmp_path), xray_files.XA).camera is not None
    with pytest.raises(errors.InputError, match="text.dcm: DistanceSourceToDetector"):
        radiograph.read(path, None, xray_files.XA)
