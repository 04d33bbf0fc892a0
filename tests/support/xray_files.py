"""Valid X-ray and calibration files as bytes, for tests that read or damage them."""

import io
import json

import nibabel
import numpy as np
import pydicom
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian

from data_pipelines.xrays import radiograph

SHAPE = (40, 56)
"""(height, width) of `pixels`."""
AIR = 4000.0
"""Air value that gives `expected`."""
XA = radiograph.ReadOptions(air=AIR, collimator=False)


def pixels(shape=SHAPE):
    """A 12-bit image without two equal rows or columns."""
    v, u = np.mgrid[: shape[0], : shape[1]]
    return (300 + 31 * v + 17 * u + 5 * ((u * v) % 7)).astype(np.uint16)


def dicom(syntax=ExplicitVRLittleEndian, **tags):
    """A valid XA image; a tag of None is left out."""
    header = pydicom.Dataset()
    header.SOPClassUID, header.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.12.1", "1.2.3.4"
    values = {
        "Modality": "XA",
        "Rows": SHAPE[0],
        "Columns": SHAPE[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "PixelIntensityRelationship": "LIN",
        "ImagerPixelSpacing": [0.2, 0.3],
        "DistanceSourceToDetector": 1100.0,
        "DistanceSourceToPatient": 700.0,
        "PositionerPrimaryAngle": 10.0,
        "PositionerSecondaryAngle": -5.0,
        "PixelData": pixels().tobytes(),
        **tags,
    }
    for name, value in values.items():
        if value is not None:
            setattr(header, name, value)
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = syntax
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    if "PixelData" in header:
        header["PixelData"].VR = "OB" if syntax.is_encapsulated else "OW"
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, header, enforce_file_format=True)
    return stream.getvalue()


def encapsulated(syntax, frame, **tags):
    return dicom(syntax, PixelData=pydicom.encaps.encapsulate([frame]), **tags)


def patched(data, at, new):
    return data[:at] + new + data[at + len(new) :]


def projection():
    """K (3, 3), E (4, 4) and P (3, 4) of a camera, mm and pixels."""
    c, s = np.cos(0.3), np.sin(0.3)
    E = np.eye(4)
    E[:3] = [[c, 0, -s, 4], [0, 1, 0, -6], [s, 0, c, 700]]
    K = np.array([[3600.0, 0, 27], [0, 5400.0, 19], [0, 0, 1]])
    return K, E, K @ E[:3]


def png(image, **save):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", **save)
    return stream.getvalue()


def saved(picture, kind, **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def nifti(array):
    return nibabel.Nifti1Image(array, np.diag([0.3, 0.2, 1.0, 1.0])).to_bytes()


def expected(air=AIR):
    """Line integrals of `pixels`."""
    return -np.log(pixels() / air)


def written(tmp_path, name, data):
    """Writes bytes, or a value as JSON; returns the path."""
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return path


def read_dicom(tmp_path, options=XA, calibration=None, **tags):
    """Reads the valid DICOM image with changed tags."""
    return radiograph.read(written(tmp_path, "xray.dcm", dicom(**tags)), calibration, options)
