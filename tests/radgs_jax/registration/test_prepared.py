"""What a registration is given: prepared vertebrae and X-rays that do not fit together are refused."""

import dataclasses

import numpy as np
import pytest
import tiny_cases

from radgs_jax.geometry.xray import XRay
from radgs_jax.registration import confidence
from radgs_jax.registration.prepared import bare_parts


@pytest.fixture(scope="module")
def prepared():
    return tiny_cases.tiny_prepared()


@pytest.mark.parametrize(
    "changed", [{"refine": {"damping": 2e-3}}, {"refine": {"blur_px": 2.0}}, {"search": {"max_walk": 5}}]
)
def test_a_rule_of_another_method_is_refused(prepared, changed):
    """The rule of this refinement and search is taken; those of another refinement or search are not."""
    own = confidence.method_digest(prepared.refine, prepared.search)
    rule = confidence.AcceptanceRule((0.0,) * 9, (0.5,) * 2, (0.0,) * 2, 2.0, own)
    assert dataclasses.replace(prepared, rule=rule).rule is rule
    others = {name: dataclasses.replace(getattr(prepared, name), **fields) for name, fields in changed.items()}
    with pytest.raises(ValueError, match=f"fitted for .*{own}"):
        dataclasses.replace(prepared, rule=rule, **others)


def test_bare_parts_are_the_vertebra_in_air(prepared):
    bare = bare_parts(prepared)
    assert bare.excess.shape == prepared.parts.excess.shape and bare.rest.shape == prepared.parts.rest.shape
    assert not np.any(bare.rest)
    np.testing.assert_allclose(bare.excess, 2.0 * prepared.parts.excess, rtol=1e-5, atol=1e-7)


def test_xrays_of_other_shapes_than_their_cameras_are_refused():
    (xray, _), camera = tiny_cases.two_xrays(), tiny_cases.two_xrays()[0].camera
    assert xray.valid.shape == (60, 60) and xray.valid.all()
    for image, valid, name in (
        (np.zeros((60, 59)), None, "line_integrals"),
        (np.zeros((3, 60, 60)), None, "line_integrals"),
        (np.zeros((60, 60)), np.ones((59, 60), bool), "valid"),
    ):
        with pytest.raises((ValueError, TypeError), match="line_integrals|valid") as found:
            XRay(image, valid, camera)
        assert name in str(found.value)
