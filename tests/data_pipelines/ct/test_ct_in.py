"""Reading CTs: NIfTI and DICOM give the same voxels at the same place, vertebrae are complete, and distorted series are refused."""

import dataclasses
import os
import pathlib

import ct_files
import nibabel
import numpy as np
import pydicom
import pydicom.uid
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from data_pipelines.ct import centroid_files
from data_pipelines.ct import extraction
from data_pipelines.ct import scans
from data_pipelines.ct import whole_body
from data_pipelines.io import files
from data_pipelines.phantom import scan_files
from data_pipelines.simulation import carm
from data_pipelines.simulation import quick
from radgs_jax import attenuation
from radgs_jax import errors
from radgs_jax.geometry import resample

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
DATA = pathlib.Path(os.environ.get("RADGS_SHARED", REPOSITORY.parent / "shared")) / "data"
needs_data = pytest.mark.skipif(
    not (DATA / "cases.json").exists(), reason="the shared scans are not next to the repository (RADGS_SHARED)"
)


def _places(shape, affine):
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def _assert_hu_where_they_belong(hu, affine, step=1.0):
    """Every voxel has the HU of its place, up to rounding: half of `step`, the largest rescale slope."""
    assert hu.dtype == np.float32 and sorted(hu.shape) == sorted(ct_files.SIZE)
    np.testing.assert_allclose(hu, ct_files.hu_at(_places(hu.shape, affine)), atol=0.5 * step + 0.01)
    assert "".join(nibabel.aff2axcodes(affine)) == "RAS"


# --- reading ---------------------------------------------------------------------------------------------------------


AXES = {
    "axial": np.eye(3),
    "oblique": ct_files.OBLIQUE,
    "sagittal slices": np.array([[0.0, 0, -1], [1, 0, 0], [0, -1, 0]]),
    "feet first, prone": np.diag([-1.0, 1.0, -1.0]) @ ct_files.OBLIQUE @ np.diag([1.0, -1.0, -1.0]),
}


@pytest.mark.parametrize("name", AXES)
def test_dicom_voxels_lie_where_the_standard_puts_them(tmp_path, name):
    ct_files.write_series(tmp_path, ct_files.slices(AXES[name]))
    hu, affine = scans.read_ct(tmp_path)
    _assert_hu_where_they_belong(hu, affine)
    # The set of voxel centres is that of the DICOM standard's equation.
    wanted = ct_files.lps_points(AXES[name]).reshape(-1, 3) * [-1, -1, 1]
    found = _places(hu.shape, affine).reshape(-1, 3)
    order = [np.lexsort(np.round(p, 3).T) for p in (wanted, found)]
    np.testing.assert_allclose(found[order[1]], wanted[order[0]], atol=1e-4)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "IAL", "SLP"])
def test_nifti_and_dicom_agree_however_they_are_stored(tmp_path, codes):
    ct_files.write_series(tmp_path / "dicom", ct_files.slices())
    affine = ct_files.nifti_affine()
    array = np.rint(ct_files.hu_at(_places(ct_files.SIZE, affine)) * 4) / 4
    stored = ct_files.write_nifti(tmp_path / "ct.nii.gz", array.astype(np.float64), affine, codes)
    a, b = scans.read_ct(tmp_path / "dicom"), scans.read_ct(stored)
    np.testing.assert_allclose(a[1], b[1], atol=1e-4)
    np.testing.assert_allclose(a[0], b[0], atol=0.51)
    _assert_hu_where_they_belong(*b, step=0.25)


