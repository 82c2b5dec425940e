import pytest

from attnres_jax.analysis import judge, read_run
from attnres_jax.analysis.arms import group


@pytest.fixture
def judged(make_run):
    """The judgement on a block arm held against a residual one, given their losses by seed."""

    def judged(residual, block, **changes):
        runs = [make_run(f"a{seed}", seed=seed, loss=loss) for seed, loss in residual.items()]
        runs += [make_run(f"b{seed}", "block", seed=seed, loss=loss, **changes) for seed, loss in block.items()]
        return judge(*group([read_run(workdir) for workdir in runs]))

    return judged


def test_single_runs_are_one_observation(judged):
    judgement = judged({0: 3.0}, {0: 2.9})
    assert judgement.brief == "lower by 0.1000 in one observation"
    assert judgement.sentence == (
        "tiny_block is lower than tiny_residual by 0.1000 (3.33 %); "
        "n = 1: the spread of seeds is unknown, so this is one observation."
    )


def test_worse_is_called_higher(judged):
    assert "tiny_block is higher than tiny_residual by 0.1000" in judged({0: 3.0}, {0: 3.1}).sentence


def test_equal_is_called_equal(judged):
    assert judged({0: 3.0}, {0: 3.0}).sentence == "tiny_block and tiny_residual are exactly equal."


def test_inside_the_spread(judged):
    # Means 3.0 and 2.99; standard deviations 0.1 and 0.1.
    judgement = judged({0: 2.9, 1: 3.0, 2: 3.1}, {0: 3.09, 1: 2.89, 2: 2.99})
    assert judgement.brief == "lower by 0.0100, inside the spread of seeds and lower in 2 of 3 shared seeds"
    assert "inside the spread of seeds (± 0.1000 for n = 3 and ± 0.1000 for n = 3)." in judgement.sentence


def test_inside_the_spread_yet_lower_in_every_seed(judged):
    judgement = judged({0: 2.9, 1: 3.0, 2: 3.1}, {0: 2.88, 1: 2.99, 2: 3.06})
    assert judgement.brief.endswith("inside the spread of seeds and lower in every one of 3 seeds")
    assert "by 0.0100 to 0.0400: inside the spread" in judgement.sentence
    assert judgement.sentence.endswith("equal arms would agree so 1 time in 4.")


def test_outside_the_spread_and_in_every_seed(judged):
    judgement = judged({0: 3.0, 1: 3.01}, {0: 2.5, 1: 2.52})
    assert judgement.brief == "lower by 0.4950, outside the spread of seeds and lower in every one of 2 seeds"
    assert judgement.sentence.endswith("equal arms would agree so 1 time in 2.")


def test_outside_the_spread_without_shared_seeds(judged):
    judgement = judged({0: 3.0, 1: 3.02}, {7: 3.5, 8: 3.52})
    assert judgement.brief == "higher by 0.5000, outside the spread of seeds"
    assert "seeds," not in judgement.sentence


def test_one_seed_against_several_stays_one_observation(judged):
    judgement = judged({0: 3.0, 1: 3.02}, {0: 2.5})
    assert judgement.brief == "lower by 0.5100, outside the spread of seeds of one arm"
    assert judgement.sentence.endswith("(± 0.0141 for n = 2), but tiny_block has n = 1, so this is one observation.")


def test_arm_that_diverged_is_not_compared(judged):
    judgement = judged({0: 3.0}, {0: float("nan")})
    assert judgement.brief == "not comparable"
    assert judgement.sentence.startswith("tiny_block did not end with a finite held-out loss")


def test_unlike_training_is_said(judged):
    judgement = judged({0: 3.0}, {0: 2.9}, overrides=["data.heldout_percent=9"])
    assert judgement.brief.endswith("not trained alike") and "see the warning" in judgement.sentence
