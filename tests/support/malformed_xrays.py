"""Malformed X-ray and calibration files: generators of (name, bytes or JSON value). Names with "valid" are valid files."""

import gzip
import io
import json
import struct
import zlib

import numpy as np
import pydicom
from PIL import Image
from pydicom.uid import JPEG2000Lossless
from pydicom.uid import JPEGLosslessSV1
from pydicom.uid import RLELossless
from xray_files import dicom
from xray_files import encapsulated
from xray_files import nifti
from xray_files import npy
from xray_files import patched
from xray_files import pixels
from xray_files import png
from xray_files import projection
from xray_files import saved
from xray_files import SHAPE


def element(data, keyword):
    """Offset of an element's tag in an explicit little-endian file."""
    tag = pydicom.tag.Tag(keyword)
    return data.index(struct.pack("<HH", tag.group, tag.element), 132)


def with_text(keyword, text):
    """The valid file with text instead of a number, which pydicom does not write."""
    data = dicom(**{keyword: "1" * len(text)})
    at = element(data, keyword) + 8
    return patched(data, at, text.encode())


def rle(image):
    header = pydicom.dcmread(io.BytesIO(dicom()))
    return pydicom.pixels.encoders.RLELosslessEncoder.encode(
        image.tobytes(),
        rows=header.Rows,
        columns=header.Columns,
        samples_per_pixel=1,
        number_of_frames=1,
        bits_allocated=16,
        bits_stored=12,
        pixel_representation=0,
        photometric_interpretation="MONOCHROME2",
    )


