"""Registration of one case: the network's passes, the refinement, wider searches where needed, and the verdict."""

import dataclasses
import functools
import os
from collections.abc import Callable
from collections.abc import Sequence
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from jaxtyping import Float

from kernels.common.types import Array
from radgs_jax import gaussians
from radgs_jax import levels
from radgs_jax.gaussians import Gaussians
from radgs_jax.geometry import distortion
from radgs_jax.geometry import rigid_host
from radgs_jax.geometry.xray import XRay
from radgs_jax.levels import FIRST_BONE
from radgs_jax.models import metal
from radgs_jax.registration import confidence
from radgs_jax.registration import gauss_newton
from radgs_jax.registration import joint
from radgs_jax.registration import overview
from radgs_jax.registration import plausibility
from radgs_jax.registration import prepared as preparing
from radgs_jax.registration import search as searching
from radgs_jax.registration.bodies import bodies_of
from radgs_jax.registration.confidence import Confidence
from radgs_jax.registration.gauss_newton import RefineConfig
from radgs_jax.registration.gauss_newton import Refined
from radgs_jax.registration.joint import Together
from radgs_jax.registration.parts import Parts
from radgs_jax.registration.passes import run_network
from radgs_jax.registration.prepared import Prepared
from radgs_jax.registration.prepared import Vertebra
from radgs_jax.registration.programs import Compile
from radgs_jax.registration.programs import Programs
from radgs_jax.registration.programs import programs_of
from radgs_jax.registration.pyramid import make_pyramid

NETWORK_REACH_MM = 40.0
"""A network's pose farther than this from the start pose is not followed, mm. Starts are some centimetres off at most, and a
network that is thrown off ends 70 to 110 mm away. Half would not follow it from distant starts; twice follows some of those."""

MAX_CORRECTIONS = 3
"""How often views are corrected at most: once more where the pose has moved away from where they were corrected."""
MEDIAN_PIXELS = 50_000
"""About how many pixels of an X-ray its median is taken of; a tenth or ten times as many give the same answer."""


@dataclasses.dataclass(frozen=True)
class RegisterOptions:
    """What is done in a registration.

    Attributes:
      passes: of the network, 1 or more.
      refine: refine the pose against the X-rays, without which the network's is the answer and nothing is judged.
      reconstruct: also run the network where its pose is not needed, and reconstruct the vertebra at the pose that was found.
      camera_sd: root mean square angle of turn, rad, and length of shift, mm, of the cameras' errors. With (0, 0) they are right;
        otherwise they are corrected from how the views disagree, and the rest of their error is in the covariance.
      distortion_sd: size of the X-rays' radial distortion, as the relative displacement at the field's border; likewise fitted.
    """

    passes: int = 5
    refine: bool = True
    reconstruct: bool = False
    camera_sd: tuple[float, float] = (0.0, 0.0)
    distortion_sd: float = 0.0

    @property
    def corrects(self) -> bool:
        """Whether the views are corrected."""
        return any(self.camera_sd) or self.distortion_sd > 0


