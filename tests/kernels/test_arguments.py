"""Arguments that the operators refuse, and the order in which backends are tried."""

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest

from kernels.common import dispatch
from kernels.drr import api as drr_api
from kernels.splat import api as splat_api
from kernels.voxelize import api as voxelize_api


def test_unknown_implementations_are_named():
    cloud = [jnp.ones(shape) for shape in ((5,), (5, 3), (5, 6), (4,))]
    ray, affine = jnp.ones((1, 4)), jnp.ones((1, 3, 4))
    for call in (
        lambda: splat_api.splat(*cloud, 9, 12, implementation="cuda"),
        lambda: splat_api.splat(*cloud, 9, 12, implementation=("xla", "cuda")),
        lambda: voxelize_api.voxelize(*cloud[:3], (5, 6, 7), implementation="cuda"),
        lambda: drr_api.drr(jnp.ones((4, 5, 6)), affine, ray, 5, 6, implementation="cuda"),
    ):
        with pytest.raises(ValueError, match=r"'cuda'.*'xla'"):
            call()


@pytest.mark.parametrize("index,shape", [(1, (4, 3)), (1, (5, 2)), (2, (5, 9)), (2, (2, 5, 6)), (3, (3,)), (3, (2, 4))])
def test_wrong_shapes_are_refused(index, shape):
    arrays = [jnp.ones(s) for s in ((5,), (5, 3), (5, 6), (4,))]
    arrays[index] = jnp.ones(shape)
    with pytest.raises(ValueError, match="shape"):
        splat_api.splat(*arrays, 9, 12)
    if index < 3:
        with pytest.raises(ValueError, match="shape"):
            voxelize_api.voxelize(*arrays[:3], (5, 6, 7))


@pytest.mark.parametrize(
    "shapes",
    [
        ((5, 6), (2, 3, 4), (2, 4)),
        ((5, 6, 7), (2, 4, 4), (2, 4)),
        ((5, 6, 7), (2, 3, 4), (3, 4)),
        ((5, 6, 7), (3, 4), (4,)),
    ],
)
def test_drr_refuses_wrong_shapes(shapes):
    with pytest.raises(ValueError, match="drr"):
        drr_api.drr(*(jnp.ones(s) for s in shapes), 5, 6)


@pytest.mark.parametrize("step_mm", [0.0, -1.0, np.nan])
def test_drr_refuses_steps_that_are_not_positive(step_mm):
    with pytest.raises(ValueError, match="step_mm"):
        drr_api.drr(jnp.ones((4, 5, 6)), jnp.ones((1, 3, 4)), jnp.ones((1, 4)), 5, 6, step_mm=step_mm)


def test_drr_honours_its_implementation_backward(monkeypatch):
    def unable(*_):
        raise NotImplementedError("no such device")

    for name, backward in (("ffi_cpu", unable), ("xla", lambda shape, *_: jnp.full(shape, 2.0, jnp.float32))):
        monkeypatch.setitem(drr_api.FORWARD, name, lambda volume, origin, direction, step_mm: direction[..., 0])
        monkeypatch.setitem(drr_api.TO_VOLUME, name, backward)
    arrays = kernel_cases.to_single(
        kernel_cases.smooth_volume(), kernel_cases.voxel_from_camera(), kernel_cases.DRR_CAMERAS
    )
    to_volume = lambda implementation: jax.grad(
        lambda volume: jnp.sum(drr_api.drr(volume, *arrays[1:], *kernel_cases.DRR_SIZE, implementation=implementation))
    )(arrays[0])
    with pytest.raises(NotImplementedError, match="no such device"):
        to_volume("ffi_cpu")
    for implementation in ("xla", None, ["ffi_cpu", "xla"]):
        assert np.all(to_volume(implementation) == 2.0)


def test_dispatch_falls_back_in_order():
    def unable(x):
        raise NotImplementedError("no such device")

    def run(backends, implementation):
        (found,) = dispatch.run("op", backends, implementation, lambda backend, x: backend(x), jnp.float32(1.0))
        return found

    backends = {"best": unable, "plain": lambda x: x + 1, "other": lambda x: x + 2}
    for call in (run, lambda *choice: jax.jit(lambda: run(*choice))()):
        assert call(backends, None) == 2
        assert call(backends, ("best", "other")) == 3
        with pytest.raises(NotImplementedError, match="no such device"):
            call(backends, "best")
        with pytest.raises(ExceptionGroup) as failure:
            call({"best": unable, "next": unable}, None)
        assert len(failure.value.exceptions) == 2
