"""Malformed NIfTI files and DICOM series, made by changing valid ones."""

import bz2
import gzip
import lzma
import struct
import zlib

import ct_files
import nibabel
import numpy as np
import pydicom
import pydicom.encaps
import pydicom.uid

SHAPE = (12, 10, 8)
AFFINE = ct_files.nifti_affine()


def volume(dtype=np.int16):
    return (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 100).astype(dtype)


def _header(change=lambda header: None, dtype=np.int16, kind=nibabel.Nifti1Image):
    """Header bytes of a valid volume, changed without nibabel's checks, and the extension flag."""
    image = kind(volume(dtype), AFFINE)
    image.header.set_xyzt_units("mm")
    header = nibabel.Nifti1Header(image.to_bytes()[:348]) if kind is nibabel.Nifti1Image else None
    header = header or nibabel.Nifti2Header(image.to_bytes()[:540])
    change(header._structarr)
    return header.binaryblock + bytes(4)


def _set(**values):
    def change(header):
        for name, value in values.items():
            with np.errstate(invalid="ignore"):
                header[name] = value

    return change


def _dim(*values):
    return _set(dim=[*values, *[1] * (8 - len(values))])


def _sform(matrix, column=None, value=None):
    matrix = np.array(matrix, np.float64)
    if column is not None:
        matrix[:, column] = value
    return _set(srow_x=matrix[0], srow_y=matrix[1], srow_z=matrix[2])


def _qform(**values):
    return _set(sform_code=0, qform_code=1, **{"pixdim": [1, 1, 1, 1, 0, 0, 0, 0], **values})


HEADERS = {
    "no axes": _dim(0, 12, 10, 8),
    "minus one axis": _dim(-1, 12, 10, 8),
    "eight axes": _dim(8, 12, 10, 8),
    "a hundred axes": _dim(100, 12, 10, 8),
    "one axis": _dim(1, 960),
    "two axes": _dim(2, 96, 10),
    "no columns": _dim(3, 0, 10, 8),
    "minus five rows": _dim(3, 12, -5, 8),
    "a slice more": _dim(3, 12, 10, 9),
    "a slice less": _dim(3, 12, 10, 7),
    "two volumes": _dim(4, 12, 10, 4, 2),
    "30000^3": _dim(3, 30000, 30000, 30000),
    "32767^7": _dim(7, *[32767] * 7),
    "512 x 512 x 1500": _dim(3, 512, 512, 1500),
    "complex": _set(datatype=32, bitpix=64, dim=[3, 12, 10, 2, 1, 1, 1, 1]),
    "complex 128": _set(datatype=1792, bitpix=128),
    "RGB": _set(datatype=128, bitpix=24),
    "RGBA": _set(datatype=2304, bitpix=32),
    "float 128": _set(datatype=1536, bitpix=128),
    "no type": _set(datatype=0),
    "bits": _set(datatype=1, bitpix=1),
    "type 9999": _set(datatype=9999),
    "wider type": _set(datatype=64, bitpix=64),
    "offset 100": _set(vox_offset=100),
    "offset 1e9": _set(vox_offset=1e9),
    "offset nan": _set(vox_offset=np.nan),
    "offset inf": _set(vox_offset=np.inf),
    "offset -352": _set(vox_offset=-352),
    "offset 360.5": _set(vox_offset=360.5),
    "nan affine": _sform(AFFINE, 1, np.nan),
    "inf affine": _sform(AFFINE, 3, np.inf),
    "zero affine": _sform(np.zeros((3, 4))),
    "zero column": _sform(AFFINE, 0, 0.0),
    "flat affine": _sform(AFFINE, 0, AFFINE[:, 1]),
    "huge voxels": _sform(AFFINE * 1e20),
    "tiny voxels": _sform(AFFINE * [1e-9, 1e-9, 1e-9, 1]),
    "far away": _sform(AFFINE, 3, 1e30),
    "no orientation": _set(sform_code=0, qform_code=0),
    "qform without spacing": _qform(pixdim=[1, 0, 1, 1, 0, 0, 0, 0]),
    "qform of negative spacing": _qform(pixdim=[1, 1, -1, 1, 0, 0, 0, 0]),
    "qform of nan spacing": _qform(pixdim=[1, 1, np.nan, 1, 0, 0, 0, 0]),
    "qform that is no turn": _qform(quatern_b=0.9, quatern_c=0.9, quatern_d=0.9),
    "qform of nan turn": _qform(quatern_b=np.nan),
    "nan intercept": _set(scl_slope=2, scl_inter=np.nan),
    "overflowing slope": _set(scl_slope=3e38, scl_inter=0),
    "metres": _set(xyzt_units=1),
    "microns": _set(xyzt_units=3),
    "header in two files": _set(magic=b"ni1"),
    "no magic": _set(magic=b"abc"),
    "wrong header size": _set(sizeof_hdr=347),
}


