"""Start poses from files: the program's own results and ITK transforms give back the pose; everything else is one line."""

import json

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from data_pipelines.io import pose_files
from experiments.reports import case_folder
from radgs_jax import errors

POSE = np.eye(4)
POSE[:3, :3], POSE[:3, 3] = Rotation.from_rotvec([0.2, -0.4, 0.1]).as_matrix(), [85.4, 64.4, 258.8]
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def written(tmp_path, content, name="pose.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    "value",
    [
        POSE.tolist(),
        {"world_from_ct": POSE.tolist()},
        {"T": POSE.tolist()},
        {"world_from_ct": POSE.tolist(), "start_world_from_ct": np.eye(4).tolist(), "accepted": False, "units": "mm"},
        {"format": "biplanar-vertebra-results/1", "results": [{"id": "case", "T": POSE.tolist(), "accepted": True}]},
    ],
)
def test_json_in_every_form(tmp_path, value):
    np.testing.assert_array_equal(pose_files.read_pose(written(tmp_path, value)), POSE)


def test_the_programs_own_transform_comes_back(tmp_path):
    """Whatever its name; ends of lines as Windows writes them."""
    text = case_folder.itk_transform(POSE)
    for name, content in (("pose.tfm", text), ("pose.txt", text.replace("\n", "\r\n")), ("pose.json", text)):
        np.testing.assert_allclose(pose_files.read_pose(written(tmp_path, content, name)), POSE, atol=1e-10)


def itk(kind, parameters, fixed="0 0 0"):
    return (
        f"{pose_files.ITK_START}\n#Transform 0\nTransform: {kind}\nParameters: {parameters}\nFixedParameters: {fixed}\n"
    )


# Transforms that SimpleITK 2.5 wrote, and where its TransformPoint moves (10, -20, 30).
OF_ITK = {
    "Euler3DTransform_double_3_3": (
        "0.2739233746429086 -0.4604265724722594 -0.9180529521276106 10.663577576717984 22.949656098399842 4.362499146542284",
        "-48.34723644714709 31.327023920027244 41.27555772777217 0",
    ),
    "Euler3DTransform_double_3_3 ZYX": (
        "0.7148085531751387 -0.9328288493890713 0.45931089285988813 -20.028810946261522 -7.731277880234153 -47.168032885453705",
        "-32.4344379397441 36.31789223498866 4.146122024909168 1",
    ),
    "VersorRigid3DTransform_double_3_3": (
        "0.2217574104098847 0.29567654721317965 0.3695956840164745 18.844673057094013 -11.107857602089624 -36.49034949775888",
        "48.08353387762301 18.55419844806947 15.045927626781634",
    ),
    "AffineTransform_double_3_3": (
        "0.4751055205499023 -0.7627878172641954 0.4386678586086867 0.5301821162333512 0.6460281822546237 0.5491397921832948 "
        "-0.7022689427629074 -0.028325493219203458 0.71134801501414 9.430003019969682 -16.208877449286675 -10.838099947183878",
        "-14.220480329092979 7.152983072976092 -17.813060892405787",
    ),
}
MOVED = {
    "Euler3DTransform_double_3_3": (-45.5484865741, -23.8406971197, 46.9876723113),
    "Euler3DTransform_double_3_3 ZYX": (9.0800289956, -7.3307550206, -19.290559442),
    "VersorRigid3DTransform_double_3_3": (75.1384834434, -48.162316658, -20.6230684848),
    "AffineTransform_double_3_3": (48.4028243312, 12.4998331654, -10.879604358),
}


@pytest.mark.parametrize("name", OF_ITK)
def test_rigid_transforms_of_itk(tmp_path, name):
    path = written(tmp_path, itk(name.split()[0], *OF_ITK[name]), "t.tfm")
    ct_from_world = LPS @ np.linalg.inv(pose_files.read_pose(path)) @ LPS
    np.testing.assert_allclose((ct_from_world @ [10, -20, 30, 1])[:3], MOVED[name], atol=1e-9)


AFFINE = "AffineTransform_double_3_3"
NO_POSE = {
    "several results": (
        {"results": [{"T": POSE.tolist()}] * 2},
        "results: found 2 poses, wanted the results of one case",
    ),
    "no results": ({"results": []}, "results: found 0 poses"),
    "both keys": ({"T": POSE.tolist(), "world_from_ct": POSE.tolist()}, "found both world_from_ct and T"),
    "no key": ({"ct_from_world": POSE.tolist()}, r"found an object with the keys \['ct_from_world'\]"),
    "flat": (POSE.ravel().tolist(), "found 16 numbers in one list"),
    "transposed": ({"T": POSE.T.tolist()}, "T: found a matrix with the last row .* wanted it transposed"),
    "mirrored": ((LPS[:, [1, 0, 2, 3]] @ POSE).tolist(), "found a matrix that mirrors"),
    "null": (None, "wanted a .*matrix of numbers"),
    "text": ("hello", "content: found .*wanted valid JSON"),
    "scaled": (itk(AFFINE, "2 0 0 0 2 0 0 0 2 0 0 0"), "Parameters: found a matrix with a scale of 2"),
    "sheared": (itk(AFFINE, "1 0.2 0 0 1 0 0 0 1 0 0 0"), "Parameters: found a matrix"),
    "few numbers": (itk(AFFINE, "1 0 0 0 1 0 0 0 1"), "Parameters: found 9 numbers, wanted 12"),
    "nan": (itk(AFFINE, "1 0 0 0 1 0 0 0 nan 0 0 0"), "Parameters: found values that are not finite"),
    "words": (itk(AFFINE, "one"), "Parameters: found 'one', wanted numbers"),
    "centre": (itk(AFFINE, "1 0 0 0 1 0 0 0 1 0 0 0", "0 0"), "FixedParameters: found 2 numbers"),
    "versor": (itk("VersorRigid3DTransform_double_3_3", "1 1 0 0 0 0"), "a versor of length 1.41421"),
    "similarity": (
        itk("Similarity3DTransform_double_3_3", "0 0 0 0 0 0 1"),
        "Transform: found .*wanted a rigid transform",
    ),
    "plane": (itk("AffineTransform_double_2_2", "1 0 0 1 0 0"), "Transform: found 'AffineTransform_double_2_2'"),
    "two": (itk(AFFINE, "1 0 0 0 1 0 0 0 1 0 0 0") + itk(AFFINE, "1 0 0 0 1 0 0 0 1 0 0 0"), "fields: found"),
    "cut": (itk(AFFINE, "1 0 0").split("Fixed")[0], "fields: found"),
}


@pytest.mark.parametrize("name", NO_POSE)
def test_everything_else_is_one_line(tmp_path, name):
    content, said = NO_POSE[name]
    path = written(tmp_path, content)
    with pytest.raises(errors.InputError, match=said) as caught:
        pose_files.read_pose(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_missing_and_unreadable_files(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(errors.InputError, match="wanted a pose in JSON"):
            pose_files.read_pose(path)
    (tmp_path / "b.tfm").write_bytes(pose_files.ITK_START.encode() + b"\n\xff\xfe")
    with pytest.raises(errors.InputError, match="content: found"):
        pose_files.read_pose(tmp_path / "b.tfm")
