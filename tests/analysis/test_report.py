import base64
import json
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest

from attnres_jax.analysis import RunError, compare, write_report
from attnres_jax.analysis.plots import training_map
from attnres_jax.analysis.report import report, summary
from attnres_jax.analysis.runs import read_run


class Page(HTMLParser):
    """Every start tag with its attributes, and the text of the page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def heat_maps(page, what):
    """The images of one kind, in order."""
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    return [image for image in images if f"Heat map of the {what} of" in image["alt"]]


@pytest.fixture
def write(tmp_path):
    def write(*workdirs):
        return Page(write_report(compare(workdirs), tmp_path / "out" / "report.html").read_text(encoding="utf-8"))

    return write


def test_report_is_one_file_of_whole_pictures_with_words_for_each(write, make_run):
    page = write(make_run("a"), make_run("b", "block"), make_run("c", "full"))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    # Losses, magnitudes, maps of the two arms that have depth weights, mixing matrices of all.
    assert len(images) == 5 + 2 + 2 + 3
    for image in images:
        kind, data = image["src"].split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")
        assert len(image["alt"]) > 30
    assert not any(tag in ("script", "link", "iframe") for tag, _ in page.tags)
    fetched = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert all(value.startswith("data:") for value in fetched)


def test_report_tells_hardware_versions_date_and_table(write, make_run):
    workdirs = [make_run("a", loss=3.0), make_run("b", "block", loss=2.9)]
    page = write(*workdirs)
    for said in ("20 November 2026", "cpu (2 cores)", "python 3.11.7, jax 0.10.2", "1,234,567", "held-out loss, final"):
        assert said in page.text, said
    for judgement in compare(workdirs).judgements:
        assert judgement.sentence in page.text
    assert "2.9000" in page.text and "tiny_residual has no map: a stream has no depth weights." in page.text


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (2.9, "tiny_block is lower by 0.1000 in one observation."),
        (3.1, "tiny_block is higher by 0.1000 in one observation."),
        (3.0, "tiny_block is exactly equal."),
        (float("nan"), "tiny_block did not end with a finite loss."),
    ],
)
def test_summary_tells_the_truth_whatever_it_is(make_run, block, said):
    told = summary(compare([make_run("a", loss=3.0), make_run("b", "block", loss=block)]))
    assert said in told
    assert "A step takes 1.20 times as long with tiny_block as with tiny_residual." in told
    assert "With one seed an arm, the order of the arms may be chance." in told


def test_arms_of_other_tokens_are_ranked_by_bits(make_run):
    """Half the vocabulary: more bits a byte at less loss a token."""
    workdirs = [make_run("a", loss=5.0), make_run("b", "block", loss=4.5, overrides=["model.vocab_size=512"])]
    rows = [json.loads(line) for line in (workdirs[1] / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["bits_per_byte"] = row["loss"]
    (workdirs[1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    comparison = compare(workdirs)
    told = summary(comparison)
    assert "in bits a byte, lowest first: tiny_residual 2.5000 and tiny_block 4.5000." in told
    assert "tiny_block is higher by 2.0000 bits/byte" in told
    page = report(comparison)
    assert page.count("Last values: tiny_residual 2.5000 and tiny_block 4.5000.") == 4
    assert "A token is not the same piece of text in all arms" in page


def test_summary_of_seeds_calls_noise_noise(make_run):
    runs = [make_run(f"a{seed}", seed=seed, loss=3 + seed / 10) for seed in range(3)]
    runs += [make_run(f"b{seed}", "block", seed=seed, loss=3.19 - seed / 10) for seed in range(3)]
    told = summary(compare(runs))
    assert "tiny_block is lower by 0.0100, inside the spread of seeds and lower in 2 of 3 shared seeds." in told
    assert "may be chance" not in told


def test_warnings_stand_in_the_report(write, make_run):
    page = write(make_run("a"), make_run("b", "block", overrides=["data.heldout_percent=9"]))
    assert "Different data: data.heldout_percent is 5 in" in page.text
    assert "They were not trained alike: see the warning." in page.text


def test_one_run_without_inspection_is_a_report_too(write, make_run):
    page = write(make_run("a", "block", inspected=False))
    assert "No run holds an inspection.npz yet" in page.text
    assert "One run, each" not in page.text and "One run, trained on 81,920 tokens." in page.text


def test_maps_share_one_scale_and_average_the_seeds(write, make_run):
    runs = [make_run("a", "block"), make_run("b", "block", seed=1), make_run("c", "full")]
    for run, change in ((runs[1], [[1, 0, 0], [0.2, 0.8, 0]]), (runs[2], [[1, 0, 0], [0.5, 0.5, 0]])):
        arrays = dict(np.load(run / "inspection.npz"))
        weights = np.array(change)
        weights[weights == 0] = np.nan
        np.savez(
            run / "inspection.npz", **arrays | {"depth_weights": np.concatenate([weights, weights[1:].repeat(3, 0)])}
        )
    maps = heat_maps(write(*runs), "depth weights")
    block, full = (base64.b64decode(image["src"].split(",", 1)[1]).decode() for image in maps)
    assert ">.60<" in block  # MLP 1 reads block 1 with 0.4 and 0.8
    assert ">0.7<" in block and ">0.7<" in full  # on the colour bar: the largest mean weight is block's 0.75
    assert "MLP 1 reads most from block 1" in maps[0]["alt"]


def test_matrices_of_all_kinds_of_rules_are_drawn_and_measured(write, make_run):
    page = write(make_run("a"), make_run("b", "mhc"), make_run("c", "denseformer"))
    images = heat_maps(page, "depth-mixing matrix")
    residual, _, signed = (base64.b64decode(image["src"].split(",", 1)[1]).decode() for image in images)
    assert ">1.00<" in residual and ">-.60<" in signed  # -0.5 of 2.5 in a row of three
    assert "The largest weight, 1.2 times an even share, is that of embedding at attention 2." in images[2]["alt"]
    assert "The embedding's share is 0.50 at MLP 1 and 0.20 at the readout." in images[0]["alt"]
    assert "tiny_residual and tiny_mhc have no map: a stream has no depth weights." in page.text
    rows = [line for line in page.text.splitlines() if line.startswith("separable rank")]
    assert rows[0].startswith("separable rank1.0001.0001.")


def test_measures_are_of_each_seed_and_matrices_of_their_mean(write, make_run):
    runs = [make_run("a", "block"), make_run("b", "block", seed=1)]
    for run, row in ((runs[0], [1.0, 0.0]), (runs[1], [0.0, 1.0])):
        arrays = dict(np.load(run / "inspection.npz"))
        matrix = arrays["mixing_matrix"]
        matrix[1, :2] = row
        np.savez(run / "inspection.npz", **arrays)
    page = write(*runs)
    (image,) = heat_maps(page, "depth-mixing matrix")
    drawn = base64.b64decode(image["src"].split(",", 1)[1]).decode()
    assert ">2.00<" not in drawn and drawn.count(">1.00<") == 15
    # MLP 1 reads one source alone in either seed: (1 + 1/3 + 1/4 + 1/5) / 4.
    assert "sharpness (largest share)0.446" in page.text
    assert "embedding share0.321 ± 0.177" in page.text


def test_inspections_without_a_matrix_are_read_and_said_to_lack_it(write, make_run):
    runs = [make_run("a", "block"), make_run("b")]
    arrays = dict(np.load(runs[0] / "inspection.npz"))
    kept = {key: value for key, value in arrays.items() if key not in ("mixing_matrix", "output_labels")}
    np.savez(runs[0] / "inspection.npz", **kept)
    page = write(*runs)
    assert "tiny_block has none yet: attnres_jax.analysis.inspect_run(workdir) adds it." in page.text
    assert len(heat_maps(page, "depth-mixing matrix")) == 1 and len(heat_maps(page, "depth weights")) == 1
    alone = write(runs[0])
    assert "No run holds an inspection.npz with this matrix: training writes it at its end, or" in alone.text


def test_names_are_escaped(write, make_run):
    page = write(make_run("a", overrides=["name=<b>bold</b>"]), make_run("b", "block"))
    assert "<b>bold</b>" in page.text and not any(tag == "b" for tag, _ in page.tags)


def test_diagnostics_of_a_run_become_maps_over_training(write, real_run, make_run):
    run = read_run(real_run)
    assert run.diagnostics["step"].tolist() == [3, 6]
    sublayers = run.config.model.num_layers * 2
    shapes = {key: run.diagnostics[key].shape for key in ("output_rms", "depth_entropy")}
    assert shapes == {"output_rms": (2, sublayers), "depth_entropy": (2, sublayers + 1)}
    figure = training_map(run, "depth_entropy", "nats")
    (mesh,) = figure.axes[0].collections
    np.testing.assert_allclose(mesh.get_array(), run.diagnostics["depth_entropy"].T)
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0][1:], run.diagnostics["tokens"] / 1e3)

    page = write(real_run)
    maps = [tag["alt"] for name, tag in page.tags if name == "img" and tag["alt"].startswith("Map of the ")]
    assert [alt.split(" of tiny_block")[0] for alt in maps] == [
        "Map of the output magnitude",
        "Map of the gradient magnitude",
        "Map of the entropy of depth weights",
        "Map of the largest depth weight",
    ]
    assert "tiny_block: at no time." in page.text
    assert "Depth over training" not in write(make_run("plain")).text


def test_spikes_and_a_rule_without_weights_are_told(write, make_run):
    workdir, other = make_run("a", seed=3), make_run("b", seed=1)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["kind"] == "train" and row["step"] % 20 == 0:
            row |= {f"{key}/{i:02d}": 50.0 - 5 * i for key in ("output_rms", "output_grad_rms") for i in range(11)}
            row["depth/spike"] = float(row["step"] == 40)
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write(workdir)
    assert "over 10 times the median output: tiny_residual: at step 40." in page.text
    assert sum(tag["alt"].startswith("Map of the ") for name, tag in page.tags if name == "img") == 2
    # Of two seeds, of which one was measured, it is said which is shown.
    page = write(workdir, other)
    assert "tiny_residual, seed 3: at step 40." in page.text and "tiny_residual, seed 3: output magnitude" in page.text


def test_report_that_cannot_be_written_is_one_line(make_run, tmp_path):
    comparison = compare([make_run("a")])
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"report '.*' cannot be written"):
        write_report(comparison, tmp_path / "file" / "report.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match=r"report '.*folder' cannot be written"):
        write_report(comparison, tmp_path / "folder")
    assert not list(tmp_path.glob(".folder*"))
