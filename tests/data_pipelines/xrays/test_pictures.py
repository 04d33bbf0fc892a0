"""Pictures of 8 bits: read where the caller says what they are, and refused by name otherwise."""

import io
import struct
import zlib

import nibabel
import numpy as np
import pytest
import xray_files
from PIL import Image

from data_pipelines.xrays import radiograph
from radgs_jax import errors

EIGHT = radiograph.ReadOptions(values="intensity", bits=8, air=250.0, collimator=False)


def picture():
    return (xray_files.pixels((64, 80)) // 16).clip(1, 254).astype(np.uint8)


def data(image, kind, **options):
    stream = io.BytesIO()
    if kind == "npy":
        np.save(stream, image)
    elif kind == "nii":
        return nibabel.Nifti1Image(image.T[:, :, None], np.diag([-0.3, -0.2, 1.0, 1.0])).to_bytes()
    else:
        shown = image if isinstance(image, Image.Image) else Image.fromarray(image)
        shown.save(stream, kind, **options)
    return stream.getvalue()


def rgb(image):
    return np.repeat(image[..., None], 3, 2)


def opaque(image):
    return np.concatenate([rgb(image), np.full((*image.shape, 1), 255, np.uint8)], 2)


FORMS = {
    "grey.png": lambda image: data(image, "png"),
    "grey.tif": lambda image: data(image, "tiff"),
    "lzw.tif": lambda image: data(image, "tiff", compression="tiff_lzw"),
    "array.npy": lambda image: data(image, "npy"),
    "volume.nii": lambda image: data(image, "nii"),
    "rgb.png": lambda image: data(rgb(image), "png"),
    "rgb.tif": lambda image: data(rgb(image), "tiff"),
    "rgba.png": lambda image: data(opaque(image), "png"),
    "alpha.png": lambda image: data(Image.fromarray(image).convert("LA"), "png"),
    "palette.png": lambda image: data(Image.fromarray(image).convert("P"), "png"),
    "colours.npy": lambda image: data(rgb(image), "npy"),
    "stack.npy": lambda image: data(image[None], "npy"),
}


@pytest.mark.parametrize("name", FORMS)
def test_eight_bits_are_read_where_the_caller_says_so(name, tmp_path):
    image = picture()
    path = xray_files.written(tmp_path, name, FORMS[name](image))
    got = radiograph.read(path, None, EIGHT)
    np.testing.assert_allclose(got.line_integrals, -np.log(image / 250.0).astype(np.float32), atol=1e-5)
    assert got.origin["bits"] == 8 and got.origin["saturation"] == 255
    for bits in (None, 12):
        if name == "colours.npy":
            continue
        options = radiograph.ReadOptions(values="intensity", bits=bits)
        with pytest.raises(errors.InputError, match=r"8 are made for display .*--bits=8 \(ReadOptions.bits\)"):
            radiograph.read(path, None, options)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "array.npy"])
def test_the_meaning_of_eight_bits_is_said_too(name, tmp_path):
    path = xray_files.written(tmp_path, name, FORMS[name](picture()))
    calibration = xray_files.written(tmp_path, "views.json", [{"P": xray_files.projection()[2].tolist()}])
    with pytest.raises(errors.InputError, match="wanted --values=line_integrals, --values=intensity or"):
        radiograph.read(path, None, radiograph.ReadOptions(bits=8))
    with pytest.raises(errors.InputError, match="--bits .*found 8 with --values=line_integrals, .* --values=intensity"):
        radiograph.read_views([path], calibration, radiograph.ReadOptions(bits=8))
    assert radiograph.read_views([path], calibration, EIGHT)[0].camera is not None
    with pytest.raises(errors.InputError, match=r"--bits=8 .*and --values=intensity or --values=log"):
        radiograph.read_views([path], calibration)


def test_saturated_air_of_eight_bits_does_not_count(tmp_path):
    image = picture()
    image[:, :50] = 255
    path = xray_files.written(tmp_path, "air.png", data(image, "png"))
    got = radiograph.read(path, None, radiograph.ReadOptions(values="intensity", bits=8))
    assert not got.valid[:, :50].any() and got.valid[:, 50:].all()


def test_a_jpeg_of_grey_is_read_with_its_losses(tmp_path):
    v, u = np.mgrid[:128, :160]
    image = (40 + 0.6 * v + 0.5 * u).astype(np.uint8)
    for name, content in {
        "grey.jpg": data(image, "jpeg", quality=95),
        "rgb.jpg": data(rgb(image), "jpeg", quality=95),
    }.items():
        path = xray_files.written(tmp_path, name, content)
        assert np.abs(radiograph.read_stored(path, bits=8).astype(int) - image).max() <= 3
        with pytest.raises(errors.InputError, match="--bits=8"):
            radiograph.read_stored(path)
        cut = xray_files.written(tmp_path, f"cut_{name}", content[: len(content) // 2])
        with pytest.raises(errors.InputError, match="cut_.*: content: found "):
            radiograph.read_stored(cut, bits=8)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_colours_transparency_and_other_depths_stay_refused(kind, tmp_path):
    image = picture()
    colours, clear = rgb(image), opaque(image)
    colours[3, 4, 1] += 1
    clear[3, 4, 3] = 250
    one_bit = Image.fromarray(image).convert("1")
    for name, shown in {"colours": colours, "clear": clear, "one bit": one_bit}.items():
        path = xray_files.written(tmp_path, f"{name}.{kind}", data(shown, kind))
        with pytest.raises(errors.InputError, match=f"{name}.{kind}: pixels: found (colours|mode)"):
            radiograph.read_stored(path, bits=8)


def test_colours_of_16_bits_are_not_taken_for_8(tmp_path):
    """Pillow reads them as 8 bits without a word."""
    rows = b"".join(
        b"\0" + np.repeat(row[:, None] * 200, 3, 1).astype(">u2").tobytes() for row in picture().astype(np.uint16)
    )

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 80, 64, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    with pytest.raises(errors.InputError, match=r"deep.png: pixels: found mode RGB of 16 bit\(s\)"):
        radiograph.read_stored(xray_files.written(tmp_path, "deep.png", content), bits=8)


@pytest.mark.parametrize("kind", ["tiff", "npy"])
@pytest.mark.parametrize("bits", [8, None])
def test_pages_and_frames_are_chosen(kind, bits, tmp_path):
    pages = [picture() // (k + 1) if bits else xray_files.pixels((64, 80)) + 9 * k for k in range(3)]
    if kind == "npy":
        content = data(np.stack(pages), "npy")
    else:
        shown = [Image.fromarray(page) for page in pages]
        content = data(shown[0], "tiff", save_all=True, append_images=shown[1:])
    path = xray_files.written(tmp_path, f"run.{kind}", content)
    for number, page in enumerate(pages):
        np.testing.assert_array_equal(radiograph.read_stored(path, number, bits), page)
    for frame in (None, 3):
        with pytest.raises(errors.InputError, match="wanted --frame=0 to --frame=2 .*there are 3"):
            radiograph.read_stored(path, frame, bits)


def test_a_frame_is_refused_where_there_is_one(tmp_path):
    for name in ("grey.png", "grey.tif", "array.npy", "volume.nii", "stack.npy"):
        path = xray_files.written(tmp_path, name, FORMS[name](picture()))
        assert radiograph.read_stored(path, 0, 8).shape == (64, 80)
        with pytest.raises(errors.InputError, match="found --frame=1, wanted --frame=0, or none: there is 1"):
            radiograph.read_stored(path, 1, 8)
