"""Case files and their X-rays: round trips, and one clear line on bad input."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from data_pipelines import cases
from data_pipelines.io import camera_files
from data_pipelines.io import files
from radgs_jax import errors
from radgs_jax import metrics


def test_case_file_round_trip(case_path, stored):
    case_file = cases.read(case_path)
    assert [c.name[-2:] for c in case_file.cases] == ["b0", "b1"]
    scene = next(iter(case_file.scenes.values()))
    xrays = cases.read_xrays(scene, "real")
    assert [x.camera for x in xrays] == list(scene.cameras) and all(x.valid.all() for x in xrays)
    assert len(xrays) == 2 and xrays[0].line_integrals.shape == (scene.cameras[0].height, scene.cameras[0].width)
    points = case_file.raw["volumes"][scene.volume]["points"]
    for case, (low, high) in zip(case_file.cases, ((0, 5), (20, 25))):
        assert low <= metrics.mtre(points, case.world_from_ct, cases.truth(case_file, scene)) <= high
    assert case_file.volumes[scene.volume].full_ct.resolve() == pathlib.Path(stored[1]).resolve()
    easy, full = cases.read_xrays(scene, "easy"), cases.read_xrays(scene, "full")
    assert all((f.line_integrals >= e.line_integrals - 0.05).all() for e, f in zip(easy, full))


def test_projection_alone_decomposes_into_the_same_camera(case_path):
    document = files.read_json(case_path)
    view = document["scenes"][0]["views"][0]
    with_both = camera_files.read_camera("f", "v", view)
    for scale in (1.0, -3.0):
        alone = camera_files.read_camera(
            "f", "v", {"P": (scale * np.array(view["P"])).tolist(), "height": 244, "width": 244}
        )
        np.testing.assert_allclose(alone.intrinsics, with_both.intrinsics, rtol=1e-9)
        np.testing.assert_allclose(alone.camera_from_world, with_both.camera_from_world, atol=1e-7)


def _broken(document, change):
    value = json.loads(json.dumps(document))
    change(value)
    return value


BROKEN = {
    "format": (lambda d: d.update(format="x/2"), "format: found 'x/2'"),
    "no volumes": (lambda d: d.pop("volumes"), "file.volumes: found nothing"),
    "label type": (
        lambda d: next(iter(d["volumes"].values())).update(full_label="20"),
        "full_label: found '20', wanted a int",
    ),
    "scene volume": (lambda d: d["scenes"][0].update(volume="v"), r"scenes\[0\].volume: found 'v'"),
    "start not rigid": (lambda d: d["cases"][0]["T_init"][0].__setitem__(0, 2.0), r"cases\[0\].T_init: found a matrix"),
    "start with nan": (
        lambda d: d["cases"][0]["T_init"][0].__setitem__(0, float("nan")),
        "T_init: found values that are not finite",
    ),
    "start shape": (lambda d: d["cases"][0].update(T_init=[[1, 0], [0, 1]]), r"T_init: found shape \(2, 2\)"),
    "skewed K": (lambda d: d["scenes"][0]["views"][0]["K"][0].__setitem__(1, 5.0), r"views\[0\].K"),
    "view without camera": (lambda d: d["scenes"][0]["views"][0].clear(), r"views\[0\]: found {}"),
    "size": (lambda d: d["scenes"][0]["views"][1].update(height=-4), "height, width"),
    "scene twice": (lambda d: d["scenes"].append(d["scenes"][0]), r"scenes\[1\].id: found '.*' a second time"),
    "case twice": (lambda d: d["cases"].append(d["cases"][0]), r"cases\[2\].id: found '.*' a second time"),
    "case scene": (lambda d: d["cases"][0].update(scene="s"), r"cases\[0\].scene: found 's'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_case_files_are_one_clear_line(case_path, tmp_path, name):
    change, message = BROKEN[name]
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(_broken(files.read_json(case_path), change)))
    with pytest.raises(errors.InputError, match=message) as caught:
        cases.read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_points_are_wanted_for_scoring_only(case_path, tmp_path):
    name = next(iter(cases.read(case_path).volumes))
    assert cases.points(cases.read(case_path), name).shape == (500, 3)
    for value in ({}, {"points": []}, {"points": [[1, 2]]}, {"points": "x"}):
        document = files.read_json(case_path)
        del document["volumes"][name]["points"]
        document["volumes"][name].update(value)
        files.write_json(tmp_path / "cases.json", document)
        read = cases.read(tmp_path / "cases.json")
        with pytest.raises(errors.InputError, match=f"cases.json: volumes.{name}.points: found .*, wanted"):
            cases.points(read, name)


def test_xrays_must_fit_their_views(case_path, tmp_path):
    scene = next(iter(cases.read(case_path).scenes.values()))
    stack = files.read_npz(scene.xrays, "real")["real"]
    bad = {"shape": stack[:, :-1], "views": stack[:1], "nan": np.where(np.arange(stack.shape[2]) == 3, np.nan, stack)}
    messages = {
        "shape": r"'real'\[0\]: shape: found \(243, 244\), wanted \(244, 244\)",
        "views": r"wanted \(2, height, width\)",
        "nan": "488|pixels that are not finite",
    }
    for name, array in bad.items():
        files.write_npz(tmp_path / f"{name}.npz", real=array)
        with pytest.raises(errors.InputError, match=messages[name]):
            cases.read_xrays(dataclasses.replace(scene, xrays=tmp_path / f"{name}.npz"), "real")
