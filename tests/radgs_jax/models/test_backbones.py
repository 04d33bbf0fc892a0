"""Backbones: shapes and sizes against the published networks (abstractly, nothing is computed), and small real runs."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radgs_jax.models import backbones

# Every family with few layers, so that it compiles in seconds.
REDUCED = {
    "small": {"widths": (8, 12, 16), "blocks": (1, 1, 1), "out": 8},
    "resnet18": {"width": 16, "blocks": (1, 1)},
    "resnet50": {"blocks": (1, 1)},
    "densenet121": {"blocks": (2, 2)},
    "vit12": {"patch": 8, "depth": 2, "width": 32, "heads": 4, "mlp": 64},
}


def abstract(name, shape, **kwargs):
    """Abstract output and variables of a backbone for an input of `shape`."""
    model = backbones.make_backbone(name, **kwargs)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(model.init_with_output, jax.random.key(0), x)


def random_params(model, x):
    """Parameters off their initial values, zeros and ones included, at a scale that keeps the signal's."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    # NumPy's draws need no compilation, which for JAX's takes longer than the networks themselves.
    return jax.tree.map(lambda p: rng.normal(0.0, (p.shape[-1] / p.size) ** 0.5, p.shape).astype(p.dtype), shapes)


@pytest.mark.parametrize(
    "name, kwargs, shape, expected",
    [
        ("small", {}, (2, 64, 48, 1), (2, 16, 12, 64)),
        ("small", {}, (2, 24, 32, 40, 1), (2, 6, 8, 10, 64)),
        ("small", {}, (1, 42, 38, 1), (1, 11, 10, 64)),
        ("small", {"reduce": 3}, (2, 24, 24, 24, 2), (2, 4, 4, 4, 64)),
        ("small", {"pyramid": False}, (2, 32, 32, 32, 2), (2, 4, 4, 4, 64)),
        ("small", {"widths": (16,), "blocks": (1,), "out": 24}, (2, 32, 32, 1), (2, 16, 16, 24)),
        ("small", {"widths": (16, 32), "blocks": (1, 1)}, (2, 32, 32, 1), (2, 8, 8, 64)),
        ("small", {"widths": (8, 16, 24, 32), "blocks": (1, 1, 1, 1)}, (2, 64, 64, 1), (2, 16, 16, 64)),
        ("resnet18", {}, (2, 256, 224, 1), (2, 8, 7, 512)),
        ("resnet18", {"width": 32}, (2, 64, 100, 2), (2, 2, 4, 256)),
        ("resnet18", {"width": 16}, (1, 64, 96, 64, 1), (1, 2, 3, 2, 128)),
        ("resnet50", {}, (2, 256, 224, 1), (2, 8, 7, 2048)),
        ("resnet50", {}, (1, 100, 65, 1), (1, 4, 3, 2048)),
        ("resnet50", {}, (1, 64, 96, 64, 1), (1, 2, 3, 2, 2048)),
        ("densenet121", {}, (1, 100, 65, 1), (1, 4, 3, 1024)),
        ("densenet121", {}, (1, 64, 96, 64, 1), (1, 2, 3, 2, 1024)),
        ("vit12", {}, (2, 224, 256, 1), (2, 14, 16, 768)),
        ("vit12", {}, (1, 64, 48, 32, 1), (1, 8, 6, 4, 768)),
        ("vit12", {"patch": 32, "width": 96, "heads": 3}, (1, 64, 64, 1), (1, 2, 2, 96)),
    ],
)
def test_shapes(name, kwargs, shape, expected):
    y, variables = abstract(name, shape, **kwargs)
    chex.assert_shape(y, expected)
    chex.assert_type(y, jnp.float32)
    # No mutable state: the parameters are all there is, and they are float32.
    assert set(variables) == {"params"}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "name, published",
    # torchvision's counts less the classifier; for ViT also less the class token and its position.
    [
        ("resnet18", 11689512 - 513000),
        ("resnet50", 25557032 - 2049000),
        ("densenet121", 7978856 - 1025000),
        ("vit12", 86567656 - 769000 - 2 * 768),
    ],
)
def test_parameter_counts_are_the_published_ones(name, published):
    _, variables = abstract(name, (1, 224, 224, 3))
    assert backbones.count_parameters(variables["params"]) == published


@pytest.mark.parametrize("shape, reduce, pyramid", [((2, 64, 64, 1), 2, True), ((1, 24, 24, 24, 1), 3, False)])
def test_small_trains(shape, reduce, pyramid):
    model = backbones.make_backbone("small", blocks=(1, 1, 1), reduce=reduce, pyramid=pyramid)
    x = jax.random.uniform(jax.random.key(1), shape)
    # The "rbg" generator compiles several times faster than the default one.
    params = jax.jit(model.init)(jax.random.key(0, impl="rbg"), x)

    @jax.jit
    def step(params):
        value, grads = jax.value_and_grad(lambda p: jnp.mean((model.apply(p, x) - 1.0) ** 2))(params)
        return value, grads, jax.tree.map(lambda p, g: p - 1e-2 * g, params, grads)

    first, _, params = step(params)
    # From the second step on the residual branches have left zero and every parameter in use gets a gradient.
    second, grads, _ = step(params)
    assert np.isfinite(first) and second < first
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.any(grad != 0), jax.tree_util.keystr(path)


