"""A pose as a DICOM Spatial Registration object (PS3.3 A.39.1), where the CT and the X-rays were DICOM.

The object establishes the C-arm's frame of reference, and registers that of the CT to it. The C-arm's UID is made here: the world
is the frame of the cameras, and nothing says that a FrameOfReferenceUID in an X-ray, which is patient-based, means the same frame.
highdicom has no class for this object, so that it is made of pydicom's elements.
"""

import datetime
import io
import pathlib
import typing
import warnings
from collections.abc import Iterable
from collections.abc import Sequence

import numpy as np
from absl import logging

from data_pipelines.io import files
from experiments.reports.verdicts import Verdict
from radgs_jax import __version__
from radgs_jax import errors
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry.xray import XRay

if typing.TYPE_CHECKING:
    import pydicom

PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
STUDY = ("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber")
"""What is taken from the CT: archives file the object by it. Nothing else about the patient is."""
NEEDED = ("FrameOfReferenceUID", "StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID")
"""Elements of the CT without which nothing can be registered to it."""
MAKER = "radgs_jax"
CONTENT_LABEL = "CT_TO_C_ARM"
DESCRIPTION_CHARACTERS = 64
"""Length of a text of DICOM's type LO."""


def write(
    path: pathlib.Path | str,
    ct_path: pathlib.Path | str,
    xrays: Sequence[XRay],
    world_from_ct: np.ndarray,
    level: str,
    verdict: Verdict,
) -> bool:
    """Writes the object where the CT and all X-rays are DICOM and the pose is not refused; says why where tags forbid it.

    Args:
      ct_path: a folder of one series, or a file.
      xrays: as they were read; those of `radiograph.read_views` know their files.
      world_from_ct: (4, 4), mm.
      level: the vertebra's name.
      verdict: on the pose; its headline is the object's description.
    Returns:
      Whether it was written.
    Raises:
      InputError: the place cannot be written.
    """
    xray_paths = [getattr(xray, "origin", {}).get("file") for xray in xrays]
    if verdict.accepted is False or not all(xray_paths) or not _holds_dicom(ct_path):
        return False
    from data_pipelines.ct import dicom_series  # here, since importing pydicom takes half a second
    from data_pipelines.xrays import dicom_pixels
    from data_pipelines.xrays import image_files

    if not all(map(image_files.is_dicom, xray_paths)):
        return False
    description, now, stream = f"{level}: {verdict.headline}", datetime.datetime.now(), io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about values of the CT that are repeated
            ct = dicom_series.read_headers(ct_path)
            seen = [dicom_pixels.read_header(pathlib.Path(xray_path))[0] for xray_path in xray_paths]
            made = registration(ct, seen, xrays, world_from_ct, description, now, str(ct_path))
            made.save_as(stream, enforce_file_format=True)
    except errors.InputError as error:
        logging.warning("no registration.dcm: %s", error)
        return False
    except Exception as error:  # pydicom raises various exceptions on damaged values
        logging.warning("no registration.dcm: %s: %s: %s", ct_path, type(error).__name__, error)
        return False
    with files.replacing(path) as temporary:
        temporary.write_bytes(stream.getvalue())
    return True


def _holds_dicom(path):
    path = pathlib.Path(path)
    return any(map(files.is_dicom, files.listed(path))) if path.is_dir() else files.is_dicom(path)


