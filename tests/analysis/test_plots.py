import io

import numpy as np
import pytest

from attnres_jax.analysis import (
    depth_heatmap,
    depth_mixing,
    layer_profile,
    loss_curves,
    loss_differences,
    mixing_panels,
    read_run,
)
from attnres_jax.analysis.arms import group


@pytest.fixture
def arms(make_run):
    """A residual arm of one seed and a block arm of two."""
    runs = [make_run("a", loss=3.0), make_run("b", "block", loss=2.8), make_run("c", "block", seed=1, loss=3.0)]
    return group([read_run(workdir) for workdir in runs])


def drawn(figure):
    """The figure's lines by label, as (x, y)."""
    return {line.get_label(): line.get_data() for line in figure.axes[0].lines}


def test_loss_is_drawn_at_equal_tokens_with_the_mean_and_range_of_seeds(arms):
    figure = loss_curves(arms)
    lines = drawn(figure)
    tokens = np.array([10, 20, 30, 40]) * 2048 / 1000
    np.testing.assert_allclose(lines["tiny_residual"], [tokens, [4.5, 4.0, 3.5, 3.0]])
    np.testing.assert_allclose(lines["tiny_block"], [tokens, [4.4, 3.9, 3.4, 2.9]])
    (band,) = figure.axes[0].collections
    ys = band.get_paths()[0].vertices[:, 1]
    assert (ys.min(), ys.max()) == pytest.approx((2.8, 4.5))
    assert figure.axes[0].get_xlabel() == "training tokens, thousands"


@pytest.mark.parametrize(
    ("against", "label", "last"),
    [("flops", "training compute, GFLOP", 819.2), ("seconds", "training time, seconds", 4.0)],
)
def test_loss_against_compute_and_time(arms, against, label, last):
    figure = loss_curves(arms, against=against)
    assert figure.axes[0].get_xlabel() == label
    assert drawn(figure)["tiny_residual"][0][-1] == pytest.approx(last)


def test_training_loss_is_smoothed_over_a_fiftieth(make_run):
    run = read_run(make_run("a", steps=200))
    _, y = drawn(loss_curves(group([run]), kind="train"))["tiny_residual"]
    raw = run.train["loss"]
    assert len(y) == 200 and y[0] == pytest.approx(raw[0])
    assert y[100] == pytest.approx(raw[97:101].mean())


def test_differences_are_to_the_first_arm(arms):
    lines = drawn(loss_differences(arms))
    np.testing.assert_array_equal(lines["tiny_residual"][1], 0)
    np.testing.assert_allclose(lines["tiny_block"][1], -0.1)


def test_differences_take_the_tokens_that_both_have(make_run):
    short = make_run("b", "block", steps=30, loss=2.0)
    lines = drawn(loss_differences(group([read_run(make_run("a")), read_run(short)])))
    assert len(lines["tiny_block"][0]) == 3 and len(lines["tiny_residual"][0]) == 4
    rows = (short / "metrics.jsonl").read_text().splitlines(keepends=True)
    (short / "metrics.jsonl").write_text("".join(row for row in rows if '"eval", "step": 10' not in row))
    late = drawn(loss_differences(group([read_run(make_run("c")), read_run(short)])))["tiny_block"]
    np.testing.assert_array_equal(late, np.array(lines["tiny_block"])[:, 1:])


def test_loss_of_other_tokens_is_drawn_in_bits(arms):
    figure, gaps = loss_curves(arms, column="bits_per_byte"), loss_differences(arms, column="bits_per_byte")
    np.testing.assert_allclose(drawn(figure)["tiny_residual"][1], [2.25, 2.0, 1.75, 1.5])
    np.testing.assert_allclose(drawn(gaps)["tiny_block"][1], -0.05)
    assert figure.axes[0].get_ylabel() == "loss, bits a byte"
    assert gaps.axes[0].get_ylabel() == "difference, bits a byte"