def test_scaled_and_big_endian_nifti(tmp_path):
    affine = ct_files.nifti_affine()
    wanted = ct_files.hu_at(_places(ct_files.SIZE, affine))
    image = nibabel.Nifti1Image(np.zeros(ct_files.SIZE, ">i2"), affine, nibabel.Nifti1Header(endianness=">"))
    header = image.header
    header.set_data_dtype(">i2")
    header["scl_slope"], header["scl_inter"], header["vox_offset"] = 0.5, -100.0, 352
    stored = np.rint((wanted + 100.0) / 0.5).astype(">i2")
    (tmp_path / "ct.nii").write_bytes(header.binaryblock + bytes(4) + stored.tobytes(order="F"))
    _assert_hu_where_they_belong(*scans.read_ct(tmp_path / "ct.nii"), step=0.5)
    # Compression is recognised by content: the same file with the name of a compressed one.
    (tmp_path / "ct.nii").rename(tmp_path / "odd.nii.gz")
    _assert_hu_where_they_belong(*scans.read_ct(tmp_path / "odd.nii.gz"), step=0.5)
    nifti2 = nibabel.Nifti2Image(wanted.astype(np.float32), affine)
    nibabel.save(nifti2, tmp_path / "two.nii.gz")
    _assert_hu_where_they_belong(*scans.read_ct(tmp_path / "two.nii.gz"), step=0.0)


def _jpeg(dataset):
    image = dataset.pixel_array
    dataset.PixelData = pydicom.encaps.encapsulate([ct_files.jpeg_lossless(image)])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLosslessSV1


def _jpeg_2000(dataset):
    dataset.PixelData = pydicom.encaps.encapsulate([ct_files.jpeg_2000(dataset.pixel_array)])
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless


def _signed(dataset):
    """Twelve of sixteen bits in two's complement, with an overlay bit above them, as in older archives."""
    values = np.rint(dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)).astype(
        np.int16
    )
    assert values.min() < 0 and np.abs(values).max() < 2048
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
    dataset.PixelRepresentation, dataset.BitsStored, dataset.HighBit = 1, 12, 11
    dataset.PixelData = ((values.view(np.uint16) & 0x0FFF) | 0x1000).tobytes()


