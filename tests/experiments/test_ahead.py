"""Training steps compiled ahead of time: shapes, counts of operations, what the command says, and a compilation if there can be."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from experiments import compile_check
from experiments import configs
from experiments.training import ahead
from kernels.tools import compiler_output
from kernels.tools.chips import CHIPS
from radgs_jax.training import sharding

COMPILERS = os.environ.get("RADGS_GPU_WHEELS")
HLO = """\
HloModule step
%inner (a: f32[9]) -> f32[9] {
  %a = f32[9]{0} parameter(0)
  ROOT %twice = f32[9]{0} add(%a, %a)
}

ENTRY %main (p: f32[100]) -> f32[100] {
  %p = f32[100]{0} parameter(0)
  %f = f32[100]{0} fusion(%p), kind=kLoop, calls=%inner
  %b = f32[10,10]{1,0} bitcast(%f)
  %s = f32[100]{0} all-reduce-start(%f), channel_id=1, to_apply=%add
  %r = f32[100]{0} all-reduce-done(%s)
  %g = (f32[100]{0}, f32[400]{0}) all-gather-start(%r), channel_id=2, dimensions={0}
  %d = f32[400]{0} all-gather-done(%g)
  ROOT %slice = f32[100]{0} slice(%d), slice={[0:100]}
}
"""


@pytest.mark.parametrize("phase", ["rec", "reg", "joint"])
def test_an_abstract_step_takes_what_training_gives_it(trained, phase, monkeypatch):
    """The shapes, types and shardings of a tiny run's first step."""
    from experiments import data_stages
    from experiments.training import loop

    config, seen = tiny.config(), []

    class Seen(Exception):
        pass

    def make_update(mesh, *given):
        def update(*arguments):
            seen.append(arguments)
            raise Seen

        return update

    def pairs(config, workdir, name, pair_set, *rest):
        seen.append(pair_set)
        raise Seen

    monkeypatch.setattr(loop, "run_phases", pairs)
    with pytest.raises(Seen):
        data_stages.p1(config, trained[0], ("rec",))
    monkeypatch.undo()
    monkeypatch.setattr(loop, "make_update", make_update)
    mesh, params = sharding.make_mesh(), jax.jit(lambda: ahead.radgs_reg.init(config.model, jax.random.key(0)))()
    with pytest.raises(Seen):
        loop.run_phases(config, trained[0].with_name("ahead"), phase, seen.pop(), params, (3, 3, 3), 1e-3, (phase,))
    _, wanted = ahead.abstract_step(config, phase, mesh, config.batch)
    (given,) = seen
    assert jax.tree.structure(given) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(given), jax.tree.leaves(wanted)):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def test_operations_are_counted_as_multiply_adds():
    def layers(image, kernel, matrix):
        out = jax.lax.conv_general_dilated(image, kernel, (2, 2), "VALID")
        return jnp.sum(out.reshape(len(out), -1) @ matrix) + jnp.sum(
            matrix.astype(jnp.bfloat16) @ matrix.T.astype(jnp.bfloat16)
        )

    image, kernel = jnp.zeros((2, 3, 9, 11)), jnp.zeros((5, 3, 3, 3))
    matrix = jnp.zeros((5 * 4 * 5, 7))
    found = ahead.matrix_flops(jax.make_jaxpr(layers)(image, kernel, matrix).jaxpr)
    assert found == {"float32": 2 * (2 * 5 * 4 * 5) * 27 + 2 * 2 * 100 * 7, "bfloat16": 2 * 100 * 100 * 7}
    # The gradients of a convolution to its image and to its kernel have as many operations as itself, borders apart.
    both = jax.make_jaxpr(jax.grad(layers, (0, 1)))(image, kernel, matrix).jaxpr
    products = 2 * (2 * 5 * 4 * 5) * 27
    assert products * 2 < ahead.matrix_flops(both)["float32"] < products * 4

    def steps(carry):
        return jax.lax.scan(lambda c, _: (c @ c, None), carry, None, 6)[0]

    assert ahead.matrix_flops(jax.make_jaxpr(steps)(jnp.zeros((4, 4))).jaxpr) == {"float32": 6 * 2 * 64}