def dicom_mutants():
    good, frame = dicom(), rle(pixels())
    yield "valid", good
    at = element(good, "PixelData")  # tag, VR and padding, then the length
    for part in np.linspace(0, len(good) - 2, 16).astype(int):
        yield f"cut_{part}", good[:part]
    for name, tags in {
        "no_pixels": {"PixelData": None},
        "few_pixels": {"PixelData": pixels().tobytes()[:-200]},
        "many_pixels": {"PixelData": pixels().tobytes() + bytes(200)},
        "empty_pixels": {"PixelData": b""},
        "rows_more": {"Rows": 41},
        "rows_fewer": {"Rows": 39},
        "rows_zero": {"Rows": 0},
        "rows_huge": {"Rows": 65535, "Columns": 65535},
        "rows_long": {"Rows": 65535},
        "columns_more": {"Columns": 57},
        "columns_none": {"Columns": None},
        "rows_none": {"Rows": None},
        "bits_8": {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7},
        "bits_1": {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0},
        "bits_32": {"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31},
        "bits_12": {"BitsAllocated": 12},
        "bits_none": {"BitsAllocated": None},
        "stored_10": {"BitsStored": 10, "HighBit": 9},
        "stored_20": {"BitsStored": 20, "HighBit": 19},
        "high_bit": {"HighBit": 15},
        "samples_3": {"SamplesPerPixel": 3},
        "samples_none": {"SamplesPerPixel": None},
        "rgb": {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0},
        "palette": {"PhotometricInterpretation": "PALETTE COLOR"},
        "photometric": {"PhotometricInterpretation": None},
        "representation": {"PixelRepresentation": 7},
        "ct": {"Modality": "CT"},
        "no_modality": {"Modality": None},
        "constant": {"PixelData": np.full(SHAPE, 700, np.uint16).tobytes()},
        "frames_more": {"NumberOfFrames": 2},
        "frames_zero": {"NumberOfFrames": 0},
        "frames_huge": {"NumberOfFrames": 2**31 - 1},
        "frames_unchosen": {"NumberOfFrames": 2, "PixelData": 2 * pixels().tobytes()},
        "no_meaning": {"PixelIntensityRelationship": None},
        "disp": {"PixelIntensityRelationship": "DISP"},
        "log_scale": {"PixelIntensityRelationship": "LOG"},
        "for_eyes": {"Modality": "DX", "PresentationIntentType": "FOR PRESENTATION"},
        "sign": {"PixelIntensityRelationshipSign": 3},
        "no_sign": {"Modality": "DX"},
        "sign_of_signed": {
            "PixelIntensityRelationshipSign": -1,
            "PixelRepresentation": 1,
            "BitsStored": 13,
            "HighBit": 12,
        },
        "sign_and_offset": {"PixelIntensityRelationshipSign": -1, "RescaleSlope": 2.0, "RescaleIntercept": 150.0},
        "slope_falls": {"RescaleSlope": -1.0, "RescaleIntercept": 4095.0},
        "spacing_one": {"ImagerPixelSpacing": 0.2},
        "spacing_zero": {"ImagerPixelSpacing": [0.0, 0.3]},
        "spacing_negative": {"ImagerPixelSpacing": [0.2, -0.3]},
        "aspect": {"PixelAspectRatio": [1, 1]},
        "aspect_zero": {"PixelAspectRatio": [1, 0]},
        "sdd_negative": {"DistanceSourceToDetector": -1100.0},
        "sdd_short": {"DistanceSourceToDetector": 600.0},
        "angle": {"PositionerPrimaryAngle": 720.0},
        "angle_two": {"PositionerPrimaryAngle": [1.0, 2.0]},
        "orientation": {"PatientOrientation": ["X", "Y"]},
        "orientation_one": {"PatientOrientation": "L"},
        "orientation_wrong": {"PatientOrientation": ["L", "A"]},
        "slope_zero": {"RescaleSlope": 0.0, "RescaleIntercept": 1.0},
        "slope_alone": {"RescaleSlope": 2.0},
        "shutter": {"ShutterShape": "RECTANGULAR"},
        "shutter_turned": {
            "ShutterShape": "RECTANGULAR",
            "ShutterLeftVerticalEdge": 40,
            "ShutterRightVerticalEdge": 4,
            "ShutterUpperHorizontalEdge": 4,
            "ShutterLowerHorizontalEdge": 30,
        },
        "shutter_star": {"ShutterShape": "STAR"},
        "shutter_points": {"ShutterShape": "POLYGONAL", "VerticesOfThePolygonalShutter": [1, 2, 3]},
        "shutter_closed": {
            "ShutterShape": "CIRCULAR",
            "CenterOfCircularShutter": [900, 900],
            "RadiusOfCircularShutter": 5,
        },
        "circle_none": {"CollimatorShape": "CIRCULAR", "CenterOfCircularCollimator": [9, 9]},
        "lut_empty": {"ModalityLUTSequence": [pydicom.Dataset()]},
    }.items():
        yield name, dicom(**tags)
    for keyword in ("PositionerPrimaryAngle", "DistanceSourceToDetector", "ImagerPixelSpacing", "NumberOfFrames"):
        for text in ("abcd", "1..2", "nan "):
            yield f"{keyword}_{text.strip()}", with_text(keyword, text)
    yield "length_huge", patched(good, at + 8, struct.pack("<I", 2**32 - 2))
    yield "length_undefined", patched(good, at + 8, struct.pack("<I", 2**32 - 1))
    yield "no_preamble_word", patched(good, 128, b"DICK")
    yield "vr_wrong", patched(good, element(good, "Rows") + 4, b"ZZ")
    meta = good.index(b"1.2.840.10008.1.2.1")
    yield "syntax_unknown", patched(good, meta, b"1.2.840.99999.9.9.9")
    deflated = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = b"".join(deflated.compress(bytes(2**22)) for _ in range(300)) + deflated.flush()
    head = dicom(pydicom.uid.DeflatedExplicitVRLittleEndian)
    yield "deflate_bomb", head[:400] + bomb
    # Sequences of undefined length, nested 2000 deep.
    nest = struct.pack("<HH2sHI", 0x0040, 0xA730, b"SQ", 0, 2**32 - 1) + struct.pack("<HHI", 0xFFFE, 0xE000, 2**32 - 1)
    yield "nested", good[:at] + 2000 * nest
    yield "rle_valid", encapsulated(RLELossless, frame)
    yield "rle_garbage", encapsulated(RLELossless, np.random.default_rng(0).bytes(900))
    yield "rle_cut", encapsulated(RLELossless, frame[: len(frame) // 2])
    yield "rle_rows", encapsulated(RLELossless, frame, Rows=80)
    yield "rle_empty", dicom(RLELossless, PixelData=pydicom.encaps.encapsulate([b"\0\0"]))
    yield "rle_no_items", encapsulated(RLELossless, frame).replace(b"\xfe\xff\x00\xe0", bytes(4))
    for syntax in (JPEGLosslessSV1, JPEG2000Lossless):
        for name, frame in {
            "garbage": np.random.default_rng(1).bytes(900),
            "zeros": bytes(900),
            "jpeg_garbage": b"\xff\xd8\xff\xc3" + np.random.default_rng(2).bytes(900),
            "jpeg_huge": b"\xff\xd8\xff\xc3\x00\x0b\x10\xff\xff\xff\xff\x01\x01\x11\x00\xff\xda" + bytes(600),
            "jpeg_header_only": b"\xff\xd8\xff\xc3\x00\x0b\x0c"
            + struct.pack(">HH", *SHAPE)
            + b"\x01\x01\x11\x00\xff\xd9",
            "j2k_huge": b"\xff\x4f\xff\x51\x00\x29\x00\x00"
            + struct.pack(">8I", 2**31, 2**31, 0, 0, 2**31, 2**31, 0, 0),
            "j2k_header_only": b"\xff\x4f\xff\x51\x00\x29\x00\x00"
            + struct.pack(">8I", SHAPE[1], SHAPE[0], 0, 0, SHAPE[1], SHAPE[0], 0, 0)
            + b"\x00\x01\x0b\x01\x01\xff\xd9",
        }.items():
            yield f"{name}_{syntax.name[:9].replace(' ', '')}_{len(syntax)}", encapsulated(syntax, frame)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_mutants():
    good = png(pixels())
    yield "valid", good
    for part in (8, 20, 33, 45, len(good) // 2, len(good) - 40):
        yield f"cut_{part}", good[:part]
    begin = good.index(b"IHDR") - 4
    header = good[begin + 8 : begin + 21]
    after = good[begin + 25 :]

    def headed(width, height, depth, colour):
        return good[:8] + chunk(b"IHDR", struct.pack(">IIBB", width, height, depth, colour) + header[10:]) + after

    yield "rows", headed(56, 80, 16, 0)
    yield "bomb", headed(200_000, 200_000, 16, 0)
    yield "bomb_wide", headed(2**31 - 1, 1, 16, 0)
    yield "zero", headed(0, 40, 16, 0)
    yield "depth", headed(56, 40, 7, 0)
    yield "crc", patched(good, begin + 12, b"\0\0\1\0")
    yield "no_data", good[: begin + 25] + chunk(b"IEND", b"")
    yield "flipped_bits", patched(good, len(good) // 2, bytes(40))
    zeros = zlib.compress(bytes(2**26), 9)
    large = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 16, 0, 0, 0, 0))
    yield "zlib_bomb", good[:8] + large + chunk(b"IDAT", zeros) + chunk(b"IEND", b"")
    yield "text_bomb", good[: begin + 25] + 40 * chunk(b"zTXt", b"a\0\0" + zeros) + after
    grey = (pixels() // 16).astype(np.uint8)
    yield "grey_8", png(grey)
    yield "rgb", png(np.repeat(grey[..., None], 3, 2))
    yield "rgba", png(np.repeat(grey[..., None], 4, 2))
    yield "palette", saved(Image.fromarray(grey).convert("P"), "PNG")
    yield "bit", saved(Image.fromarray(grey).convert("1"), "PNG")
    yield "gif_named_png", saved(Image.fromarray(grey), "GIF")
    yield "empty", b""
    yield "text", b"an X-ray, promised"


def tiff_mutants():
    good = saved(Image.fromarray(pixels()), "TIFF")
    yield "valid", good
    for part in (6, 8, 100, len(good) // 2, len(good) - 300):
        yield f"cut_{part}", good[:part]
    yield "zip_cut", saved(Image.fromarray(pixels()), "TIFF", compression="tiff_adobe_deflate")[:-500]
    (directory,) = struct.unpack("<I", good[4:8])
    (count,) = struct.unpack("<H", good[directory : directory + 2])
    entries = {
        struct.unpack("<H", good[at : at + 2])[0]: at for at in range(directory + 2, directory + 2 + 12 * count, 12)
    }
    following = directory + 2 + 12 * count

    def entry(tag, value, kind=4, number=1):
        return patched(good, entries[tag], struct.pack("<HHII", tag, kind, number, value))

    yield "directory_beyond", patched(good, 4, struct.pack("<I", 2**31))
    yield "valid_directory_loop", patched(good, following, struct.pack("<I", directory))
    yield "directory_next", patched(good, following, struct.pack("<I", directory + 12))
    yield "valid_many_entries", patched(good, directory, struct.pack("<H", 65535))
    yield "strip_beyond", entry(273, 2**31)
    yield "strip_offsets_huge", entry(273, 8, number=2**30)
    yield "strip_bytes", entry(279, 10)
    yield "width", entry(256, 2**31 - 1)
    yield "rows", entry(257, 4000)
    yield "rows_huge", entry(257, 2**31 - 1)
    yield "zero_width", entry(256, 0)
    yield "bits", entry(258, 3, 3)
    yield "compression", entry(259, 32946 + 77, 3)
    yield "photometric", entry(262, 3, 3)
    grey = (pixels() // 16).astype(np.uint8)
    yield "grey_8", saved(Image.fromarray(grey), "TIFF")
    yield "rgb", saved(Image.fromarray(np.repeat(grey[..., None], 3, 2)), "TIFF")
    yield "palette", saved(Image.fromarray(grey).convert("P"), "TIFF")
    page = Image.fromarray(pixels())
    yield "pages", saved(page, "TIFF", save_all=True, append_images=[page])
    yield "nan", saved(Image.fromarray(np.full(SHAPE, np.nan, np.float32)), "TIFF")


def npy_mutants():
    good = npy(pixels())
    yield "valid", good
    for part in (7, 30, 100, 200, len(good) - 2):
        yield f"cut_{part}", good[:part]

    def shaped(text):
        return good.replace(b"(40, 56)", text.encode())

    yield "shape_huge", shaped("(2 ** 40, 2)")
    yield "shape_large", good.replace(b"(40, 56), }          ", b"(9000000000, 9000), }")
    yield "shape_negative", shaped("(-4, 56)")
    yield "shape_more", shaped("(41, 56)")
    yield "descr", good.replace(b"'<u2'", b"'<zz'")
    yield "code", good.replace(b"(40, 56)", b"exit()  ")
    yield "objects", npy(np.array([[{}]]), allow_pickle=True)
    yield "bytes", npy((pixels() // 16).astype(np.uint8))
    yield "bool", npy(pixels() > 900)
    yield "complex", npy(pixels().astype(np.complex64))
    yield "text", npy(np.full(SHAPE, "x"))
    yield "nan", npy(np.full(SHAPE, np.nan, np.float32))
    yield "colours", npy(np.zeros((*SHAPE, 3), np.uint16))
    yield "line", npy(pixels()[0])
    yield "point", npy(np.float32(3))
    yield "tiny", npy(pixels()[:4])
    yield "empty", npy(np.zeros((0, 56), np.uint16))
    yield "constant", npy(np.full(SHAPE, 7, np.uint16))
    yield "dark", npy(-pixels().astype(np.float32))
    yield "frames", npy(np.stack([pixels()] * 6))


def nifti_mutants():
    good = nifti(pixels().T[:, :, None])
    yield "valid.nii", good
    yield "valid2d.nii.gz", gzip.compress(nifti(pixels().T))
    for part in (4, 100, 347, 352, len(good) - 300):
        yield f"cut_{part}.nii", good[:part]
    packed = gzip.compress(good)
    for part in (0, 12, 100, len(packed) - 200):
        yield f"cut_{part}.nii.gz", packed[:part]
    yield "volume.nii", nifti(np.zeros((20, 20, 20), np.int16))
    yield "line.nii", nifti(np.arange(50, dtype=np.int16))
    yield "series.nii", nifti(np.zeros((20, 20, 1, 5), np.int16))
    huge = patched(good, 40, struct.pack("<8h", 3, 32767, 32767, 1, 1, 1, 1, 1))
    yield "huge.nii", huge
    yield "huge.nii.gz", gzip.compress(huge + bytes(2**28), 1)
    yield "negative.nii", patched(good, 40, struct.pack("<8h", 3, -4, 56, 1, 1, 1, 1, 1))
    yield "axes.nii", patched(good, 40, struct.pack("<h", 77))
    yield "type.nii", patched(good, 70, struct.pack("<h", 9999))
    yield "rgb.nii", patched(good, 70, struct.pack("<hh", 128, 24))
    yield "complex.nii", patched(good, 70, struct.pack("<hh", 32, 64))
    yield "offset.nii", patched(good, 108, struct.pack("<f", 1e9))
    yield "offset_nan.nii", patched(good, 108, struct.pack("<f", np.nan))
    yield (
        "extension.nii.gz",
        gzip.compress(
            patched(good, 108, struct.pack("<f", 2e9))[:348]
            + b"\1\0\0\0"
            + struct.pack("<ii", 2**31 - 16, 4)
            + bytes(2**28),
            1,
        ),
    )
    yield "magic.nii", patched(good, 344, b"nope")
    yield "bytes.nii", nifti((pixels() // 16).astype(np.uint8))
    yield "nan.nii", nifti(np.full((56, 40), np.nan, np.float32))


def calibration_mutants():
    K, E, P = (m.tolist() for m in projection())
    array = np.array(P)

    def text(rows):
        return "\n".join(" ".join(repr(float(v)) for v in row) for row in rows).encode()

    yield "valid.json", {"P": P}
    yield "valid_pose.json", {"K": K, "E": E}
    yield "valid.txt", text(P)
    yield "valid.npy", npy(array)
    yield "valid_scaled.json", (-1e-7 * array).tolist()
    mirror = np.array([[-1, 0, SHAPE[1] - 1], [0, 1, 0], [0, 0, 1]])
    skew = np.array([[3600.0, 40, 27], [0, 5400, 19], [0, 0, 1]])
    for name, value in {
        "empty": {},
        "number": 3,
        "string": "P",
        "null": None,
        "list_empty": [],
        "rows_2": {"P": P[:2]},
        "rows_4": {"P": P + [[0, 0, 0, 1]]},
        "columns_3": {"P": [row[:3] for row in P]},
        "ragged": {"P": [P[0], P[1], P[2][:2]]},
        "words": {"P": [["a"] * 4] * 3},
        "null_p": {"P": None},
        "object_p": {"P": {"a": 1}},
        "nan": {"P": [[float("nan")] * 4] + P[1:]},
        "infinite": {"P": [[float("inf")] * 4] + P[1:]},
        "singular": {"P": [P[0], P[0], P[2]]},
        "zeros": {"P": [[0.0] * 4] * 3},
        "orthographic": {"P": [P[0], P[1], [0, 0, 0, 1]]},
        "mirrored": {"P": (mirror @ array).tolist()},
        "swapped_axes": {"P": (array[[1, 0, 2]]).tolist()},
        "skewed": {"P": (skew @ np.array(E)[:3]).tolist()},
        "behind": {"P": (array - 2 * np.array(K) @ np.array([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 700.0]])).tolist()},
        "k_alone": {"K": K},
        "e_alone": {"E": E},
        "k_negative": {"K": [[-3600, 0, 27], K[1], K[2]], "E": E},
        "k_skewed": {"K": skew.tolist(), "E": E},
        "k_row": {"K": [K[0], K[1], [0, 0, 2]], "E": E},
        "e_mirrored": {"K": K, "E": (np.diag([-1, 1, 1, 1]) @ np.array(E)).tolist()},
        "e_scaled": {"K": K, "E": (2 * np.array(E)).tolist()},
        "e_3x4": {"K": K, "E": E[:3]},
        "size": {"P": P, "height": 41, "width": 56},
        "size_small": {"P": P, "height": 20, "width": 28},
        "size_mixed": {"P": P, "height": 80, "width": 56},
        "size_text": {"P": P, "height": "40", "width": 56},
        "size_huge": {"P": P, "height": 10**30, "width": 10**30},
        "views": [{"P": P}, {"P": P}],
        "views_empty": {"views": []},
        "views_named": {"ap": {"P": P}, "lat": {"P": P}},
    }.items():
        yield f"{name}.json", value
    yield "cut.json", json.dumps({"P": P}).encode()[:-9]
    yield "deep.json", b"[" * 100_000
    yield "binary.json", bytes(range(256))
    yield "rows_2.txt", text(P[:2])
    yield "words.txt", b"P = [1, 2, 3]"
    yield "nan.txt", text(P).replace(b"3600", b"nan", 1) if b"3600" in text(P) else b"nan " * 12
    yield "long.txt", b"1 " * 2**20
    yield "rows_4.npy", npy(np.eye(4))
    yield "objects.npy", npy(np.array([None] * 12).reshape(3, 4), allow_pickle=True)
    yield "matrix.csv", text(P)
