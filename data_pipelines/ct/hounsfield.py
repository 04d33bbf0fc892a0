"""Whether a CT's numbers are Hounsfield units, judged by its bone, by what surrounds the bone, and by its air.

Attenuation, and with it every X-ray that a pose is found by, is computed from HU. Numbers on another scale give poses that are
millimetres off and look like any other. So a scan is refused if its numbers cannot be HU, with the mend that would make them HU
where one is known. What scanners, patients and archives do to true HU passes: padding outside the field of view, metal, cement,
contrast agent, osteoporosis, a crop without air, a bone without anything round it.
"""

import collections.abc
import dataclasses
import pathlib

import numpy as np
import scipy

from data_pipelines.ct import pieces
from radgs_jax import attenuation
from radgs_jax import errors

MIN_BONE_MM3 = 2000.0
"""Volume of labelled bone in mm^3 below which nothing is judged. Half a cervical vertebra of a small child. At half, slivers at a
scan's border are judged by their partial volumes; at twice, single small vertebrae are not judged."""
PADDING_HU = -1100.0
"""HU below which voxels are not tissue: padding outside the field of view (-2000, -2048, -3024, -32768) or streaks of metal. Air
is -1000 with noise of tens of HU. At half, air would count as padding; at twice, padding would count as air."""
BELOW_AIR_HU, BELOW_AIR_SHARE = -1500.0, 0.01
"""HU and share of the scan: if more than the share lies below and is not a few values over and over, as padding is, it is air of
another scale. Noise of air ends at -1300. At half the HU noisy air is refused, at twice HU of twice their size pass; at half the
share streaks of metal are refused, at twice crops with little air pass."""
TISSUE_HU = -300.0
"""HU above which a voxel round the bone is tissue and not lung or air. Fat is -120 to -70 HU, lung -950 to -600. At half, noisy fat
is left out; at twice, lung counts."""
TISSUE_SHARE = 0.3
"""Share of the voxels round the bone that must be tissue to be judged. With less the bone lies by itself (cut out, in air), and
what is near it is its own rim. Beside thoracic vertebrae lung takes up to a half. Half of it judges rims, twice of it skips
lungs."""
ROUND_HU = (-150.0, 250.0)
"""Range in HU of the median of the tissue round the bone: from fat (-120) to muscle (40 to 70), with contrast agent, discs and ribs
in a part of it. Half refuses children's and fat patients' scans, twice takes numbers for HU that are off by 500."""
BONE_MEDIAN_HU = (-150.0, 1500.0)
"""Range in HU of the median in the bone: from fatty marrow of osteoporosis (-50) to vertebrae full of cement or metal. Half refuses
those, twice takes numbers of ten times HU."""
ALONE_MEDIAN_HU = 900.0
"""Largest median in HU of the bone of a scan without fat, lung and air, which is then a bone that was cut out. A vertebra's is 100
to 500. HU + 1024 is 1100 and more. At half, dense bones are refused; at twice, HU + 1024 pass."""
CORTEX_HU = 100.0
"""HU that the densest 5 % of the bone must exceed: its cortex, of 200 HU even in osteoporosis and 5 mm slices. Numbers of a tenth
of HU stay below. At half, these pass; at twice, thick slices of weak bone are refused."""
DENSEST_HU = 180.0
"""HU that the densest 0.5 % of the bone must exceed, as CORTEX_HU: facets and endplates have 300 HU and more. At half, a tenth of
HU passes in dense bone; at twice, thick slices of weak bone are refused."""
CONTRAST_HU = 40.0
"""HU by which the densest 5 % of the bone must exceed the median round it. Cortex exceeds muscle by 150 and more. Below it the mask
lies beside the bone, or the numbers are inverted. At half, some of these pass; at twice, weak bone in thick slices comes near."""
AIR_HU = -600.0
"""HU that some of a scan's air must go below, if a share GAS_SHARE of the scan is below TISSUE_HU: lung is -850, air -1000. At
half, HU of half their size pass; at twice, true air is refused."""
GAS_SHARE = 0.02
"""Share of the scan below TISSUE_HU that is more than partial volumes at skin or bowel. At half, single bubbles of partial volume
count; at twice, small lungs in a crop are not judged."""
FLOOR_HU = -900.0
"""HU above which a scan's lowest value, if many voxels share it, is not air but a value that air was replaced by or cut off at.
Scanners' own limits are -1000 and -1024. At half, lung windows cut at -600 pass; at twice, every scan passes."""
FAT_HU = -130.0
"""HU below which a lowest value of many voxels is no tissue, however few values a scan has. Fat is -120 to -70. At half, drawn
scans of fat are refused; at twice, windows that end at -200 pass in drawn scans."""
FLOOR_SHARE = 0.005
"""Share of the scan at exactly its lowest value that makes this a floor. One value holds 0.1 to 0.3 % of soft tissue; air cut off
holds most of the air. At half, noise is near; at twice, crops with little air pass."""
CEILING_HU = 2000.0
"""HU below which the highest value, if much bone shares it, is a limit that bone was cut off at. Cortex reaches 1500 to 2000 HU;
scanners' own limits are 3071 and more, and only metal reaches them. At half, windows of 1000 HU pass; at twice, metal is
refused."""
CEILING_SHARE = 0.02
"""Share of the bone at exactly the highest value that makes this a limit. One value holds 0.1 to 0.5 % of the bone. At half, coarse
rounding is near; at twice, limits of 800 HU pass in weak bone."""
HOLE_SHARE = 0.02
"""Share of the scan at exactly 0 that makes these voxels filled, if there is air besides: 0 HU is water, of which one value holds
0.3 % at most. At half, smooth noise-free scans are near; at twice, corners left by a rotation pass."""
SMOOTH_VALUES = 64
"""Different values in a scan from which it is taken for measured and not drawn. Drawn ones, as in tests, repeat their values, so
that shares of one value mean nothing. At half or twice nothing changes, since CTs have a thousand values."""
ROUND_MM = (4.0, 15.0)
"""Distances in mm from the bone between which its surroundings are judged. Nearer are masks that were drawn too small, further are
other bones, lungs and the skin. At half only discs and facets are left, at twice half of a thin body is air."""
AIR_REACH = 0.3
"""Share of the way from a scan's lowest value to its soft tissue that an error message calls air: lung included, fat not. It
changes words only."""
_SAMPLES = 2**18
"""Voxels that each of the parts is judged by. At half or twice no percentile changes by more than a few HU."""
_TOP, _LOW, _DENSEST = 95.0, 5.0, 99.5
"""Percentiles that stand for a part's highest and lowest numbers, so that metal and noise do not."""


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Voxel values of a scan, each (N,) float32.

    Attributes:
      bone: inside the labels.
      near: between the distances `ROUND_MM` from them.
      all: of the whole scan.
    """

    bone: np.ndarray
    near: np.ndarray
    all: np.ndarray

    def by(self, change: collections.abc.Callable[[np.ndarray], np.ndarray]) -> "Sampled":
        """The values, each changed by a function of arrays."""
        return Sampled(change(self.bone), change(self.near), change(self.all))


MENDS: tuple[tuple[str, str, collections.abc.Callable[[np.ndarray], np.ndarray]], ...] = (
    ("HU + 1024", "subtract 1024 (1000 if that puts air at -1024)", lambda v: v - 1024.0),
    ("HU x 10", "divide by 10", lambda v: v / 10.0),
    ("HU x 2", "divide by 2", lambda v: v / 2.0),
    ("HU / 2", "multiply by 2", lambda v: v * 2.0),
    ("HU / 10", "multiply by 10", lambda v: v * 10.0),
    ("HU / 100", "multiply by 100", lambda v: v * 100.0),
    ("HU / 1000", "multiply by 1000", lambda v: v * 1000.0),
    (
        "attenuation in 1/mm",
        f"HU = 1000 (mu / {attenuation.WATER_PER_MM:g} - 1)",
        lambda v: 1000.0 * (v / attenuation.WATER_PER_MM - 1.0),
    ),
    (
        "attenuation in 1/cm",
        f"HU = 1000 (mu / {10 * attenuation.WATER_PER_MM:g} - 1)",
        lambda v: 1000.0 * (v / (10 * attenuation.WATER_PER_MM) - 1.0),
    ),
    ("HU x 10 + 10240", "divide by 10, then subtract 1024", lambda v: v / 10.0 - 1024.0),
    ("HU of inverted sign", "change the sign", lambda v: -v),
)
"""What numbers may be instead of HU: a name, the mend in words, and the mend. Of those that make a scan pass, the one is named that
brings its lowest value nearest to air."""
MEND_AIR_HU = 100.0
"""Largest distance in HU from air of the lowest value of a mended picture ([0, 1] or [0, 255]) or window. Attenuation and halved HU
look like these, too, and have air. At half, noisy air misses it; at twice, some pictures are called attenuation."""


Boxes = collections.abc.Mapping[int, tuple[slice, ...]]


def check(
    path: pathlib.Path | str,
    hu: np.ndarray,
    labels: np.ndarray,
    ct_from_index: np.ndarray,
    boxes: Boxes | None = None,
) -> None:
    """Checks that a CT's numbers are HU. Takes about a tenth of a second.

    Args:
      path: the CT, named in the error.
      hu: (X, Y, Z).
      labels: (X, Y, Z) integers, above 0 inside bones that were labelled.
      ct_from_index: (4, 4), mm of voxel centres.
      boxes: bounding box of each label, if they are known.

    Raises:
      InputError: they cannot be HU. The line names the ranges in the bone, round it and of the air, and the likely mend.
    """
    found = sample(hu, labels, ct_from_index, boxes)
    if found is None:
        return
    why = faults(found)
    if not why:
        return
    allowed = f"HU (bone above {CORTEX_HU:g}, {ROUND_HU[0]:g} to {ROUND_HU[1]:g} round it, air at -1000)"
    errors.fail(path, "HU", f"{_described(found)}: {why[0]}", f"{allowed}; these look like {_likely(found)}")


def sample(hu: np.ndarray, labels: np.ndarray, ct_from_index: np.ndarray, boxes: Boxes | None = None) -> Sampled | None:
    """Samples a scan's bone, its surroundings and the whole; arguments as for `check`. None if less than MIN_BONE_MM3 is
    labelled."""
    spacing = np.linalg.norm(np.asarray(ct_from_index)[:3, :3], axis=0)
    box = _around((pieces.boxes(labels) if boxes is None else boxes).values())
    if box is None:
        return None
    margin = np.ceil(ROUND_MM[1] / spacing).astype(int)
    box = tuple(slice(max(0, s.start - m), min(n, s.stop + m)) for s, m, n in zip(box, margin, labels.shape))
    size = np.array([s.stop - s.start for s in box])
    # Voxels of about equal sides, of which there are _SAMPLES or fewer.
    side = max(spacing.min(), (np.prod(size * spacing) / _SAMPLES) ** (1 / 3))
    step = np.maximum(1, np.rint(side / spacing)).astype(int)
    part = tuple(slice(s.start, s.stop, n) for s, n in zip(box, step))
    inside = labels[part] > 0
    if np.count_nonzero(inside) * np.prod(step * spacing) < MIN_BONE_MM3:
        return None
    values = np.asarray(hu[part], np.float32)
    away = scipy.ndimage.distance_transform_edt(~inside, sampling=step * spacing)
    every = np.maximum(1, np.array(hu.shape) // 96)
    return Sampled(
        values[inside],
        values[(away >= ROUND_MM[0]) & (away <= ROUND_MM[1])],
        np.asarray(hu[:: every[0], :: every[1], :: every[2]], np.float32).ravel(),
    )


def _around(boxes):
    """The box around several boxes, or None if there are none."""
    boxes = list(boxes)
    return tuple(slice(min(p.start for p in parts), max(p.stop for p in parts)) for parts in zip(*boxes)) or None


def faults(found: Sampled) -> list[str]:
    """Why sampled values cannot be HU, each a few words; the clearest first. Empty if they can."""
    median, top, densest = np.percentile(found.bone, [50.0, _TOP, _DENSEST])
    tissue = found.near[found.near > TISSUE_HU]
    surrounded = tissue.size > TISSUE_SHARE * found.near.size
    middle = float(np.median(tissue)) if surrounded else None
    body = found.all[found.all > PADDING_HU]
    low, high = (float(body.min()), float(body.max())) if body.size else (0.0, 0.0)
    why = []
    if low >= 0.0 and high <= 255.5:
        why.append("no value is below 0 or above 255")
    if top < CORTEX_HU or densest < DENSEST_HU:
        why.append(f"no cortex of bone above {CORTEX_HU if top < CORTEX_HU else DENSEST_HU:g}")
    if not BONE_MEDIAN_HU[0] <= median <= BONE_MEDIAN_HU[1]:
        why.append(f"bone's median {median:.4g} outside {BONE_MEDIAN_HU[0]:g} to {BONE_MEDIAN_HU[1]:g}")
    if middle is not None and not ROUND_HU[0] <= middle <= ROUND_HU[1]:
        why.append(f"soft tissue's median {middle:.4g} outside {ROUND_HU[0]:g} to {ROUND_HU[1]:g}")
    if middle is not None and top < middle + CONTRAST_HU:
        why.append("bone no brighter than what is round it")
    below = found.all[found.all < BELOW_AIR_HU]
    if below.size > BELOW_AIR_SHARE * found.all.size and _different(below) >= SMOOTH_VALUES:
        why.append(f"air of {np.median(below):.4g}")
    if low > -100.0 and median > ALONE_MEDIAN_HU:
        why.append("no fat, lung or air anywhere")
    return why + _cuts(found, body, low)


def _cuts(found, body, low):
    """Values that the scan was cut off at or filled with."""
    if not body.size:
        return ["nothing but padding"]
    why = []
    smooth = _different(body) >= SMOOTH_VALUES
    floor = np.count_nonzero(body == low) / body.size
    if floor > FLOOR_SHARE and low > FLOOR_HU:
        near_zero = abs(low) < 1.0
        if near_zero:
            why.append("air is stored as 0")
        elif low < FAT_HU or smooth and floor > 10 * np.mean((body > low) & (body <= low + 20)) / 20:
            why.append(f"values below {low:.4g} are cut off")
    elif np.mean(body < TISSUE_HU) > GAS_SHARE and low > AIR_HU:
        why.append(f"air of {low:.4g}")
    high = float(found.bone.max())
    if smooth and high < CEILING_HU and high >= float(body.max()):
        share = np.mean(found.bone == high)
        if share > CEILING_SHARE and share > 10 * np.mean((found.bone < high) & (found.bone >= high - 20)) / 20:
            why.append(f"bone above {high:.4g} is cut off")
    if smooth and abs(low) >= 1.0:
        share = np.mean(body == 0.0)
        if share > HOLE_SHARE and share > 10 * np.mean((np.abs(body) <= 10) & (body != 0)) / 20:
            why.append(f"{100 * share:.0f} % of the scan is exactly 0 and filled, not measured")
    return why


def _different(values):
    """Number of different values, rounded, in 65,536 of them or all."""
    return np.unique(np.rint(values[:: max(1, values.size // 2**16)])).size


def _likely(found):
    """What numbers that cannot be HU may be, and the mend."""
    why = faults(found)
    low, high = float(found.all.min()), float(found.all.max())
    picture = max(abs(low), abs(high)) <= 1.5 or low >= 0 and high <= 255.5
    cut = all(any(word in reason for word in ("cut off", "stored", "filled")) for reason in why)
    body = found.all[found.all > PADDING_HU]
    ends = np.array([low, body.min() if body.size else low])
    fits = [
        (float(np.abs(change(ends) + 1000.0).min()), f"{name}: {how}")
        for name, how, change in MENDS
        if not faults(found.by(change))
    ]
    off, mend = min(fits, default=(np.inf, ""))
    return mend if mend and (off < MEND_AIR_HU or not (picture or cut)) else _guess(found, why, low, high, picture)


def _guess(found, why, low, high, picture):
    """What numbers from `low` to `high` may be that no mend of the table makes HU."""
    if low == high:
        return "an empty scan"
    round_it = float(np.median(found.near)) if found.near.size else low
    inverted = np.median(found.bone) < round_it and not np.percentile(found.bone, _TOP) > round_it
    if picture:
        kind = "an inverted picture" if inverted else "a picture"
        span = "[0, 255]" if high > 1.5 else "[-1, 1]" if low < 0 else "[0, 1]"
        return f"{kind} normalised to {span}: take the original CT, or rescale so that air is -1000 and muscle 50"
    if all("stored" in reason or "filled" in reason for reason in why):
        return "HU with air set to 0 or cut off at 0: put -1000 where there is air, or take the original CT"
    if all("cut off" in reason or "cortex" in reason for reason in why):
        return "HU cut to a window: take the original CT"
    if inverted:
        return "an inverted picture: take the original CT"
    near = np.median(found.near[found.near > low + 0.2 * (round_it - low)]) if round_it > low else round_it
    if np.percentile(found.bone, _TOP) > near > low:
        return "another scale: take the original CT, or rescale so that air is -1000 and muscle 50"
    return "no CT, or the mask belongs to another CT or lies beside its bone"


def _described(found):
    """The ranges of the parts, in words."""
    ranges = [f"{_range(found.bone)} in the bone"]
    if found.near.size:
        ranges.append(f"{_range(found.near)} round it")
    low = found.all.min()
    air = found.all[found.all < low + AIR_REACH * (np.median(found.near if found.near.size else found.bone) - low)]
    ranges.append(
        f"{_range(air)} in the air" if air.size > FLOOR_SHARE * found.all.size else f"nothing below {low:.4g}"
    )
    return ", ".join(ranges)


def _range(values):
    low, high = np.percentile(values, [_LOW, _TOP])
    return f"{low:.4g} to {high:.4g}"