@pytest.mark.parametrize("name", ["lr=$10^$ x", "_under"])
def test_any_name_is_drawn_and_in_the_legend(make_run, name):
    """Mathematics to matplotlib, and a label that it hides."""
    arms = group([read_run(make_run("a")), read_run(make_run("b", "block", overrides=[f"name={name}"]))])
    for figure in (loss_curves(arms), loss_differences(arms), layer_profile({name: np.ones(4)}, "RMS")):
        figure.savefig(io.BytesIO())
        (legend,) = figure.legends
        assert legend.get_texts()[-1].get_text().replace("\\", "") == name
    mixing_panels({name: np.eye(3)}).savefig(io.BytesIO())


def test_profile_turns_logarithmic_where_a_line_would_lie_on_zero():
    assert layer_profile({"a": np.array([1.0, 2.0])}, "RMS").axes[0].get_yscale() == "linear"
    assert layer_profile({"a": np.array([1.0, 0.01])}, "RMS").axes[0].get_yscale() == "log"


def test_heatmap_draws_what_there_is_on_the_scale_that_is_given():
    weights = np.array([[1.0, np.nan], [0.25, 0.75]])
    figure = depth_heatmap(weights, ["attention 1", "readout"], ["embedding", "block 1"], largest=0.8)
    axes, _ = figure.axes
    (mesh,) = axes.collections
    np.testing.assert_array_equal(np.ma.filled(mesh.get_array(), np.nan), weights)
    assert mesh.norm.vmax == 0.8 and axes.yaxis_inverted()
    assert [text.get_text() for text in axes.texts] == ["1.00", ".25", ".75"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["attention 1", "readout"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["embedding", "block 1"]


def test_negative_weights_have_colours_of_their_own_and_change_none_of_the_others():
    signed = depth_heatmap(np.array([[0.5, np.nan], [-0.5, 1.0]]), ["a", "b"], ["x", "y"])
    plain = depth_heatmap(np.array([[0.5, np.nan], [0.0, 1.0]]), ["a", "b"], ["x", "y"])
    colours = [figure.axes[0].collections[0].to_rgba(0.5) for figure in (signed, plain)]
    np.testing.assert_array_equal(*colours)
    red, _, blue, _ = signed.axes[0].collections[0].to_rgba(-0.5)
    assert red > blue and colours[0][0] < colours[0][2]
    assert [text.get_text() for text in signed.axes[0].texts] == [".50", "-.50", "1.00"]
    # The colour bar ends where the values do.
    assert signed.axes[1].get_ylim() == (-0.5, 1) and plain.axes[1].get_ylim() == (0, 1)


def test_panels_draw_every_matrix_on_one_scale():
    rng = np.random.default_rng(0)
    matrices = {
        "residual": np.tri(3),
        "softmax": np.array([[1, 0, 0], [0.9, 0.1, 0], [0.2, 0.2, 0.6]]),
        "signed": rng.normal(size=(4, 4)),
    }
    relative = {name: depth_mixing(matrix).relative for name, matrix in matrices.items()}
    figure = mixing_panels(relative, columns=2)
    panels = [axes for axes in figure.axes if axes.collections and axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == list(matrices)
    for axes, matrix in zip(panels, relative.values(), strict=True):
        (mesh,) = axes.collections
        np.testing.assert_array_equal(np.ma.filled(mesh.get_array(), np.nan), matrix)
        assert (mesh.norm.vmin, mesh.norm.vmax) == (-4, 4)
    bar = figure.axes[-1]
    assert bar.get_ylim() == (pytest.approx(np.nanmin(relative["signed"])), 4)


def test_one_panel_is_as_wide_as_it_needs_and_its_colour_bar_is_whole():
    figure = mixing_panels({"residual": np.tri(9)})
    width, height = figure.get_size_inches() * figure.dpi
    figure.draw_without_rendering()
    (panel, bar) = figure.axes
    assert panel.get_window_extent().width > width / 2
    label = bar.yaxis.label.get_window_extent()
    assert 0 <= label.y0 < label.y1 <= height and label.x1 <= width
