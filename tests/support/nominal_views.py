"""X-rays as XA files with a C-arm's nominal geometry in their tags."""

import numpy as np
import xray_files

from data_pipelines.simulation import carm
from radgs_jax.geometry.xray import XRay

SOURCE_DETECTOR_MM, AIR = 1124.0, 60000.0


def _angles(camera_from_world):
    """DICOM's primary and secondary angle, degrees, and the distance from source to isocentre, mm, of a camera without roll."""
    z, distance = camera_from_world[2, :3], camera_from_world[2, 3]
    secondary, primary = np.degrees(-np.arcsin(z[2])), np.degrees(np.arctan2(z[0], -z[1]))
    np.testing.assert_allclose(carm.extrinsics(primary, secondary, distance), camera_from_world, atol=1e-6)
    return primary - 180.0, -secondary, distance


def xa(xray: XRay, rng: np.random.Generator, off_deg: float, off_mm: float) -> bytes:
    """An XA file of an X-ray whose angles are each off by `off_deg` and whose distances are each off by `off_mm`."""
    primary, secondary, distance = _angles(np.asarray(xray.camera.camera_from_world))
    signal = np.round(AIR * np.exp(-np.maximum(np.asarray(xray.line_integrals, np.float64), 0.0))).astype(np.uint16)
    off = rng.choice([-1.0, 1.0], 4) * [off_deg, off_deg, off_mm, off_mm]
    height, width = signal.shape
    pixel_mm = float(SOURCE_DETECTOR_MM / xray.camera.intrinsics[0])
    return xray_files.dicom(
        Rows=height,
        Columns=width,
        BitsStored=16,
        HighBit=15,
        SOPInstanceUID=f"1.2.3.{rng.integers(1, 10**9)}",
        # XA files are stored as an observer who faces the patient sees them.
        PixelData=np.ascontiguousarray(signal[:, ::-1]).tobytes(),
        ImagerPixelSpacing=[pixel_mm, pixel_mm],
        DistanceSourceToDetector=float(SOURCE_DETECTOR_MM + off[2]),
        DistanceSourceToPatient=float(distance + off[3]),
        PositionerPrimaryAngle=float((primary + off[0] + 180.0) % 360.0 - 180.0),
        PositionerSecondaryAngle=float(secondary + off[1]),
    )