@dataclasses.dataclass(frozen=True)
class Reconstructed:
    """What the network sees and makes at the pose that was found.

    Attributes:
      gaussians: the reconstruction in the world frame.
      crops: (V, h, w) the X-rays as it saw them, with intrinsics (V, 4).
      attention: (V, h', w') mean attention; activity: of the features that it weighs, as in `recm.Reconstruction`.
    """

    gaussians: Gaussians
    crops: Float[Array, "views height width"]
    intrinsics: Float[Array, "views 4"]
    attention: Float[Array, "views cells_v cells_u"]
    activity: Float[Array, "views cells_v cells_u"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What registering a case gives.

    Attributes:
      world_from_ct: (4, 4) the estimate, mm, float64.
      trajectory: (poses, 4, 4) world_from_ct: the start; where the network was asked for, after each of its passes; the estimate.
      camera_from_world: (V, 4, 4) the cameras, corrected where that was asked for.
      refined: the refinement in numpy; None without one.
      confidence: the verdict; None without a refinement or without an acceptance rule.
      together: what the views were corrected by, and the pose again; None where they are taken for right.
      as_calibrated: (4, 4) world_from_ct that was found with the views as they are given.
      counted: of each view, (H, W) bool, the pixels that were used: valid, and without metal.
      reconstructed: None where it was not asked for.
    """

    world_from_ct: Float[Array, "4 4"]
    trajectory: Float[Array, "poses 4 4"]
    camera_from_world: Float[Array, "views 4 4"]
    refined: Refined | None
    confidence: Confidence | None
    together: Together | None
    as_calibrated: Float[Array, "4 4"]
    counted: tuple[Bool[Array, "_ _"], ...]
    reconstructed: Reconstructed | None


def register(
    prepared: Prepared,
    xrays: Sequence[XRay],
    start: Float[Array, "4 4"],
    options: RegisterOptions = RegisterOptions(),
    compile: Compile = jax.jit,
) -> Outcome:
    """Finds the pose of a prepared vertebra in X-rays.

    Nothing else enters: the result is a function of these arguments.

    Args:
      xrays: one or more views, with cameras in one world frame; start: world_from_ct (4, 4), mm, some centimetres off at most.
      compile: what turns the functions of a registration into programs, with the signature of `jax.jit`. A command hands in
        one that keeps programs on disk.
    """
    vertebra = prepared.vertebra
    xrays = without_metal(prepared, xrays, compile)
    start_box = start @ vertebra.ct_from_box
    network = functools.cache(functools.partial(_network_passes, prepared, xrays, start_box, options.passes, compile))
    boxes, refined, judged, together = [], None, None, None
    if options.reconstruct or not options.refine:
        boxes += list(network().trajectory[1:])
    box_from_ct, calibrated = np.linalg.inv(vertebra.ct_from_box), None
    if options.refine:
        # Views that are off refuse right poses, so that nothing is judged, or searched for any wider, before they are corrected.
        first = dataclasses.replace(prepared, rule=None) if options.corrects else prepared

        def estimates():
            # The network knows vertebrae; of another bone its pose says nothing.
            if vertebra.label > FIRST_BONE:
                return []
            estimate = network().world_from_box
            near = np.linalg.norm(estimate[:3, 3] - start_box[:3, 3]) <= NETWORK_REACH_MM
            return [estimate] if near else []

        refined, judged = refine_until_trusted(first, xrays, start_box, estimates, compile)
        calibrated = rigid_host.nearest_rigid(np.asarray(refined.world_from_box, np.float64)) @ box_from_ct
        if options.corrects:
            given = xrays
            near_mm = gauss_newton.DISTINCT_MM + options.camera_sd[1]
            for attempt in range(MAX_CORRECTIONS):
                before = refined.world_from_box[:3, 3]
                together = correct_views(prepared, given, refined, options, compile)
                xrays = corrected(given, together)
                again = together.world_from_ct[0] @ vertebra.ct_from_box
                refined, judged = refine_until_trusted(prepared, xrays, again, lambda: [start_box], compile, together)
                # Views that were corrected at a pose that was left behind are corrected anew at the better one.
                moved_mm = np.linalg.norm(refined.world_from_box[:3, 3] - before)
                if moved_mm < near_mm or attempt == MAX_CORRECTIONS - 1:
                    break
                as_given, _ = refine_until_trusted(first, given, refined.world_from_box, list, compile)
                calibrated = rigid_host.nearest_rigid(np.asarray(as_given.world_from_box, np.float64)) @ box_from_ct
                refined = as_given
        boxes.append(refined.world_from_box)
    poses = [start, *(rigid_host.nearest_rigid(T) @ box_from_ct for T in np.asarray(boxes, np.float64))]
    seen = None
    if options.reconstruct:
        result = _network_passes(prepared, xrays, boxes[-1], 1, compile) if options.refine else network()
        seen = Reconstructed(
            _reconstruction(programs_of(compile), prepared, result, options.refine),
            result.xrays,
            result.intrinsics,
            result.reconstruction.attention[0].mean(-1),
            result.reconstruction.activity[0],
        )
    return Outcome(
        poses[-1],
        np.stack(poses),
        np.stack([xray.camera.camera_from_world for xray in xrays]),
        refined,
        judged,
        together,
        poses[-1] if calibrated is None else calibrated,
        tuple(np.asarray(xray.valid) for xray in xrays),
        seen,
    )


def _network_passes(prepared, xrays, world_from_box, passes, compile):
    """The network's `Registration` after some passes from a pose."""
    model, programs = prepared.model, programs_of(compile)
    seen = make_pyramid(xrays, [model.config.pixel_mm])
    return run_network(programs, model, seen, world_from_box, prepared.vertebra.cloud, passes)


def _reconstruction(programs: Programs, prepared, result, refined):
    """The reconstruction of a network's pass in the world frame; refined: as `registered` in `reconstruct.as_bone`."""
    if prepared.model.config.head == "anchored":
        matches = result.reconstruction.matches
        effect = programs.as_bone(prepared.vertebra.cloud, prepared.fine_cloud, matches, registered=refined)
    else:
        effect = jax.tree.map(lambda a: a[0], result.reconstruction.effect)
    return jax.block_until_ready(programs.move(effect, result.trajectory[-2]))


def warm_up(
    prepared: Prepared,
    xrays: Sequence[XRay],
    options: RegisterOptions = RegisterOptions(),
    compile: Compile = jax.jit,
) -> None:
    """Compiles or loads the programs that `register` needs for a case, unless it needs a wider search; registers nothing."""
    programs = programs_of(compile)
    vertebra, config = prepared.vertebra, prepared.refine
    xrays = without_metal(prepared, xrays, compile)
    # As many at a time as there are cores: a compilation takes a third of a gigabyte.
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiling = []
        if options.refine:
            seen = make_pyramid(xrays, [level.pixel_mm for level in config.levels])
            # One start at every level, and the coarsest also with two: the places of neighbours.
            for level, views in zip((config.levels[0], *config.levels), (seen.levels[0], *seen.levels)):
                count = 2 if not compiling else 1
                arguments, static = gauss_newton.level_arguments(
                    prepared.parts,
                    views,
                    seen.camera_from_world,
                    np.stack([[vertebra.ct_from_box] * 2] * count),
                    level,
                    config,
                )
                compiling.append(pool.submit(programs.refine_level.lower(*arguments, **static).compile))
        if options.reconstruct or not options.refine:
            # XLA compiles or loads these while the network runs.
            result = _network_passes(prepared, xrays, vertebra.ct_from_box, 1, compile)
            _reconstruction(programs, prepared, result, options.refine)
        for program in compiling:
            program.result()


def refine_until_trusted(
    prepared: Prepared,
    xrays: Sequence[XRay],
    start: Float[Array, "4 4"],
    estimates: Callable[[], Sequence[Float[Array, "4 4"]]] = list,
    compile: Compile = jax.jit,
    together: Together | None = None,
) -> tuple[Refined, Confidence | None]:
    """Refines a pose, with a wider search where the answer is not trusted.

    Without an acceptance rule nothing is judged, and the first refinement that fits is the answer.

    Args:
      start: world_from_box; estimates: gives others to search from, such as the network's.
      together: what corrected the X-rays, whose errors are then known.
    """
    rule, vertebra = prepared.rule, prepared.vertebra
    parts, programs = parts_in(prepared, xrays), programs_of(compile)
    seen = make_pyramid(xrays, [level.pixel_mm for level in prepared.refine.levels])
    judged, cameras = None, [xray.camera for xray in xrays]
    of_cameras = None
    if together is not None and rule is not None:
        # With what pixels and views disagree about: a body that has bent is also taken for cameras that are off.
        of_cameras = joint.covariance(together)[:6, :6]

    def wider_starts():
        return [*estimates(), *wide_starts(programs, parts, xrays, start, prepared.refine, prepared.search)]

    found = searching.searches(
        programs, parts, seen, start, wider_starts, prepared.refine, prepared.search, vertebra.label
    )
    for count, refined in enumerate(found):
        if rule is None:
            if refined.fit[-1] >= prepared.search.promising:
                break
            continue
        centre = np.asarray(refined.world_from_box[:3, 3], np.float64)
        angle = confidence.view_angle(np.stack([view.camera_from_world for view in cameras]), centre)
        half_pixel_mm = plausibility.half_pixel_error(cameras, centre)
        points = centred_points(refined, vertebra)
        judged = confidence.judge(refined, points, rule, count, angle, half_pixel_mm, of_cameras)
        # No pose from views of nearly one direction is accepted, however long it is searched for.
        hopeless = angle is not None and angle < confidence.MIN_VIEW_ANGLE_RAD
        if hopeless or (judged.trusted and searching.evenness(refined) >= prepared.search.one_sided):
            break
    return refined, judged


def wide_starts(
    programs: Programs,
    parts: Parts,
    xrays: Sequence[XRay],
    start: Float[Array, "4 4"],
    refine: RefineConfig,
    search: searching.SearchConfig,
) -> list[Float[np.ndarray, "4 4"]]:
    """Poses round a start where the body fits X-rays roughly; start: world_from_box."""
    return overview.candidates(programs.best_shifts, parts, xrays, start, search.overview, refine, search.starts)[0]


def correct_views(
    prepared: Prepared,
    xrays: Sequence[XRay],
    refined: Refined,
    options: RegisterOptions,
    compile: Compile = jax.jit,
) -> Together:
    """What makes the views agree about the vertebra and the rest of the body; refined: with the views as they are given."""
    box_from_ct = np.linalg.inv(prepared.vertebra.ct_from_box)
    starts = np.stack([refined.world_from_box @ box_from_ct, refined.world_from_rest @ box_from_ct])
    return _refined_together([prepared], xrays, starts, options, compile)


def corrected(xrays: Sequence[XRay], together: Together) -> list[XRay]:
    """The X-rays with corrected cameras and without their distortion."""
    made = []
    for xray, motion in zip(_straightened(xrays, together.distortions), together.motions):
        moved = dataclasses.replace(xray.camera, camera_from_world=xray.camera.camera_from_world @ motion)
        made.append(dataclasses.replace(xray, camera=moved))
    return made


def _straightened(xrays, coefficients):
    return [distortion.straightened(x, k) if k.any() else x for x, k in zip(xrays, coefficients)]


def refine_spine(
    prepared: Sequence[Prepared],
    xrays: Sequence[XRay],
    world_from_ct: Sequence[Float[Array, "4 4"]],
    options: RegisterOptions = RegisterOptions(),
    compile: Compile = jax.jit,
) -> Together:
    """Refines the vertebrae of one scan in one acquisition together, with the rest of the body and, where asked, the views.

    Args:
      prepared: K vertebrae from head to feet; world_from_ct: K poses, within some mm.
    """
    starts = np.stack([*world_from_ct, *world_from_ct])
    return _refined_together(prepared, without_metal(prepared[0], xrays, compile), starts, options, compile)


def _refined_together(prepared, xrays, starts, options, compile):
    """`joint.refine_together` of K vertebrae, from poses (2 K, 4, 4) of them and of the rest, in X-rays without their metal."""
    refine = prepared[0].refine
    config = dataclasses.replace(refine, levels=joint.fine_levels(refine, len(prepared), options.corrects))
    straightened = lambda k: make_pyramid(_straightened(xrays, k), [level.pixel_mm for level in config.levels])
    seen, stretched = straightened(np.zeros((len(xrays), distortion.COEFFICIENTS))), None
    if options.distortion_sd:
        fields = [distortion.field(xray.camera) for xray in xrays]
        stretched = joint.Stretched(options.distortion_sd, fields, straightened)
    labels = [p.vertebra.label for p in prepared]
    between = [levels.steps(a, b, labels + [*range(a + 1, b)]) for a, b in zip(labels, labels[1:])]
    boxes, parts = [p.vertebra.ct_from_box for p in prepared], [parts_in(p, xrays) for p in prepared]
    bodies = bodies_of(boxes, parts, between)
    growth = 1.0 if prepared[0].rule is None else confidence.error_per_misfit(prepared[0].rule)
    discrepancy = joint.DISCREPANCY if options.corrects else joint.NO_DISCREPANCY
    programs = programs_of(compile)
    known = seen, starts, options.camera_sd, config, discrepancy, growth, stretched
    return joint.refine_together(programs.cut, programs.linearised, bodies, *known)


def shows_bare_bone(xrays: Sequence[XRay], search: searching.SearchConfig) -> bool:
    """Whether the X-rays show a bone in air: all of their median line integrals are small."""
    counted = [np.asarray(x.line_integrals)[np.asarray(x.valid)] for x in xrays]
    medians = [np.median(v[:: max(1, v.size // MEDIAN_PIXELS)]) if v.size else np.inf for v in counted]
    return bool(max(medians) < search.bare_line_integral)


def without_metal(prepared: Prepared, xrays: Sequence[XRay], compile: Compile = jax.jit) -> list[XRay]:
    """The X-rays with their metal among the invalid pixels.

    The finder knows trunks alone, and would take the cortex of a bone in air for metal: such X-rays, and those of other bones, stay
    as they are.
    """
    trunk = prepared.vertebra.label <= FIRST_BONE and not shows_bare_bone(xrays, prepared.search)
    return metal.leave_out(prepared.metal if trunk else None, xrays, compile)


def parts_in(prepared: Prepared, xrays: Sequence[XRay]) -> Parts:
    """The two parts that X-rays are modelled with: the bone in its body, or alone where the X-rays show it in air."""
    return preparing.bare_parts(prepared) if shows_bare_bone(xrays, prepared.search) else prepared.parts


def centred_points(refined: Refined, vertebra: Vertebra) -> Float[Array, "p 3"]:
    """The vertebra's surface points at a refined pose, mm, about its centre in world axes."""
    in_box = (vertebra.points - vertebra.ct_from_box[:3, 3]) @ vertebra.ct_from_box[:3, :3]
    return in_box @ refined.world_from_box[:3, :3].T


def reconstruct_without_ct(
    prepared: Prepared,
    cloud: Gaussians,
    xrays: Sequence[XRay],
    start: Float[Array, "4 4"],
    passes: int,
    compile: Compile = jax.jit,
) -> Gaussians:
    """The network's reconstruction with another shape in place of the CT, from the start pose on, unrefined.

    Args:
      cloud: Gaussians (N,) of that shape, box frame, such as `reconstruct.mean_cloud`; start: world_from_ct.
    Returns:
      Gaussians (N,) in the world frame.
    """
    seen = make_pyramid(xrays, [prepared.model.config.pixel_mm])
    start_box = start @ prepared.vertebra.ct_from_box
    result = run_network(programs_of(compile), prepared.model, seen, start_box, cloud, passes)
    effect = jax.tree.map(lambda a: a[0], result.reconstruction.effect)
    return gaussians.move(effect, jnp.asarray(result.trajectory[-2]))
