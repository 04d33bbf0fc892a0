"""ITK's two-projection registration as a process; `itk_peer` runs it under a Python that has itk-twoprojectionregistration.

    python -I experiments/comparison/itk_script.py

It prints one line of JSON when it is ready, then answers each line of its standard input, ["GIVEN.npz", "ANSWER.npz"], with one
line: {"cpu_s": CPU seconds} once ANSWER is written, or {"error": why there is none}.

GIVEN has these arrays; `itk_peer` says what ITK's frames are. Lengths are in mm, angles in radians.
  images       (2, H, W) float32, what is compared with projections; no unit.
  valid        (2, H, W) bool, pixels that count.
  direction    (2, 3, 3), unit vectors along columns of pixels, along rows, and away from the source, as columns, in the frame of
               the view's source.
  origin       (2, 3), the first pixel's centre there; spacing (2, 3), distances of pixels along their axes.
  angle        (2,), of the view around the isocentre; distance (2,), from its source to the isocentre.
  volume       (X, Y, Z) float32, 1/mm; voxel (3,), the voxels' size.
  centre       (3,), of rotation, from the volume's first corner; it is at the isocentre where the translation is 0.
  start        (6,), angles about x, y and z, applied in this order, and translation.

ANSWER has:
  rotation     (3, 3) and translation (3,): centre + translation + rotation (y - centre) is where the point y of the volume is.
  correlation  (2,), mean correlation of both images with the projections, at the start and at the end.
"""

import json
import os
import sys
import time
from typing import Any

import numpy as np

# What follows is ITK's own example, TwoProjection2D3DRegistration.cxx, with 1 degree as large as 1 mm.
ITERATIONS, LINE_ITERATIONS = 10, 4
"""Most iterations of Powell's method, and of the search along a line."""
STEP, STEP_TOLERANCE = 4.0, 0.02
"""First step along a line and the smallest one, mm or degrees."""
VALUE_TOLERANCE = 0.001
"""Relative change of the correlation in an iteration at which the search ends."""


def register(itk: Any, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of ANSWER by name, of those of GIVEN; itk: the package."""
    kind = itk.Image[itk.F, 3]
    transform = itk.Euler3DTransform[itk.D].New()
    # Rotations about z, y and x are multiplied in this order, as in the projector.
    transform.SetComputeZYX(True)
    transform.SetCenter(given["centre"].tolist())
    transform.SetParameters(itk.OptimizerParameters[itk.D](given["start"].tolist()))
    metric = itk.NormalizedCorrelationTwoImageToOneImageMetric[kind, kind].New()
    metric.ComputeGradientOff()
    metric.SetSubtractMean(True)
    optimizer = itk.PowellOptimizer.New()
    optimizer.SetMaximize(False)
    optimizer.SetMaximumIteration(ITERATIONS)
    optimizer.SetMaximumLineIteration(LINE_ITERATIONS)
    optimizer.SetStepLength(STEP)
    optimizer.SetStepTolerance(STEP_TOLERANCE)
    optimizer.SetValueTolerance(VALUE_TOLERANCE)
    optimizer.SetScales(itk.OptimizerParameters[itk.D]([180.0 / np.pi] * 3 + [1.0] * 3))
    registration = itk.TwoProjectionImageRegistrationMethod[kind, kind].New()
    registration.SetMetric(metric)
    registration.SetOptimizer(optimizer)
    registration.SetTransform(transform)
    # ITK's arrays are indexed z, y, x.
    moving = itk.image_from_array(np.ascontiguousarray(given["volume"].T))
    moving.SetSpacing(given["voxel"].tolist())
    registration.SetMovingImage(moving)
    kept = []  # what ITK does not keep alive itself
    for view in (0, 1):
        image, mask = (
            itk.image_from_array(np.ascontiguousarray(given[name][view][None].astype(dtype)))
            for name, dtype in (("images", np.float32), ("valid", np.uint8))
        )
        for one in (image, mask):
            one.SetDirection(itk.matrix_from_array(np.ascontiguousarray(given["direction"][view])))
            one.SetOrigin(given["origin"][view].tolist())
            one.SetSpacing(given["spacing"][view].tolist())
        projector = itk.SiddonJacobsRayCastInterpolateImageFunction[kind, itk.D].New()
        projector.SetProjectionAngle(float(given["angle"][view]))
        projector.SetFocalPointToIsocenterDistance(float(given["distance"][view]))
        # It integrates what exceeds the threshold.
        projector.SetThreshold(0.0)
        projector.SetTransform(transform)
        projector.Initialize()
        number = view + 1
        getattr(registration, f"SetFixedImage{number}")(image)
        getattr(registration, f"SetInterpolator{number}")(projector)
        kept.append((image, projector))
        if not given["valid"][view].all():
            inside = itk.ImageMaskSpatialObject[3].New()
            inside.SetImage(mask)
            inside.Update()
            getattr(metric, f"SetFixedImageMask{number}")(inside)
            kept.append((mask, inside))
    registration.SetInitialTransformParameters(transform.GetParameters())
    registration.Initialize()
    first = metric.GetValue(transform.GetParameters())
    registration.StartRegistration()
    last = metric.GetValue(registration.GetLastTransformParameters())
    return {
        "rotation": itk.array_from_matrix(transform.GetMatrix()),
        "translation": np.array(list(transform.GetTranslation())),
        "correlation": -np.array([first, last]),
    }


def main() -> None:
    """Answers until standard input ends."""
    # Only answers are written to the standard output that the caller reads; ITK's own messages go to the other one.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        # ITK is no dependency: it is in another Python.
        import itk

        # Loading it takes seconds, which are no part of a case's time.
        itk.TwoProjectionImageRegistrationMethod.keys()
    except (ImportError, AttributeError) as error:
        print(json.dumps({"missing": str(error)}), file=answers)
        return
    print(json.dumps({"itk": itk.__version__}), file=answers)
    for line in sys.stdin:
        begin = time.process_time()
        try:
            source, target = json.loads(line)
            with np.load(source, allow_pickle=False) as given:
                found = register(itk, dict(given))
            temporary = f"{target}.part"
            with open(temporary, "wb") as stream:
                np.savez(stream, **found)
            os.replace(temporary, target)
            said = {"cpu_s": time.process_time() - begin}
        except Exception as error:  # whatever it is, the caller says it
            said = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(said), file=answers)


if __name__ == "__main__":
    main()
