"""Laws of effects.py: the textbook's analysis of blocks, the studies' numbers, shares and ends."""
import math
import random
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tables import line

from analysis.arms import plain_of
from analysis.effects import (cells_of, effect_of, effects, gain_of, holm_of, loses, pooled,
                              scores_of_bases, starts_of)
from analysis.frames import at_chosen, frame_of, read_results
from tasks import stats
from tasks.stats import half_95, share_95, t_95, t_test

ROOT = Path(__file__).resolve().parent.parent
TEN = ["plain", "jepa", "symmetric", "no_predictor", "equal_flop", "shuffled", "frozen", "l2",
       "online", "shuffled_no_predictor"]       # of the paper's form, consistency left out


def study_of(values):
    """{arm: {seed: accuracy in %}} as a table of cells, by way of results."""
    results = frame_of([line(arm, seed, value / 100, (0.0, 0) if "plain" in arm else (1.0, 2))
                        for arm, by_seed in values.items() for seed, value in by_seed.items()])
    return cells_of(results, "words", 0, "accuracy")


def random_study(n_arms, n_blocks, seed):
    draw = random.Random(seed)
    return {arm: {block: 50 + 3 * block + k + draw.gauss(0, 2) for block in range(n_blocks)}
            for k, arm in enumerate(TEN[:n_arms])}


@pytest.fixture(scope="module")
def toy():
    return at_chosen(frame_of(read_results([ROOT / "results/tiny_study/results.jsonl"])))


@pytest.fixture(scope="module")
def words():
    return at_chosen(frame_of(read_results([ROOT / "results/nl_rx_words/results.jsonl"])))


# ---- randomised blocks ----


@pytest.mark.parametrize("n_arms, n_blocks", [(3, 2), (4, 5), (10, 5)])
def test_without_a_gap_the_pooled_analysis_is_the_textbooks(n_arms, n_blocks):
    """Sums of squares by means of rows and columns, no matrix."""
    values = random_study(n_arms, n_blocks, seed=n_arms)
    x = np.array([list(by_seed.values()) for by_seed in values.values()])
    arm, block = x.mean(1, keepdims=True), x.mean(0, keepdims=True)
    df = (n_arms - 1) * (n_blocks - 1)
    variance = ((x - arm - block + x.mean()) ** 2).sum() / df
    ratio = n_blocks * ((arm - x.mean()) ** 2).sum() / (n_arms - 1) / variance
    found = pooled(study_of(values))
    assert (found.df, found.n_blocks, set(found.arms)) == (df, n_blocks, set(values))
    assert found.sd == pytest.approx(math.sqrt(variance))
    assert found.ratio == pytest.approx(ratio)
    assert found.p == pytest.approx(stats.f_test(ratio, n_arms - 1, df))
    error = math.sqrt(2 * variance / n_blocks)
    mean, half, p, n = found.difference("jepa", "plain")
    assert mean == pytest.approx(float((arm[1] - arm[0]).item()))
    assert half == pytest.approx(t_95(df) * error) and n == n_blocks
    assert p == pytest.approx(t_test(mean, error, df))


def test_cells_that_are_missing_are_fitted_around_and_blocks_cancel():
    """Exact arms and blocks with a little noise in one: their differences, whichever is missing."""
    values = {arm: {block: 10.0 * block + k for block in range(6)}
              for k, arm in enumerate(TEN[:4])}
    values["plain"][0] += 0.01
    for arm, block in (("jepa", 1), ("jepa", 2), ("symmetric", 5), ("no_predictor", 0)):
        del values[arm][block]
    found = pooled(study_of(values))
    assert found.df == 20 - 4 - 6 + 1
    for k, arm in enumerate(TEN[:4]):
        assert found.difference(arm, "plain").mean == pytest.approx(k, abs=0.01)
    assert found.difference("jepa", "plain").half > found.difference("symmetric", "plain").half


@pytest.mark.parametrize("cut", [
    lambda v: {arm: v[arm] for arm in ("plain", "jepa")},               # a pair
    lambda v: {arm: {0: by[0]} for arm, by in v.items()},               # one block: no noise
    lambda v: {arm: {k: by[k], k + 9: by[k] + 1} for k, (arm, by) in enumerate(v.items())},
    lambda v: {}])
def test_what_cannot_be_pooled_is_none(cut):
    assert pooled(study_of(cut(random_study(4, 5, 0)))) is None


def test_runs_without_noise_allow_no_p():
    values = {arm: {block: float(10 * block + k) for block in range(3)}
              for k, arm in enumerate(TEN[:3])}
    found = pooled(study_of(values))
    assert found.sd == 0 and math.isnan(found.p) and math.isnan(found.difference(*TEN[:2]).p)


def test_arms_of_another_diffusion_rate_are_pooled_apart():
    values = random_study(4, 4, 1)
    alone = pooled(study_of(values))
    more = values | {"plain_uniform": {0: 90.0, 1: 10.0}, "jepa_uniform": {0: 0.0, 1: 99.0}}
    beside = pooled(study_of(more))
    assert (beside.arms, beside.sd, beside.p) == (alone.arms, alone.sd, alone.p)
    assert pooled(study_of(more), "plain_uniform") is None


# ---- the studies on file ----


def test_the_toys_pooled_numbers_stand(toy):
    """Ten arms x five seeds: residual sd 3.2 points, any two arms +- 4.1, no arm is told."""
    ten = cells_of(toy, "tiny_study", 0, "accuracy")[TEN]
    found = pooled(ten)
    assert (found.df, round(found.sd, 1)) == (36, 3.2)
    halves = {round(found.difference(a, b).half, 1) for a in TEN for b in TEN if a != b}
    assert halves == {4.1}
    assert (round(found.ratio, 2), round(found.p, 2)) == (1.31, 0.27)
    assert round(found.difference("symmetric", "plain").p, 2) == 0.15
    over_plain, _ = effects(ten)
    assert round(over_plain["symmetric"].p, 3) == 0.016