COMPRESSED = {
    "RLE": lambda d: d.compress(pydicom.uid.RLELossless, generate_instance_uid=False),
    "JPEG 2000": _jpeg_2000,
    "JPEG lossless": _jpeg,
    "signed 12 bit": _signed,
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_transfer_syntaxes(tmp_path, name):
    datasets = ct_files.slices()
    for dataset in datasets:
        COMPRESSED[name](dataset)
    ct_files.write_series(tmp_path, datasets)
    # The signed series is rounded twice.
    _assert_hu_where_they_belong(*scans.read_ct(tmp_path), step=2.0 if name.startswith("signed") else 1.0)


def test_an_enhanced_ct_reads_as_its_frames(tmp_path):
    ct_files.enhanced().save_as(tmp_path / "multi.dcm", enforce_file_format=True)
    _assert_hu_where_they_belong(*scans.read_ct(tmp_path / "multi.dcm"))
    np.testing.assert_array_equal(scans.read_ct(tmp_path)[0], scans.read_ct(tmp_path / "multi.dcm")[0])


def test_files_that_are_not_slices_are_ignored(tmp_path):
    ct_files.write_series(tmp_path / "deep" / "er", ct_files.slices())
    (tmp_path / "LIESMICH.txt").write_text("exported")
    (tmp_path / "empty").write_bytes(b"")
    report = ct_files.slices()[0]
    report.SOPClassUID, report.Modality = pydicom.uid.EnhancedSRStorage, "SR"
    report.file_meta.MediaStorageSOPClassUID = report.SOPClassUID
    del report.PixelData
    report.save_as(tmp_path / "report", enforce_file_format=True)
    _assert_hu_where_they_belong(*scans.read_ct(tmp_path))


def test_a_series_has_one_digest_however_its_folder_is_listed(tmp_path):
    paths = ct_files.write_series(tmp_path / "a", ct_files.slices())
    before = files.sha256(tmp_path / "a")
    assert before == files.sha256(tmp_path / "a") and len(before) == 64
    paths[2].write_bytes(paths[2].read_bytes()[:-1] + b"\1")
    assert files.sha256(tmp_path / "a") != before


# --- refusing --------------------------------------------------------------------------------------------------------


def _shear(datasets, degrees):
    """A tilted gantry: positions move along the table, to which the slices are inclined."""
    normal, row = ct_files.OBLIQUE[:, 2], ct_files.OBLIQUE[:, 1]
    for k, dataset in enumerate(datasets):
        shift = np.tan(np.radians(degrees)) * ct_files.SPACING[2] * k * row
        dataset.ImagePositionPatient = [f"{v:.6f}" for v in np.array(dataset.ImagePositionPatient, float) + shift]
    assert normal @ row == pytest.approx(0)


def _set(index, **values):
    return lambda datasets: [setattr(datasets[i], k, v) for k, v in values.items() for i in index]


ALL = range(ct_files.SIZE[2])
REFUSED = {
    "tilt by tag": (_set(ALL, GantryDetectorTilt=-12.5), r"gantry tilted by -12\.50 degrees .*sheared"),
    "tilt by positions": (lambda d: _shear(d, 7.0), r"gantry tilted by 7\.00 degrees .*sheared"),
    "missing slice": (
        lambda d: d.pop(2),
        r"1 missing slice between .* mm along the normal, between I\d+ and I\d+, .*2\.5",
    ),
    "two missing": (lambda d: [d.pop(2), d.pop(2)], "2 missing slices between"),
    "duplicate": (
        lambda d: setattr(d[3], "ImagePositionPatient", d[4].ImagePositionPatient),
        r"one position \(.* mm along the normal\) in I\d+ and I\d+, wanted every position once",
    ),
    "uneven": (
        lambda d: setattr(
            d[3],
            "ImagePositionPatient",
            [f"{v:.6f}" for v in np.array(d[3].ImagePositionPatient, float) + 0.6 * ct_files.OBLIQUE[:, 2]],
        ),
        r"a slice 0\.60 mm from its place",
    ),
    "two series": (
        _set([1], SeriesInstanceUID="1.2.3", SeriesDescription="soft"),
        r"2 series: .*1\.2\.3 \(1 files, 'soft'",
    ),
    "size": (_set([2], Columns=5), "Columns: found 5, but 37 in"),
    "orientation": (
        _set([2], ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        "ImageOrientationPatient: found .*the same in",
    ),
    "no orientation": (
        _set([2], ImageOrientationPatient=None),
        "ImageOrientationPatient: found nothing, wanted 6 numbers",
    ),
    "skewed orientation": (
        _set(ALL, ImageOrientationPatient=[1, 0, 0, 0.3, 1, 0]),
        "two unit vectors at a right angle",
    ),
    "spacing": (_set([2], PixelSpacing=[0.8, 0.61]), "PixelSpacing: found .*the same in all slices"),
    "zero spacing": (_set(ALL, PixelSpacing=[0, 0.6]), "PixelSpacing: found"),
    "no position": (_set([2], ImagePositionPatient=None), "ImagePositionPatient: found nothing, wanted 3 numbers"),
    "localizer": (_set([4], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "a localizer .*remove it"),
    "not HU": (_set([4], RescaleType="Z_EFF"), "RescaleType: found 'Z_EFF', wanted HU"),
    "no intercept": (lambda d: d[4].pop("RescaleIntercept"), "RescaleIntercept: found nothing, wanted a number"),
    "no slope": (_set([4], RescaleSlope=0), "RescaleSlope: found 0"),
    "no pixels": (lambda d: d[4].pop("PixelData"), "PixelData: found nothing, wanted the pixels"),
    "short pixels": (_set([4], PixelData=bytes(100)), "PixelData: found 100 bytes, wanted the 2442 of 33 x 37 pixels"),
    "lying rows": (_set(ALL, Rows=32), "PixelData: found 2442 bytes, wanted the 2368 of 32 x 37 pixels"),
    "huge rows": (_set(ALL, Rows=65535, Columns=65535), "Rows, Columns: found"),
    "colour": (_set([4], SamplesPerPixel=3), "SamplesPerPixel: found 3, wanted 1"),
    "inverted": (_set([4], PhotometricInterpretation="MONOCHROME1"), "wanted MONOCHROME2"),
    "MR": (_set(ALL, SOPClassUID=pydicom.uid.MRImageStorage, Modality="MR"), r"found \['MR MR Image Storage'\]"),
    "one slice": (lambda d: [d.pop() for _ in range(5)], "slices: found 1, wanted two or more"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_distorted_series_are_refused(tmp_path, name):
    change, message = REFUSED[name]
    datasets = ct_files.slices()
    change(datasets)
    ct_files.write_series(tmp_path, datasets)
    with pytest.raises(errors.InputError, match=message) as caught:
        scans.read_ct(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_gap_is_named_by_its_place_and_its_neighbours(tmp_path):
    paths = ct_files.write_series(tmp_path, ct_files.slices())
    heights = [np.array(pydicom.dcmread(p).ImagePositionPatient, float) @ ct_files.OBLIQUE[:, 2] for p in paths]
    paths[3].unlink()
    with pytest.raises(errors.InputError) as caught:
        scans.read_ct(tmp_path)
    wanted = f"between {heights[2]:.2f} and {heights[4]:.2f} mm along the normal, between {paths[2].name} and {paths[4].name}"
    assert wanted in str(caught.value)


def test_folders_without_a_ct_and_cut_slices_are_refused(tmp_path):
    with pytest.raises(errors.InputError, match="DICOM images: found none, wanted the slices of a CT series"):
        scans.read_ct(tmp_path)
    paths = ct_files.write_series(tmp_path, ct_files.slices())
    paths[2].write_bytes(paths[2].read_bytes()[:90])
    paths[2].rename(tmp_path / "cut.dcm")
    with pytest.raises(errors.InputError, match="cut.dcm: content: found no DICOM mark"):
        scans.read_ct(tmp_path)


# --- vertebrae -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oblique():
    """An ellipsoid as vertebra on an oblique, anisotropic, off-centre grid: (scan, centre, semi-axes, rotation)."""
    spacing, shape = np.array([0.9, 0.7, 2.0]), (96, 110, 44)
    turn = Rotation.from_euler("xyz", [9.0, -12.0, 17.0], degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * spacing, [35.0, -120.0, 410.0]
    centre = affine[:3, :3] @ (np.array(shape) * [0.5, 0.45, 0.55]) + affine[:3, 3]
    semi = np.array([22.0, 14.0, 11.0])
    own = Rotation.from_euler("xyz", [5.0, 20.0, -15.0], degrees=True).as_matrix()
    inside = np.linalg.norm((_places(shape, affine) - centre) @ own / semi, axis=-1) <= 1
    hu = np.where(inside, 700.0, 40.0).astype(np.float32)
    return scans.Scan("oblique", hu, np.where(inside, 21, 0).astype(np.uint8), affine), centre, semi, own


@pytest.mark.parametrize("spacing_mm", [0.8, 1.0, 2.5])
def test_a_cube_holds_the_vertebra_where_it_is(oblique, spacing_mm):
    scan, centre, semi, own = oblique
    shape = tuple(int(n / spacing_mm) for n in (72, 60, 56))
    cube = extraction.vertebra_cube(scan, 21, spacing_mm, shape)
    assert cube.hu.shape == cube.occupancy.shape == cube.density.shape == shape
    assert all(a.dtype == np.float32 for a in (cube.hu, cube.occupancy, cube.density))
    assert 0 <= cube.occupancy.min() and cube.occupancy.max() <= 1
    np.testing.assert_allclose(cube.ct_from_index[:3, :3], spacing_mm * np.eye(3))
    # Volume, centre and border (occupancy 0.5) are those of the ellipsoid.
    volume = 4 / 3 * np.pi * semi.prod()
    assert abs(cube.occupancy.sum() * spacing_mm**3 / volume - 1) < 0.01
    index = np.array(ndimage.center_of_mass(cube.occupancy))
    np.testing.assert_allclose(cube.ct_from_index[:3, :3] @ index + cube.ct_from_index[:3, 3], centre, atol=0.1)
    radius = np.linalg.norm((_places(shape, cube.ct_from_index) - centre) @ own / semi, axis=-1)
    assert cube.occupancy[radius < 0.6].min() > 0.9 and cube.occupancy[radius > 1.6].max() < 0.1
    np.testing.assert_allclose(cube.hu[radius < 0.55], 700.0, atol=10.0)
    mu = attenuation.from_hounsfield(cube.hu)
    np.testing.assert_allclose(cube.density, mu * cube.occupancy, atol=1e-7)


def test_whole_hu_mean_the_same_as_floats(oblique):
    floats, *_ = oblique
    whole = dataclasses.replace(floats, hu=floats.hu.astype(np.int16))
    cubes = [extraction.vertebra_cube(scan, 21, 2.5, soften_mm=0.5) for scan in (whole, floats)]
    np.testing.assert_array_equal(cubes[0].density, cubes[1].density)
    bodies = [whole_body.WholeBody(scan, 6.0).without(extraction.extract(scan, 21, 64)) for scan in (whole, floats)]
    np.testing.assert_array_equal(*bodies)


def test_softening_is_a_smooth_border_of_the_chosen_width(oblique):
    scan = oblique[0]
    soft = [extraction.vertebra_cube(scan, 21, 1.0, (64, 56, 48), soften_mm=s).occupancy for s in (0.5, 2.0)]
    between = [np.count_nonzero((o > 0.05) & (o < 0.95)) for o in soft]
    steepest = [np.abs(np.diff(o, axis=0)).max() for o in soft]
    assert between[1] > 2 * between[0] and steepest[1] < 0.6 * steepest[0]
    assert abs(soft[0].sum() / soft[1].sum() - 1) < 0.01


def test_coarse_cubes_are_free_of_aliases():
    """Stripes that are too fine for the cube become their mean, not coarser stripes."""
    hu = np.zeros((80, 80, 80), np.float32)
    hu += 500.0 * np.sign(np.sin(2 * np.pi * (np.arange(80) + 0.25) / 3.0))[:, None, None].astype(np.float32)
    labels = np.zeros(hu.shape, np.uint8)
    labels[30:50, 30:50, 30:50] = 20
    scan = scans.Scan("stripes", hu, labels, np.diag([1.0, 1.0, 1.0, 1.0]))
    coarse = extraction.vertebra_cube(scan, 20, 2.6, (20, 20, 20)).hu
    taken = resample.resample(
        hu, scan.ct_from_index, extraction.vertebra_cube(scan, 20, 2.6, (20, 20, 20)).ct_from_index, (20,) * 3
    )
    assert coarse[3:-3, 3:-3, 3:-3].std() < 0.1 * taken[3:-3, 3:-3, 3:-3].std()
    assert abs(coarse[3:-3, 3:-3, 3:-3].mean() - hu.mean()) < 20


def test_cut_vertebrae_need_allow_cut(oblique):
    scan = oblique[0]
    top = np.argwhere(scan.labels)[:, 2].max() - 2
    cut = dataclasses.replace(scan, hu=scan.hu[:, :, :top], labels=scan.labels[:, :, :top])
    with pytest.raises(errors.InputError, match="touches the scan's border on axis 2, wanted a complete vertebra"):
        extraction.vertebra_cube(cut, 21)
    cube = extraction.vertebra_cube(cut, 21, allow_cut=True)
    assert cube.hu.min() == scans.AIR_HU and cube.density.max() > 0.03
    with pytest.raises(
        errors.InputError, match="mask of .* mm that does not fit, wanted one inside a cube of 24 x 24 x 24"
    ):
        extraction.vertebra_cube(scan, 21, 1.0, (24, 24, 24))


def test_oblique_and_upright_scans_of_one_body_x_ray_alike(oblique):
    """The oblique scan, resampled to RAS axes, gives the same X-ray: no function takes the array axes for the patient's."""
    scan, centre, _, _ = oblique
    affine = np.eye(4)
    affine[:3, 3] = centre - 0.5 * (np.array([64, 64, 56]) - 1)
    upright = scans.Scan(
        "upright",
        resample.resample(scan.hu, scan.ct_from_index, affine, (64, 64, 56)),
        resample.resample(scan.labels == 21, scan.ct_from_index, affine, (64, 64, 56)).round().astype(np.uint8) * 21,
        affine,
    )
    a, b = extraction.extract(scan, 21, 64), extraction.extract(upright, 21, 64)
    np.testing.assert_allclose(a.ct_from_box[:3, 3], b.ct_from_box[:3, 3], atol=0.1)
    np.testing.assert_allclose(a.ct_from_box[:3, 3], centre, atol=0.2)
    rng = np.random.default_rng(3)
    world_from_ct = carm.sample_world_from_ct(rng, centre)
    E, k = carm.sample_views(rng, carm.CArm()), np.stack([carm.intrinsics(carm.CArm(), 16)] * 2)
    images = [
        quick.render(v.density, v.ct_from_index, world_from_ct, k, E, (61, 61), 0.5, 2).astype(np.float64)
        for v in (a, b)
    ]
    assert images[0].max() > 0.5
    # Resampling mixes bone and muscle in border voxels.
    assert abs(images[0].sum() / images[1].sum() - 1) < 0.04
    assert np.corrcoef(images[0].ravel(), images[1].ravel())[0, 1] > 0.995
    # On oblique axes, removing the vertebra leaves no bone.
    rest = whole_body.WholeBody(scan, 2.0).without(a)
    assert rest.max() < attenuation.from_hounsfield(np.array(140.0, np.float32))


def _miss_mm(point, ct_from_index, rng):
    """Distance in mm between a point and the ray of its pixel, along CT -> voxel of a crop -> CT -> world -> pixel -> ray."""
    world_from_ct = carm.sample_world_from_ct(rng, point)
    fx, fy, cx, cy = carm.intrinsics(carm.CArm(), 4)
    misses = []
    for E in carm.sample_views(rng, carm.CArm()):
        index = np.linalg.solve(ct_from_index, [*point, 1.0])
        x, y, z, _ = E @ world_from_ct @ ct_from_index @ index
        u, v = fx * x / z + cx, fy * y / z + cy
        ray = E[:3, :3].T @ [(u - cx) / fx, (v - cy) / fy, 1.0]
        source = -E[:3, :3].T @ E[:3, 3]
        away = world_from_ct[:3, :3] @ point + world_from_ct[:3, 3] - source
        misses.append(np.linalg.norm(away - ray * (away @ ray) / (ray @ ray)))
    return max(misses)


def test_a_point_goes_from_ct_to_crop_to_world_to_pixel_and_its_ray_passes_it(oblique):
    scan, centre, _, _ = oblique
    rng = np.random.default_rng(4)
    for crop in (extraction.extract(scan, 21, 64), extraction.vertebra_cube(scan, 21, 0.9)):
        for _ in range(20):
            assert _miss_mm(centre + rng.normal(size=3) * 10, crop.ct_from_index, rng) < 0.01


# --- the shared scans ------------------------------------------------------------------------------------------------


def _paths(case):
    folder = DATA / case
    return next(folder.glob("*_ct.nii.gz"), None), next(folder.glob("*_msk.nii.gz")), next(folder.glob("*_ctd.json"))


def _scan(case):
    ct, mask, _ = _paths(case)
    if ct is not None:
        return scans.read_scan(ct, mask, case)
    # Without a CT, one of bone inside the labels.
    labels, affine = scans.segmentation.read_labels(mask)
    return scans.Scan(case, np.where(labels > 0, np.float32(600), np.float32(40)), labels, affine)


@needs_data
@pytest.mark.parametrize("entry", files.read_json(DATA / "cases.json") if (DATA / "cases.json").exists() else [])
def test_every_complete_vertebra_of_the_shared_scans(entry):
    """Complete ones are extracted with their full volume, and cut ones are refused."""
    scan = _scan(entry["case"])
    assert set(scan.boxes) == {int(label) for label in entry["labels"]}
    voxel = abs(np.linalg.det(scan.ct_from_index[:3, :3]))
    for label, listed in entry["labels"].items():
        label = int(label)
        if listed["touch"]:
            with pytest.raises(errors.InputError, match="touches the scan's border"):
                extraction.vertebra_cube(scan, label)
            assert extraction.vertebra_cube(scan, label, 3.0, (48, 48, 48), allow_cut=True).occupancy.max() > 0.9
            continue
        scans.complete_box(scan, label, "mask")
        cube = extraction.vertebra_cube(scan, label, 2.0, (60, 60, 60))
        volume = np.count_nonzero(scan.labels[scan.boxes[label]] == label) * voxel
        assert abs(volume / 1000 - listed["ml"]) < 0.1
        assert abs(cube.occupancy.sum() * 8.0 / volume - 1) < 0.02
        # The ray through the pixel of a labelled point passes the point.
        voxel_ct = scan.ct_from_index[:3] @ [*[0.5 * (s.start + s.stop - 1) for s in scan.boxes[label]], 1.0]
        assert _miss_mm(voxel_ct, cube.ct_from_index, np.random.default_rng(label)) < 0.01
    chosen = [int(label) for label, listed in entry["labels"].items() if not listed["touch"]][::6]
    for label in chosen:
        vertebra = extraction.extract(scan, label, 32)
        assert vertebra.mask.sum() * voxel / 1000 == pytest.approx(entry["labels"][str(label)]["ml"], abs=0.1)
        assert (vertebra.cloud.density > 0).sum() > 16


@needs_data
def test_centroids_lie_in_the_body_where_an_expert_puts_them():
    scan = _scan("verse004_mask")
    found, expert = centroid_files.centroids(scan), centroid_files.read_centroids(_paths("verse004_mask")[2], scan)
    assert set(found) == set(expert)
    apart = [np.linalg.norm(found[label] - expert[label]) for label in expert]
    assert np.median(apart) < 3.0 and max(apart) < 8.0


# --- centroid files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["RAS", "PIR", "LPS", "IAR"])
def test_centroid_files_name_the_same_voxel_along_any_axes(tmp_path, direction):
    labels = np.zeros((11, 17, 23), np.uint8)
    labels[7, 12, 3], labels[4, 5, 20] = 22, 21
    scan = scans.Scan("x", labels.astype(np.float32), labels, ct_files.nifti_affine(np.eye(3)))
    points = centroid_files.centroids(scan)
    np.testing.assert_allclose(points[22], scan.ct_from_index[:3] @ [7, 12, 3, 1])
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(np.eye(4)), nibabel.orientations.axcodes2ornt(direction)
    )
    ct_from_stored = scan.ct_from_index @ nibabel.orientations.inv_ornt_aff(turn, labels.shape)
    scan_files.write_centroids(tmp_path / "c.json", points, ct_from_stored, direction)
    back = centroid_files.read_centroids(tmp_path / "c.json", scan)
    assert set(back) == {21, 22}
    for label, point in points.items():
        np.testing.assert_allclose(back[label], point, atol=2e-3)
    # Coordinates are voxel indices of the label map stored along `direction`.
    stored = np.argwhere(nibabel.apply_orientation(labels, turn) == 22)[0]
    entry = files.read_json(tmp_path / "c.json")[2]
    np.testing.assert_allclose([entry[axis] for axis in "XYZ"], stored, atol=1e-3)
