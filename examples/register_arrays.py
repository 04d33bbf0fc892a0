"""Registers one vertebra of a phantom from arrays: a CT, its labels, two X-rays and their cameras."""

import numpy as np

from data_pipelines.ct.scans import Scan
from data_pipelines.phantom.generate import make_phantom
from data_pipelines.phantom.generate import PhantomConfig
from data_pipelines.simulation import carm
from data_pipelines.simulation import quick
from experiments.patients import models
from experiments.patients import untrained
from experiments.patients import workdir
from radgs_jax import attenuation
from radgs_jax import Camera
from radgs_jax import metrics
from radgs_jax import register
from radgs_jax import XRay
from radgs_jax.geometry import rigid_host

phantom = make_phantom(7, PhantomConfig(spacing_mm=(1.5, 1.5, 2.0), levels=(20, 21, 22, 23, 24)))
scan = Scan("phantom", phantom.hu.astype(np.float32), phantom.mask, phantom.affine)
base = models.base_folder()
prepared = untrained.prepare_untrained(
    models.load_model(base), scan, label=22, rule=workdir.read_rule(base / workdir.CALIBRATION)
)

# Two X-rays, AP and lateral, of the patient at a pose that the registration does not know.
centre = prepared.vertebra.ct_from_box[:3, 3]
truth = carm.sample_world_from_ct(np.random.default_rng(0), centre)
cameras = [
    Camera(carm.intrinsics(carm.CArm(), 4), carm.extrinsics(angle, 0.0, 700.0), 244, 244) for angle in (0.0, 90.0)
]
views = np.stack([c.intrinsics for c in cameras]), np.stack([c.camera_from_world for c in cameras])
images = quick.render(attenuation.from_hounsfield(scan.hu), scan.ct_from_index, truth, *views, (244, 244), step_mm=1.0)

# A start pose 10 mm off, and the registration.
start = rigid_host.motion_about(truth[:3, :3] @ centre + truth[:3, 3], [0.05, -0.1, 0.08, 6.0, -5.0, 4.0]) @ truth
outcome = register(prepared, [XRay(image, None, camera) for image, camera in zip(images, cameras)], start)

points = prepared.vertebra.points
print(f"mTRE {metrics.mtre(points, start, truth):.2f} -> {metrics.mtre(points, outcome.world_from_ct, truth):.2f} mm")
print(f"accepted: {outcome.confidence.accepted}, within {outcome.confidence.uncertainty_mm:.2f} mm")
