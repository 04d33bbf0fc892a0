"""CT files for the tests: a scan whose HU are a function of place, as DICOM slices or NIfTI, at any orientation."""

import io
import struct

import nibabel
import numpy as np
import pydicom
import pydicom.dataset
import pydicom.uid
from PIL import Image
from scipy.spatial.transform import Rotation

SIZE = (37, 33, 6)
"""Columns, rows, slices: all different."""
SPACING = (0.6, 0.8, 2.5)
"""mm along a row, along a column, and from slice to slice: all different."""
OBLIQUE = Rotation.from_euler("xyz", [8.0, -13.0, 21.0], degrees=True).as_matrix()
"""The slices' axes in LPS, oblique about all three."""
CORNER = np.array([-31.0, 47.0, -285.0])
"""Centre of the first voxel, LPS mm, far off the origin."""


def hu_at(points):
    """HU at RAS points (..., 3): another slope along every axis, so that no two axes can be mixed up."""
    return 40.0 + np.asarray(points) @ [3.0, -7.0, 2.0]


def lps_points(axes=OBLIQUE, corner=CORNER):
    """(columns, rows, slices, 3) LPS mm of all voxel centres, by the standard's own equation (C.7.6.2.1-1)."""
    i, j, k = np.meshgrid(*[np.arange(n) for n in SIZE], indexing="ij")
    return sum(n[..., None] * s * axes[:, a] for a, (n, s) in enumerate(zip((i, j, k), SPACING))) + corner


def slices(axes=OBLIQUE, corner=CORNER):
    """A list of DICOM datasets, one a slice, each with a rescale slope and intercept of its own."""
    points = lps_points(axes, corner)
    hu = hu_at(points * [-1, -1, 1])
    made, series, frame = [], pydicom.uid.generate_uid(), pydicom.uid.generate_uid()
    for k in range(SIZE[2]):
        slope, intercept = (0.25, 0.5, 1.0)[k % 3], -1024.0 - k
        d = pydicom.dataset.Dataset()
        d.file_meta = pydicom.dataset.FileMetaDataset()
        d.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID = pydicom.uid.CTImageStorage
        d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID = pydicom.uid.generate_uid()
        d.Modality, d.SeriesInstanceUID, d.FrameOfReferenceUID = "CT", series, frame
        d.ImageType, d.PatientID, d.SeriesDescription = ["ORIGINAL", "PRIMARY", "AXIAL"], "p", "bone"
        # Numbers and names run against the positions, as some archives leave them.
        d.InstanceNumber = SIZE[2] - k
        d.ImagePositionPatient = [f"{v:.6f}" for v in points[0, 0, k]]
        d.ImageOrientationPatient = [f"{v:.9f}" for v in axes[:, :2].T.ravel()]
        d.PixelSpacing = [SPACING[1], SPACING[0]]
        d.RescaleSlope, d.RescaleIntercept, d.RescaleType = slope, intercept, "HU"
        d.Rows, d.Columns, d.SamplesPerPixel, d.PhotometricInterpretation = SIZE[1], SIZE[0], 1, "MONOCHROME2"
        d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 0
        d.PixelData = np.rint((hu[:, :, k].T - intercept) / slope).astype("<u2").tobytes()
        made.append(d)
    return made


def write_series(folder, datasets, shuffle=True):
    """Writes datasets as files whose names do not follow the positions; returns the paths in the datasets' order."""
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(5).permutation(len(datasets)) if shuffle else range(len(datasets))
    paths = [folder / f"I{number:03d}" for number in order]
    for path, dataset in zip(paths, datasets):
        dataset.save_as(path, enforce_file_format=True)
    return paths


def enhanced():
    """The same scan as one multi-frame Enhanced CT, its frames out of order."""
    single = slices()
    order = [2, 0, 5, 1, 4, 3]
    d = pydicom.dataset.Dataset()
    d.file_meta = single[0].file_meta
    d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID = pydicom.uid.EnhancedCTImageStorage
    for name in (
        "SOPInstanceUID Modality SeriesInstanceUID ImageType Rows Columns SamplesPerPixel PhotometricInterpretation"
        " BitsAllocated BitsStored HighBit PixelRepresentation"
    ).split():
        setattr(d, name, getattr(single[0], name))
    d.NumberOfFrames = len(order)
    measures, plane = pydicom.Dataset(), pydicom.Dataset()
    measures.PixelSpacing, plane.ImageOrientationPatient = single[0].PixelSpacing, single[0].ImageOrientationPatient
    shared = pydicom.Dataset()
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    d.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for k in order:
        place, values, group = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        place.ImagePositionPatient = single[k].ImagePositionPatient
        values.RescaleSlope, values.RescaleIntercept = single[k].RescaleSlope, single[k].RescaleIntercept
        values.RescaleType = "HU"
        group.PlanePositionSequence, group.PixelValueTransformationSequence = [place], [values]
        groups.append(group)
    d.PerFrameFunctionalGroupsSequence = groups
    d.PixelData = b"".join(single[k].PixelData for k in order)
    return d


def jpeg_lossless(image):
    """A lossless JPEG (process 14, first-order prediction) of a (rows, columns) uint16 image, per ITU-T T.81 annex H."""
    rows, columns = image.shape
    values = image.astype(np.int64)
    left = np.empty_like(values)
    left[:, 1:] = values[:, :-1]
    left[1:, 0], left[0, 0] = values[:-1, 0], 2**15
    bits = []
    for difference in (values - left).ravel():
        difference = (difference + 2**15) % 2**16 - 2**15
        category = int(abs(difference)).bit_length()
        # Every category has the five-bit code of its own number.
        bits.append(f"{category:05b}")
        if 0 < category < 16:
            low = difference if difference > 0 else difference + 2**category - 1
            bits.append(f"{low:0{category}b}")
    stream = "".join(bits)
    stream += "1" * (-len(stream) % 8)
    data = int(stream, 2).to_bytes(len(stream) // 8, "big").replace(b"\xff", b"\xff\0")
    table = bytes([0] + [0] * 4 + [17] + [0] * 11 + list(range(17)))
    return (
        b"\xff\xd8"
        + b"\xff\xc3" + struct.pack(">HBHHB3B", 11, 16, rows, columns, 1, 1, 0x11, 0)
        + b"\xff\xc4" + struct.pack(">H", 2 + len(table)) + table
        + b"\xff\xda" + struct.pack(">HB2B3B", 8, 1, 1, 0, 1, 0, 0)
        + data
        + b"\xff\xd9"
    )  # fmt: skip


def nifti_affine(axes=OBLIQUE, corner=CORNER):
    """RAS affine of the same voxels."""
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes * SPACING, corner
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def write_nifti(path, array, affine, codes):
    """Writes an array stored along the axis codes `codes`, as any scanner might leave it."""
    image = nibabel.Nifti1Image(array, affine)
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(codes))
    nibabel.save(image.as_reoriented(turn), path)
    return path


def jpeg_2000(image):
    """A lossless JPEG 2000 codestream of a 16-bit image."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG2000", no_jp2=True, irreversible=False)
    return stream.getvalue()