def registration(
    ct: Sequence["pydicom.Dataset"],
    seen: Sequence["pydicom.Dataset"],
    xrays: Sequence[XRay],
    world_from_ct: np.ndarray,
    description: str,
    now: datetime.datetime,
    ct_path: str = "CT",
) -> "pydicom.Dataset":
    """The object. Equal X-rays and cameras give the C-arm's frame one UID, whichever vertebra is registered.

    Args:
      ct: headers of the CT's files; seen: of the X-rays', in the order of `xrays`, whose cameras define the world.
      world_from_ct: (4, 4), between RAS axes, mm.
      description: one line about the pose.
      now: when it was made; ct_path: what errors name.
    Raises:
      InputError: the CT lacks an identifier, its files differ in one, or an X-ray is of another patient.
    """
    import pydicom
    from pydicom.sr.codedict import codes

    first = ct[0]
    for name in NEEDED:
        if not all(header.get(name) for header in ct):
            errors.fail(ct_path, name, "nothing", "an identifier in every file")
    if len({header.FrameOfReferenceUID for header in ct}) > 1:
        errors.fail(ct_path, "FrameOfReferenceUID", "several", "one in all files of the series")
    patients = {str(header.PatientID).strip().casefold() for header in (first, *seen) if header.get("PatientID")}
    if len(patients) > 1:
        errors.fail(ct_path, "PatientID", "another than in the X-rays", "the same patient's")
    made = pydicom.Dataset()
    if first.get("SpecificCharacterSet"):
        made.SpecificCharacterSet = first.SpecificCharacterSet
    with pydicom.config.disable_value_validation():  # what the CT says is repeated, even where it is too long
        for name in (*PATIENT, *STUDY):
            setattr(made, name, first.get(name, ""))
    made.ReferringPhysicianName = made.SeriesNumber = made.PositionReferenceIndicator = made.ContentCreatorName = ""
    made.Modality, made.SeriesInstanceUID = "REG", pydicom.uid.generate_uid()
    made.SeriesDescription, made.Manufacturer, made.SoftwareVersions = "CT to C-arm", MAKER, __version__
    made.SOPClassUID, made.SOPInstanceUID = pydicom.uid.SpatialRegistrationStorage, pydicom.uid.generate_uid()
    made.InstanceNumber, made.ContentLabel = 1, CONTENT_LABEL
    made.ContentDescription = description[:DESCRIPTION_CHARACTERS]
    made.ContentDate = made.SeriesDate = made.InstanceCreationDate = now.strftime("%Y%m%d")
    made.ContentTime = made.SeriesTime = made.InstanceCreationTime = now.strftime("%H%M%S")
    made.FrameOfReferenceUID = _world_uid(seen, xrays)
    to_itself = _item(made.FrameOfReferenceUID, np.eye(4), codes.DCM.FrameOfReferenceIdentity)
    of_ct = _item(
        first.FrameOfReferenceUID, rigid_host.between_lps(world_from_ct), codes.DCM.ImageContentBasedAlignment
    )
    of_ct.ReferencedImageSequence = [_reference(header) for header in ct]
    made.RegistrationSequence = [to_itself, of_ct]
    _add_references(made, [*ct, *seen])
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    return made


def _world_uid(seen, xrays):
    """UID of the cameras' frame, from the X-rays and their cameras."""
    import pydicom

    cameras = [
        np.asarray(value, np.float64) for x in xrays for value in (x.camera.intrinsics, x.camera.camera_from_world)
    ]
    named = [str(header.get("SOPInstanceUID", "")) for header in seen]
    return pydicom.uid.generate_uid(entropy_srcs=[*named, *(array.tobytes().hex() for array in cameras)])


def _item(uid, matrix, kind):
    """An item of the RegistrationSequence: `matrix` (4, 4) takes LPS points, mm, of the frame `uid` to the object's own frame."""
    import pydicom

    numbers = pydicom.Dataset()
    numbers.FrameOfReferenceTransformationMatrix = [
        pydicom.valuerep.DSfloat(float(v), auto_format=True) for v in np.ravel(matrix)
    ]
    numbers.FrameOfReferenceTransformationMatrixType = "RIGID"
    code = pydicom.Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = kind.value, kind.scheme_designator, kind.meaning
    registered = pydicom.Dataset()
    registered.MatrixSequence, registered.RegistrationTypeCodeSequence = [numbers], [code]
    item = pydicom.Dataset()
    item.FrameOfReferenceUID, item.MatrixRegistrationSequence = uid, [registered]
    return item


def _reference(header):
    import pydicom

    item = pydicom.Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
    return item


def _add_references(made, headers: Iterable["pydicom.Dataset"]):
    """Lists images by series (C.12.2): those of the object's study, and those of others. What has no identifiers is left out."""
    import pydicom

    studies = {}
    for header in headers:
        if all(header.get(name) for name in NEEDED[1:]):
            series = studies.setdefault(header.StudyInstanceUID, {}).setdefault(header.SeriesInstanceUID, {})
            series[header.SOPInstanceUID] = _reference(header)
    others = []
    for study, found in studies.items():
        holder = made if study == made.StudyInstanceUID else pydicom.Dataset()
        holder.ReferencedSeriesSequence = []
        for uid, images in found.items():
            series = pydicom.Dataset()
            series.SeriesInstanceUID, series.ReferencedInstanceSequence = uid, list(images.values())
            holder.ReferencedSeriesSequence.append(series)
        if holder is not made:
            holder.StudyInstanceUID = study
            others.append(holder)
    if others:
        made.StudiesContainingOtherReferencedInstancesSequence = others
