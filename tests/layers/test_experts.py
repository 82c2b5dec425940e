"""The expert function's implementations against a plain float64 loop, and their gradients against the dense oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnres_jax.layers.experts import IMPLEMENTATIONS, LARGEST_BLOCK, experts, grouped_matmul

NUM_EXPERTS = 5
CHOICES = {
    "random": lambda rng, tokens: np.stack([rng.permutation(NUM_EXPERTS)[:2] for _ in range(tokens)]),
    "one without rows": lambda rng, tokens: np.stack([rng.permutation([0, 1, 3, 4])[:2] for _ in range(tokens)]),
    "all on one": lambda rng, tokens: np.full((tokens, 2), 3),
    "first and last": lambda rng, tokens: np.tile([4, 0], (tokens, 1)),
}


def arguments(choice, tokens=21, width=6, hidden=7, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(NUM_EXPERTS, width, hidden), (NUM_EXPERTS, width, hidden), (NUM_EXPERTS, hidden, width)]
    kernels = [rng.normal(size=shape) for shape in shapes]
    return rng.normal(size=(tokens, width)), CHOICES[choice](rng, tokens), rng.normal(size=(tokens, 2)), *kernels


def by_hand(x, indices, weights, gate, up, down, activation):
    y = np.zeros_like(x)
    for n, row in enumerate(x):
        for expert, weight in zip(indices[n], weights[n], strict=True):
            left, right = row @ gate[expert], row @ up[expert]
            if activation == "silu":
                hidden = left / (1 + np.exp(-left)) * right
            else:
                hidden = 4 * np.tanh(left / 4) / (1 + np.exp(-left)) * 25 * np.tanh(right / 25)
            y[n] += weight * (hidden @ down[expert])
    return y


@pytest.mark.parametrize("activation", ["silu", "situ"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_a_plain_loop(implementation, activation):
    for choice in CHOICES:
        given = arguments(choice)
        with jax.enable_x64(True):
            y = experts(*map(jnp.asarray, given), activation=activation, implementation=implementation)
        np.testing.assert_allclose(y, by_hand(*given, activation), rtol=1e-12, atol=1e-12, err_msg=choice)


def gradients(given, implementation):
    x, indices, weights, *kernels = map(jnp.asarray, given)

    def value(x, weights, *kernels):
        return jnp.sum(jnp.sin(experts(x, indices, weights, *kernels, implementation=implementation)))

    return jax.jit(jax.grad(value, argnums=(0, 1, 2, 3, 4)))(x, weights, *kernels)


@pytest.mark.parametrize("implementation", ["auto", "ragged", "sorted"])
def test_gradients_equal_the_dense_oracles(implementation):
    for choice in CHOICES:
        given = arguments(choice)
        with jax.enable_x64(True):
            found, expected = gradients(given, implementation), gradients(given, "dense")
            for x_bar, y_bar in zip(found, expected, strict=True):
                np.testing.assert_allclose(x_bar, y_bar, rtol=1e-11, atol=1e-12, err_msg=choice)


def test_an_expert_without_rows_has_zero_gradients():
    _, _, *kernels_bar = gradients(arguments("one without rows"), "sorted")
    assert all(not np.any(bar[2]) and np.any(bar[1]) for bar in kernels_bar)


@pytest.mark.parametrize("counts", [[700, 0, 3, 129, 128], [0, 0, 960, 0, 0], [1, 1, 1, 1, 956], [192] * 5])
def test_blocks_of_sorted_rows(counts):
    """Experts of several blocks, of less than one, and of none; the last block shorter than the others."""
    rng = np.random.default_rng(0)
    rows, kernels, y_bar = (rng.normal(size=shape) for shape in ((960, 3), (5, 3, 4), (960, 4)))
    assert max(counts) > LARGEST_BLOCK
    ends = np.cumsum(counts)
    parts = [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]
    with jax.enable_x64(True):
        product = lambda rows, kernels: grouped_matmul(rows, kernels, jnp.asarray(counts), "sorted")  # noqa: E731
        y, pullback = jax.vjp(product, jnp.asarray(rows), jnp.asarray(kernels))
        rows_bar, kernels_bar = pullback(jnp.asarray(y_bar))
    for expert, part in enumerate(parts):
        np.testing.assert_allclose(y[part], rows[part] @ kernels[expert], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(rows_bar[part], y_bar[part] @ kernels[expert].T, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(kernels_bar[expert], rows[part].T @ y_bar[part], rtol=1e-12, atol=1e-10)


def test_half_precision_sums_in_float32():
    """Sums over rows and over experts are float32, so the error is one rounding each and not one an addend."""
    x, indices, weights, *kernels = arguments("all on one", tokens=600)
    half = [jnp.asarray(array, jnp.bfloat16) for array in (x, *kernels)]
    wide = [np.asarray(array, np.float64) for array in half]
    y = experts(half[0], jnp.asarray(indices), jnp.asarray(weights, jnp.float32), *half[1:], implementation="sorted")
    assert y.dtype == jnp.float32
    expected = by_hand(wide[0], indices, weights, *wide[1:], "silu")
    assert np.linalg.norm(y - expected) < 1e-2 * np.linalg.norm(expected)
    ones = jnp.ones((1000, 2), jnp.bfloat16)
    counts = jnp.array([1000, 0, 0, 0, 0])
    _, pullback = jax.vjp(lambda kernels: grouped_matmul(ones, kernels, counts, "sorted"), half[1][:, :2])
    assert float(pullback(jnp.ones((1000, 7), jnp.bfloat16))[0][0, 0, 0]) == 1000


def test_gradient_keeps_the_memory_of_rows():
    """The backward pass of 64 experts holds no copy of kernels per block or row beyond the gradients themselves."""
    tokens, width, num_experts = 512, 64, 64
    x, kernels = jnp.zeros((tokens, width)), [jnp.zeros((num_experts, width, width))] * 3
    indices, weights = jnp.zeros((tokens, 2), int), jnp.ones((tokens, 2))

    def value(x, kernels):
        return jnp.sum(experts(x, indices, weights, *kernels, implementation="sorted") ** 2)

    compiled = jax.jit(jax.grad(value, argnums=(0, 1))).lower(x, kernels).compile()
    rows, kernel = 2 * tokens * width * 4, num_experts * width * width * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 12 * rows + 1.5 * kernel


@pytest.mark.parametrize("platform, ragged", [("cpu", False), ("cuda", True), ("tpu", True)])
def test_auto_is_decided_where_the_program_will_run(platform, ragged):
    """Which need not be the machine that compiles it."""
    x, indices, weights, *kernels = (jnp.asarray(array, jnp.float32) for array in arguments("random"))

    def value(x, weights, *kernels):
        return jnp.sum(experts(x, indices.astype(int), weights, *kernels))

    traced = jax.jit(jax.grad(value, argnums=(0, 2))).trace(x, weights, *kernels)
    assert ("ragged_dot" in traced.lower(lowering_platforms=(platform,)).as_text()) == ragged


def test_kernels_keep_their_dtype_and_are_saved_as_they_are():
    """Float32 parameters under bfloat16 tokens: no copy in half precision waits for the backward pass."""
    x, indices, weights, *kernels = arguments("random")
    x, kernels = jnp.asarray(x, jnp.bfloat16), [jnp.asarray(kernel, jnp.float32) for kernel in kernels]
    for name in ("sorted", "ragged"):
        function = lambda *kernels, name=name: experts(  # noqa: E731
            x, jnp.asarray(indices), jnp.asarray(weights, jnp.float32), *kernels, implementation=name
        )
        y, pullback = jax.vjp(function, *kernels)
        saved = [leaf for leaf in jax.tree.leaves(pullback) if leaf.shape[:1] == (NUM_EXPERTS,) and leaf.ndim == 3]
        assert len(saved) == 3 and all(leaf.dtype == jnp.float32 for leaf in saved)
        assert all(bar.dtype == jnp.float32 for bar in pullback(y))


def test_every_implementation_is_named():
    given = map(jnp.asarray, arguments("random"))
    with pytest.raises(ValueError, match=r"'fast'.*auto, ragged, sorted, dense"):
        experts(*given, implementation="fast")