def test_bytes_are_read_from_the_compiled_text():
    assert compiler_output.collective_bytes(HLO) == {"all-reduce": 400, "all-gather": 1600}
    # fusion 800, all-reduce 800, all-gather 400 + 2000, slice 2000; parameters, bitcasts and inner computations move nothing.
    assert compiler_output.moved_bytes(HLO) == 800 + 800 + 2400 + 2000


def test_sending_is_a_ring_over_links_and_one_over_the_network():
    chip = dataclasses.replace(CHIPS["h100"], link=1e9, linked=8, network=1e8)
    sent = {"all-reduce": 8_000_000}
    assert ahead.sending_ms(chip, sent, 1) == 0
    assert ahead.sending_ms(chip, sent, 2) == pytest.approx(8.0)
    assert ahead.sending_ms(chip, sent, 8) == pytest.approx(2 * 7)
    assert ahead.sending_ms(chip, sent, 64) == pytest.approx(2 * 7 + 2 * 10 * 7 / 8)
    assert ahead.sending_ms(chip, {"all-gather": 8_000_000}, 8) == pytest.approx(7)
    compiled = {"flops": {"float32": chip.matrix["float32"]}, "moved": 0.0, "sent": sent}
    np.testing.assert_allclose(ahead.scaled(compiled, chip, (8,)), [[14.0, 1000 / 1014]])


def test_other_sizes_show_the_same_mm():
    before, sizes = configs.PAPER, ahead.Sizes(crop_px=976, grid=128)
    after = sizes.of(before)
    assert after.model.crop_px * after.model.pixel_mm == before.model.crop_px * before.model.pixel_mm
    assert after.model.grid * after.model.voxel_mm == before.model.grid * before.model.voxel_mm
    assert after.pairs.geometry.window / 976 >= before.pairs.geometry.window / before.model.crop_px
    assert ahead.Sizes().of(before) == before


def test_what_does_not_fit_is_an_error(monkeypatch):
    compiled = {
        "state": 1e9,
        "memory": 91e9,
        "collectives": {},
        "sent": {"all-reduce": 1e9},
        "moved": 1e10,
        "kernels": 4,
    }
    compiled |= {"flops": {"float32": 1e12}, "parameters": 10, "clouds": 2e6}
    small = {**compiled, "memory": 5e9}
    gathers = {**small, "sent": {"all-reduce": 1e9, "all-gather": 2e6}}
    monkeypatch.setattr(ahead, "compile_steps", lambda *_: [compiled, small, {"error": "no"}, gathers])
    text, wrong, _ = compile_check.check("8xh100", "paper", ahead.Sizes(), ("rec", "reg", "joint", "joint"), ())
    assert "| rec | 1.00 | 91.00 | 86 | 2.0 | 3.0 | 4 | 1000 | 0 | 3.89 |" in text and "| reg | 512 |" in text
    assert wrong == [
        "rec on 8xh100: found 91.0 GB a device, wanted 85.9 GB at most",
        "joint on 8xh100: no",
        "joint on 8xh100: found 2.0 MB gathered, wanted less than the batch's Gaussians, 2.0 MB",
    ]
    split = ahead.Sizes(mesh=(("fsdp", 2),))
    assert compile_check.check("8xh100", "paper", split, ("rec", "reg", "joint", "joint"), ())[1] == wrong[:2]


@pytest.mark.slow
@pytest.mark.skipif(COMPILERS is None, reason="RADGS_GPU_WHEELS names no folder with XLA's compiler")
def test_the_demos_step_compiles_for_eight_gpus_and_gathers_nothing():
    (compiled,) = ahead.compile_steps("8xh100", "demo", phases=("joint",), folders=(COMPILERS,))
    assert set(compiled["collectives"]) == {"all-reduce"} and compiled["kernels"] > 4
    assert compiled["memory"] < CHIPS["h100"].memory
    # Gradients, and the scalars of the metrics.
    assert 4 * compiled["parameters"] <= compiled["sent"]["all-reduce"] < 4.1 * compiled["parameters"]
