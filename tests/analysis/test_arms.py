import pytest

from attnres_jax.analysis import Run, RunError, read_run
from attnres_jax.analysis.arms import differing, group, same_tokens, warnings

LOSS = Run.final_loss.fget


def read(*workdirs):
    return [read_run(workdir) for workdir in workdirs]


def test_runs_that_differ_by_seed_name_and_bookkeeping_are_one_arm(make_run):
    bookkeeping = ["name=again", "training.log_every=7", "training.checkpoint_every=9", "data.cache_dir=/elsewhere"]
    bookkeeping += ["metrics.depth=true", "training.process_timeout=5", "pipeline.schedule=gpipe", "mesh.fsdp=2"]
    runs = read(
        make_run("a", "block", seed=0, loss=3.0),
        make_run("b", "residual", seed=0),
        make_run("c", "block", seed=1, loss=3.2, overrides=bookkeeping),
    )
    block, residual = group(runs)
    assert (block.label, residual.label) == ("tiny_block", "tiny_residual")
    assert block.runs == (runs[0], runs[2]) and block.seeds == (0, 1)
    assert block.mean(LOSS) == pytest.approx(3.1) and block.spread(LOSS) == pytest.approx(0.2 / 2**0.5)
    assert residual.spread(LOSS) != residual.spread(LOSS)  # NaN: one seed has no spread


def test_arms_of_one_name_are_told_apart_by_what_differs(make_run):
    runs = read(make_run("a", "block"), make_run("b", "block", overrides=["model.depth.block_size=2"]), make_run("c"))
    assert [arm.label for arm in group(runs)] == [
        "tiny_block (block_size=4)",
        "tiny_block (block_size=2)",
        "tiny_residual",
    ]
    assert differing(runs) == {"model.depth.rule": ["block", "residual"], "model.depth.block_size": [4, 2]}


def test_a_repeated_seed_counts_once(make_run):
    runs = read(make_run("a", loss=3.0), make_run("b", loss=3.4), make_run("c", seed=1, loss=4.0))
    (arm,) = group(runs)
    assert arm.by_seed(LOSS) == pytest.approx({0: 3.2, 1: 4.0}) and arm.mean(LOSS) == pytest.approx(3.6)
    assert warnings(runs) == ["tiny_residual repeats a seed: repeated runs are averaged and count as one seed."]


def test_refuses_no_run_and_one_run_twice(make_run):
    with pytest.raises(RunError, match="no workdir to compare"):
        group([])
    workdir = make_run("a")
    with pytest.raises(RunError, match="is given twice"):
        group(read(workdir, workdir.parent / "." / "a"))


def test_arms_that_were_trained_alike_raise_no_warning(make_run):
    runs = read(make_run("a"), make_run("b", "block"), make_run("c", "full", seed=3))
    assert warnings(runs) == [] and same_tokens(runs)


@pytest.mark.parametrize(
    ("override", "said", "same"),
    [
        ("data.sequence_length=64", "Different data: data.sequence_length is 128 in {a}; 64 in {b}.", True),
        ("data.heldout_percent=9", "Different data: data.heldout_percent is 5 in {a}; 9 in {b}.", False),
        ("model.vocab_size=512", "Different data: model.vocab_size is 2,048 in {a}; 512 in {b}.", False),
        ("training.eval_sequences=8", "Different held-out sets: training.eval_sequences is 64 in {a}; 8 in {b}.", True),
    ],
)
def test_names_what_keeps_two_runs_from_being_compared(make_run, override, said, same):
    a, b = make_run("a"), make_run("b", "block", overrides=[override])
    assert warnings(read(a, b)) == [said.format(a=a, b=b)]
    assert same_tokens(read(a, b)) is same


def test_different_amounts_machines_and_libraries_are_named(make_run):
    a = make_run("a")
    b = make_run("b", steps=30, device="tpu v5e", versions={"python": "3.12.1"})
    lines = warnings(read(a, b))
    assert f"Different amounts of training: tokens is 81,920 in {a}; 61,440 in {b}." in lines
    assert any(
        line.startswith("Speed and memory were measured on different machines: device is 'cpu") for line in lines
    )
    assert any("library of the running Python, and Python is '3.11.7'" in line for line in lines)


def test_fingerprint_of_the_text_decides_where_it_is_known(make_run):
    a = make_run("a", data_fingerprint="x")
    b = make_run("b", "block", data_fingerprint="x", versions={"python": "3.12.1"})
    assert warnings(read(a, b)) == [] and same_tokens(read(a, b))
    c = make_run("c", "full", data_fingerprint="y")
    assert [line[:16] for line in warnings(read(a, c))] == ["Different data: "] and not same_tokens(read(a, c))