def test_small_keeps_features_in_place():
    """A mirrored input gives mirrored features when the kernels are symmetric: no level is shifted against another."""
    model = backbones.SmallCNN(**REDUCED["small"])
    x = jax.random.uniform(jax.random.key(1), (1, 32, 32, 1))
    # Constant kernels are symmetric under any flip, also across the channels that space_to_depth makes.
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    params = jax.tree.map(lambda p: np.full(p.shape, 0.5 * p.shape[-1] / p.size, p.dtype), shapes)
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(apply(params, x[:, ::-1]), apply(params, x)[:, ::-1], rtol=1e-4)


@pytest.mark.parametrize("name", REDUCED)
@pytest.mark.parametrize("spatial", [(32, 32), (16, 16, 16)])
def test_items_of_a_batch_are_independent(name, spatial):
    model = backbones.make_backbone(name, **REDUCED[name])
    x = jax.random.uniform(jax.random.key(1), (2, *spatial, 1))
    params = random_params(model, x)
    apply = jax.jit(model.apply)
    y, other = apply(params, x), apply(params, x.at[1].multiply(-100.0))
    assert np.isfinite(y).all()
    np.testing.assert_allclose(other[0], y[0], rtol=1e-5, atol=1e-5)
    assert np.abs(other[1] - y[1]).max() > 1e-3


def test_a_narrow_resnet18_sees_an_image_that_ends_in_one_cell():
    """In groups of one channel, its last norm would make every image the same."""
    model = backbones.ResNet18(width=4, blocks=(1, 1, 1, 1))
    x = jax.random.uniform(jax.random.key(1), (2, 32, 32, 1))
    y = jax.jit(model.apply)(random_params(model, x), x)
    chex.assert_shape(y, (2, 1, 1, 32))
    assert np.abs(y[0] - y[1]).max() > 0.1 * np.abs(y).max()


def test_space_to_depth_order():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    y = backbones.space_to_depth(x, 2)
    chex.assert_shape(y, (2, 2, 3, 12))
    np.testing.assert_array_equal(y[1, 1, 2], x[1, 2:4, 4:6].reshape(-1))
    v = jnp.arange(3 * 6 * 9.0).reshape(1, 3, 6, 9, 1)
    np.testing.assert_array_equal(backbones.space_to_depth(v, 3)[0, 0, 1, 2], v[0, :, 3:6, 6:9].reshape(-1))


def test_errors():
    with pytest.raises(ValueError, match=r"'resnet34'.*small, resnet18, resnet50, densenet121, vit12"):
        backbones.make_backbone("resnet34")
    with pytest.raises(ValueError, match=r"unknown backbone <class 'int'>.*or a Flax module's class"):
        backbones.make_backbone(int)
    with pytest.raises(ValueError, match=r"\(5, 4\) is not divisible by 2"):
        backbones.space_to_depth(jnp.zeros((1, 5, 4, 1)), 2)
    with pytest.raises(ValueError, match=r"\(64, 40\) is not divisible by 16"):
        abstract("vit12", (1, 64, 40, 1))
    with pytest.raises(ValueError, match=r"\(24, 24, 20\) is not divisible by 8"):
        abstract("vit12", (1, 24, 24, 20, 1))
    with pytest.raises(ValueError, match=r"\(8, 16\) and blocks \(1, 2, 2\) differ"):
        abstract("small", (1, 32, 32, 1), widths=(8, 16))


@pytest.mark.parametrize("options", [{"bfloat16": True}, {"remat": True}, {"bfloat16": True, "remat": True}])
def test_backbones_of_training_have_the_same_parameters(options):
    """In lower precision or computed twice: float32 features of the same parameters, and a gradient close to the plain one."""

    def features(options):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                return backbones.make_backbone("resnet18", **REDUCED["resnet18"], **options)(x)

        return Net()

    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    plain, other = features({}), features(options)
    params = plain.init(jax.random.key(1), x)
    assert jax.tree.map(jnp.shape, other.init(jax.random.key(1), x)) == jax.tree.map(jnp.shape, params)
    loss = lambda net: jax.jit(jax.value_and_grad(lambda params: jnp.mean(net.apply(params, x) ** 2)))
    (wanted, gradient), (found, other_gradient) = loss(plain)(params), loss(other)(params)
    assert other.apply(params, x).dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(other_gradient)} == {jnp.dtype(jnp.float32)}
    tolerance = 0.1 if options.get("bfloat16") else 1e-4
    np.testing.assert_allclose(found, wanted, rtol=tolerance)
    miss = jnp.sqrt(sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (gradient, other_gradient)))))
    size = jnp.sqrt(sum(jnp.sum(a**2) for a in jax.tree.leaves(gradient)))
    assert miss < 3 * tolerance * size