def bomb(front, count, length, tail=b""):
    """A gzip file of `front`, `count` MiB of zeros and `tail`, whose trailer declares `length` bytes; from repeated blocks."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = packer.compress(front) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    end = packer.compress(tail) + packer.flush()
    return b"\x1f\x8b\x08" + bytes(7) + start + block * count + end + struct.pack("<II", 0, length % 2**32)


def niftis():
    """(name, reader, bytes, suffix) of every malformed NIfTI."""
    body = volume().tobytes(order="F")
    good = _header() + body
    packed = gzip.compress(good, 6, mtime=0)
    for name, change in HEADERS.items():
        data = _header(change) + body
        yield f"nifti {name}", "ct", data, ".nii"
        yield f"nifti gz {name}", "ct", gzip.compress(data, 1, mtime=0), ".nii.gz"
    for count in (0, 1, 3, 100, 347, 352, 700, len(good) - 1):
        yield f"nifti cut to {count}", "ct", good[:count], ".nii"
    yield "nifti with more behind it", "ct", good + bytes(1000), ".nii"
    for count in (1, 2, 5, 10, 18, 60, len(packed) // 2, len(packed) - 8, len(packed) - 4, len(packed) - 1):
        yield f"gzip cut to {count}", "ct", packed[:count], ".nii.gz"
    for place in (3, 40, len(packed) // 2, len(packed) - 20, len(packed) - 6, len(packed) - 2):
        spoilt = bytearray(packed)
        spoilt[place] ^= 0x55
        yield f"gzip spoilt at {place}", "ct", bytes(spoilt), ".nii.gz"
    yield "gzip with rubbish behind it", "ct", packed + b"rubbish!", ".nii.gz"
    yield "gzip twice", "ct", gzip.compress(packed), ".nii.gz"
    yield "gzip of nothing", "ct", gzip.compress(b""), ".nii.gz"
    yield "bzip2", "ct", bz2.compress(good), ".nii.gz"
    yield "xz", "ct", lzma.compress(good), ".nii.gz"
    yield "text", "ct", b"HU " * 500, ".nii.gz"
    yield "zeros", "ct", bytes(5000), ".nii"
    second = _header(_dim(3, 10**6, 10**6, 10**6), kind=nibabel.Nifti2Image)
    yield "nifti 2 of 10^18 voxels", "ct", second + body, ".nii"
    overflow = _header(_dim(3, 2**62, 2**62, 4), kind=nibabel.Nifti2Image)
    yield "nifti 2 whose size overflows", "ct", overflow + body, ".nii"
    yield "nifti 2 of negative size", "ct", _header(_dim(3, -(2**40), 10, 8), kind=nibabel.Nifti2Image) + body, ".nii"

    thousand = 1000 * 2**20
    yield "bomb behind a small volume", "ct", bomb(good, 8000, len(good) + 8 * thousand), ".nii.gz"
    yield "bomb that lies about its length", "ct", bomb(good, 8000, len(good)), ".nii.gz"
    yield "bomb that says 30000^3", "ct", bomb(_header(HEADERS["30000^3"]), 8000, 2 * 30000**3 + 352), ".nii.gz"
    body_header = _header(_dim(3, 512, 512, 1500))
    claimed = 512 * 512 * 1500 * 2 + 352
    yield "bomb behind a whole body", "ct", bomb(body_header, 8000, claimed), ".nii.gz"
    yield "whole body cut off", "ct", bomb(body_header, 740, claimed), ".nii.gz"
    yield "whole body in too few bytes", "ct", bomb(body_header, 1, claimed), ".nii.gz"
    yield "whole body of a wrong checksum", "ct", bomb(body_header, 750, claimed), ".nii.gz"
    labels = _header(_dim(3, 512, 512, 1000), np.uint8)
    claimed = 512 * 512 * 1000 + 352
    yield "bomb behind a whole body's labels", "mask", bomb(labels, 8000, claimed), ".nii.gz"
    yield "whole body's labels cut off", "mask", bomb(labels, 245, claimed), ".nii.gz"
    yield "bomb as a mask", "scan", bomb(labels, 250, claimed), ".nii.gz"

    def mask(values, dtype, affine=AFFINE):
        return gzip.compress(nibabel.Nifti1Image(values.astype(dtype), affine).to_bytes(), 1)

    brick = np.zeros(SHAPE)
    brick[3:9, 3:7, 2:6] = 20
    half, one = brick * 1.02, brick.copy()
    one[0, 0, 0] = np.nan
    moved = AFFINE + 0.5 * np.eye(4)[:, [0]] * [[0, 0, 0, 1.0]]
    for name, data in {
        "empty mask": mask(np.zeros(SHAPE), np.uint8),
        "empty float mask": mask(np.zeros(SHAPE), np.float32),
        "mask between whole numbers": mask(half, np.float32),
        "mask of a nan": mask(one, np.float32),
        "mask of an infinity": mask(np.where(brick > 0, np.inf, 0), np.float64),
        "negative mask": mask(-brick, np.int16),
        "mask of 1000": mask(brick * 50, np.int16),
        "mask of unknown numbers": mask(brick * 3, np.uint8),
        "mask upside down": mask(np.where(np.arange(8) < 4, 20, 21) * np.ones(SHAPE), np.uint8),
        "mask on another grid": mask(brick, np.uint8, moved),
        "mask of another size": mask(brick[:-1], np.uint8),
    }.items():
        yield name, "scan", data, ".nii.gz"


def _encapsulated(dataset, syntax, frame):
    dataset.PixelData = pydicom.encaps.encapsulate([frame])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = syntax


def _jpeg_2000(dataset, rows=None):
    frame = bytearray(ct_files.jpeg_2000(dataset.pixel_array))
    place = frame.index(b"\xff\x51") + 6
    # The size in the codestream's own header, by which a decoder allocates.
    for offset in (0, 4, 16, 20):
        frame[place + offset : place + offset + 4] = struct.pack(">I", rows)
    _encapsulated(dataset, pydicom.uid.JPEG2000Lossless, bytes(frame))


def _jpeg(dataset, rows=None, cut=None):
    frame = bytearray(ct_files.jpeg_lossless(dataset.pixel_array))
    if rows:
        frame[7:9] = struct.pack(">H", rows)
    _encapsulated(dataset, pydicom.uid.JPEGLosslessSV1, bytes(frame[:cut]))


def _rle(dataset):
    dataset.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    dataset.PixelData = dataset.PixelData[:120]


def _deflated(path):
    """A dataset that inflates to 4 GB."""
    data = path.read_bytes()
    explicit, deflated = pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.DeflatedExplicitVRLittleEndian
    old = explicit.encode() + bytes(len(explicit) % 2)
    new = deflated.encode() + bytes(len(deflated) % 2)
    at = data.index(old)
    length = 140 + struct.unpack("<I", data[140:144])[0] + 4
    meta = bytearray(data[:at] + new + data[at + len(old) : length])
    meta[at - 2 : at] = struct.pack("<H", len(new))
    meta[140:144] = struct.pack("<I", len(meta) - 144)
    path.write_bytes(bytes(meta) + bomb(data[length:], 4000, 0)[10:-8])


DATASETS = {
    "no pixels": lambda d: d.pop("PixelData"),
    "empty pixels": lambda d: setattr(d, "PixelData", b""),
    "half the pixels": lambda d: setattr(d, "PixelData", d.PixelData[:1000]),
    "twice the pixels": lambda d: setattr(d, "PixelData", d.PixelData * 2),
    "no rows": lambda d: d.pop("Rows"),
    "zero columns": lambda d: setattr(d, "Columns", 0),
    "65535 rows": lambda d: setattr(d, "Rows", 65535),
    "7 bits": lambda d: setattr(d, "BitsAllocated", 7),
    "no syntax": lambda d: d.file_meta.pop("TransferSyntaxUID"),
    "100000 frames": lambda d: setattr(d, "NumberOfFrames", 100000),
    "unknown syntax": lambda d: _encapsulated(d, pydicom.uid.MPEG2MPML, b"\0\0\1\xb3" * 10),
    "cut JPEG": lambda d: _jpeg(d, cut=60),
    "headless JPEG": lambda d: _encapsulated(d, pydicom.uid.JPEGLosslessSV1, b"no JPEG at all, but some text"),
    "JPEG of 65000 rows": lambda d: _jpeg(d, rows=65000),
    "JPEG of 5 rows": lambda d: _jpeg(d, rows=5),
    "JPEG 2000 of 60000^2": lambda d: _jpeg_2000(d, rows=60000),
    "cut RLE": _rle,
    "text as position": lambda d: _text(d, "ImagePositionPatient", r"a\b\c"),
    "nan as spacing": lambda d: _text(d, "PixelSpacing", r"nan\nan"),
    "two positions": lambda d: _text(d, "ImagePositionPatient", r"1\2"),
    "infinite slope": lambda d: _text(d, "RescaleSlope", "1e999"),
}


def _text(dataset, name, text):
    """Replaces numbers by text, which pydicom does not write otherwise."""
    tag = pydicom.datadict.tag_for_keyword(name)
    del dataset[tag]
    dataset.add(pydicom.DataElement(tag, "LO", text.split("\\")))


def _relabel(path, name):
    """Changes the value representation LO that `_text` wrote back to DS."""
    tag = pydicom.datadict.tag_for_keyword(name)
    mark = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    path.write_bytes(path.read_bytes().replace(mark + b"LO", mark + b"DS"))


def dicom_series(root):
    """(name, folder) of DICOM series with one malformed slice."""
    for number, (name, change) in enumerate(DATASETS.items()):
        datasets = ct_files.slices()
        change(datasets[3])
        folder = root / f"dicom{number}"
        folder.mkdir()
        for k, dataset in enumerate(datasets):
            path = folder / f"{k}.dcm"
            if "TransferSyntaxUID" in dataset.file_meta:
                dataset.save_as(path, enforce_file_format=True)
            else:
                dataset.save_as(path, implicit_vr=False, little_endian=True)
            for field in ("ImagePositionPatient", "PixelSpacing", "RescaleSlope"):
                _relabel(path, field)
        yield f"dicom {name}", folder
    whole = ct_files.write_series(root / "whole", ct_files.slices(), shuffle=False)[3].read_bytes()
    for count in (50, 131, 140, 200, 400, 900, len(whole) - 1000, len(whole) - 1):
        folder = root / f"cut{count}"
        ct_files.write_series(folder, ct_files.slices(), shuffle=False)[3].unlink()
        (folder / "slice.dcm").write_bytes(whole[:count])
        yield f"dicom cut to {count}", folder
    folder = root / "deflated"
    _deflated(ct_files.write_series(folder, ct_files.slices(), shuffle=False)[3])
    yield "dicom deflated to 4 GB", folder
    (root / "nothing").mkdir()
    yield "dicom folder without files", root / "nothing"