@pytest.mark.parametrize("study, config, outcome, first, second, mean, half, p", [
    ("toy", "tiny_study", "accuracy", "jepa", "plain", 1.1, 6.0, 0.63),
    ("toy", "tiny_study", "t = 0.2", "equal_flop", "plain", -0.047, 0.013, 0.0006),
    ("toy", "tiny_study", "t = 0.2", "jepa", "plain", -0.008, 0.018, 0.29),
    ("toy", "tiny_study", "t = 0.2", "jepa", "equal_flop", 0.039, 0.023, 0.009),
    ("toy", "tiny_study", "t = 0.2", "jepa", "no_predictor", -0.024, 0.010, 0.002),
    ("toy", "tiny_study", "forgetting", "consistency", "plain", -0.99, 0.93, 0.043),
    ("words", "nl_rx_words", "t = 0.5", "jepa", "equal_flop", 0.017, 0.005, 0.005),
    ("words", "nl_rx_words", "t = 1", "jepa", "shuffled", -0.025, 0.011, 0.011),
    ("words", "nl_rx_words", "t = 1", "jepa", "plain", -0.028, 0.040, 0.09)])
def test_the_studies_paired_numbers_stand(study, config, outcome, first, second, mean, half, p,
                                          request):
    """As computed by others from the same files, to the digits that they give."""
    results = request.getfixturevalue(study)
    found = effect_of(gain_of(results, config, first, 0, second, outcome))
    for value, said in zip(found, (mean, half, p)):
        digits = len(str(said).partition(".")[2])
        assert value == pytest.approx(said, abs=0.51 * 10 ** -digits + 5e-4), found


def test_of_ten_arms_consistencys_forgetting_is_not_told_from_plains_after_holm(toy):
    over_plain, _ = effects(cells_of(toy, "tiny_study", 0, "forgetting"))
    of_plain = {arm: effect for arm, effect in over_plain.items() if plain_of(arm) == "plain"}
    assert holm_of(of_plain)["consistency"] == pytest.approx(10 * of_plain["consistency"].p)
    assert round(holm_of(of_plain)["consistency"], 2) == 0.43


# ---- pairs and shares ----


def test_bases_of_two_machines_are_one_by_the_last_two_parts_of_their_path():
    """Two bases, each scored on one machine and tuned on two."""
    lines = [line("base", None, 0.9, init_from="/a/out/one", config="words"),
             line("base", 2, 0.8, init_from="/a/out/two", config="words"),
             line("base", 3, 0.8, init_from="/b/out/two", config="words")]
    lines += [line("plain", seed, 0.5, init_from=f"{where}/out/{base}")
              for seed, (where, base) in enumerate(
                  [("/a", "one"), ("/b", "one"), ("/a", "two"), ("/b", "two")])]
    results = frame_of(lines)
    assert scores_of_bases(results, "words", 0) == {"out/one": 90, "out/two": 80}
    assert list(starts_of(results, "words", "plain", 0)) == [90, 90, 80, 80]
    assert loses(results, "words", 0)


def test_an_effect_is_the_mean_of_pairs_with_students_interval():
    found = effect_of([1.0, 2.0, 4.0, math.nan])
    assert found.mean == pytest.approx(7 / 3) and found.n == 3
    assert found.half == half_95([1.0, 2.0, 4.0])
    assert found.p == t_test(7 / 3, statistics.stdev([1, 2, 4]) / math.sqrt(3), 2)
    for values, n in (([], 0), ([2.0], 1), ([1.0, 2.0], 2)):
        found = effect_of(values)
        assert math.isnan(found.half) and found.n == n and math.isnan(found.p) == (n < 2)


@given(st.integers(0, 10_000), st.integers(3, 20))
@settings(max_examples=60, deadline=None)
def test_at_the_ends_of_a_share_part_minus_share_times_whole_is_just_told_from_zero(seed, n):
    draw = random.Random(seed)
    whole = [draw.gauss(20, 6) for _ in range(n)]
    part = [0.4 * y + draw.gauss(0, 5) for y in whole]
    share, low, high = share_95(part, whole)
    assert share == pytest.approx(statistics.mean(part) / statistics.mean(whole))
    if math.isnan(low):
        assert not abs(statistics.mean(whole)) > half_95(whole)
        return
    assert low <= share <= high
    for end in (low, high):
        rest = [x - end * y for x, y in zip(part, whole)]
        assert abs(statistics.mean(rest)) == pytest.approx(half_95(rest), rel=1e-6)


def test_the_interval_of_a_share_covers_it_19_times_of_20():
    g, hits = np.random.default_rng(0), 0
    for _ in range(2000):
        whole = g.normal(10, 4, 8)
        _, low, high = share_95(0.68 * whole + g.normal(0, 3, 8), whole)
        hits += not low > 0.68 and not high < 0.68      # nan: no end, it holds all
    assert 0.935 < hits / 2000 < 0.965


def test_a_share_of_nothing_has_no_value_and_of_two_pairs_no_ends():
    assert all(map(math.isnan, share_95([], []) + share_95([1.0, 2.0, 3.0], [1.0, -1.0, 0.0])))
    share, low, high = share_95([1.0, 2.0], [2.0, 4.0])
    assert share == 0.5 and math.isnan(low) and math.isnan(high)
    assert share_95([3.0, 4.0, 5.0], [6.0, 8.0, 10.0]) == pytest.approx((0.5, 0.5, 0.5))
