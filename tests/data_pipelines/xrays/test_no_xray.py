"""Images that are no X-rays, by what a reader can tell: noise, black, saturated."""

import dicom_forms
import numpy as np
import pytest
import xray_files

from data_pipelines.xrays import radiograph
from radgs_jax import errors


@pytest.mark.parametrize("kind", ["white", "poisson", "black"])
def test_noise_is_no_x_ray(kind, tmp_path):
    rng = np.random.default_rng(0)
    image = {
        "white": rng.integers(1, 4000, (512, 512)),
        "poisson": rng.poisson(900, (300, 400)),
        "black": np.maximum(rng.normal(2, 2, (256, 256)), 0).round(),
    }[kind].astype(np.uint16)
    path = xray_files.written(tmp_path, "noise.png", xray_files.png(image))
    with pytest.raises(errors.InputError, match="noise.png: pixels: found areas that have nothing in common"):
        radiograph.read(path, None, radiograph.ReadOptions(values="intensity"))
    quiet = dicom_forms.body((256, 256)) // 100 + rng.poisson(3, (256, 256))  # an X-ray in much noise is one
    path = xray_files.written(tmp_path, "weak.png", xray_files.png(quiet.astype(np.uint16)))
    assert radiograph.read(path, None, radiograph.ReadOptions(values="intensity")).line_integrals.shape == (256, 256)


def test_what_is_black_or_saturated_everywhere_is_refused_and_nearly_so_is_said(tmp_path, caplog):
    image = dicom_forms.body((200, 200))
    for value, found in ((0, "none with signal|usable of"), (4095, "usable of")):
        odd = np.full_like(image, value)
        odd[5:8, 5:8] = 1000
        path = dicom_forms.saved(tmp_path / "odd.dcm", dicom_forms.header(odd))
        with pytest.raises(errors.InputError, match=f"odd.dcm: pixels: found .*({found})"):
            radiograph.read(path, None, xray_files.XA)
    image[:, :160] = 4095
    with caplog.at_level("WARNING"):
        got = radiograph.read(dicom_forms.saved(tmp_path / "most.dcm", dicom_forms.header(image)), None, xray_files.XA)
    assert got.origin["valid_share"] == pytest.approx(0.2, abs=0.01)
    assert "most.dcm: pixels: found 20.0% usable" in caplog.text
