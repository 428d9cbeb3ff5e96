"""Laws of statistics: closed forms against enumeration, intervals that cover, files in common."""
import itertools
import json
import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import answers, stats
from tasks.answers import read_answers, read_common

# ---- one accuracy ----


@pytest.mark.parametrize("n", [1, 10, 1319])
def test_wilsons_ends_are_where_the_share_is_z_standard_errors_away(n):
    for right in {0, 1, n // 3, n}:
        low, high = stats.wilson(right, n)
        assert 0 <= low <= right / n <= high <= 1 and low < high
        for end in (low, high):
            if 1e-9 < end < 1 - 1e-9:
                stderr = math.sqrt(end * (1 - end) / n)
                assert abs(right / n - end) / stderr == pytest.approx(stats.Z, rel=1e-6)


def test_z_is_that_of_95_percent():
    assert stats.Z == pytest.approx(statistics.NormalDist().inv_cdf(0.975), abs=1e-12)


@pytest.mark.parametrize("p, n", [(0.5, 50), (0.9, 50), (0.98, 200)])
def test_wilsons_interval_covers_the_truth_19_times_of_20(p, n):
    """Exactly, summed over all outcomes: about 95 %, also where p +- 1.96 stderr is far below."""
    cover = sum(math.comb(n, k) * p ** k * (1 - p) ** (n - k) for k in range(n + 1)
                if stats.wilson(k, n)[0] <= p <= stats.wilson(k, n)[1])
    assert 0.93 < cover < 0.98


# ---- two models, the same questions ----


@pytest.mark.parametrize("a, b", [(0, 0), (1, 0), (0, 7), (3, 9), (5, 5), (8, 2), (12, 1)])
def test_mcnemars_p_is_the_share_of_coin_tosses_as_uneven(a, b):
    n = a + b
    tosses = [sum(toss) for toss in itertools.product((0, 1), repeat=n)]
    as_uneven = sum(abs(2 * heads - n) >= abs(a - b) for heads in tosses)
    assert stats.mcnemar(a, b) == pytest.approx(as_uneven / len(tosses), rel=1e-12)
    assert stats.mcnemar(a, b) == stats.mcnemar(b, a)


def test_mcnemar_holds_for_a_whole_benchmark():
    assert stats.mcnemar(0, 20_000) == 0.0                  # below what a float can be
    assert stats.mcnemar(7_000, 7_000) == 1.0
    chi2 = (760 - 640 - 1) ** 2 / 1400                      # the usual approximation
    assert stats.mcnemar(640, 760) == pytest.approx(math.erfc(math.sqrt(chi2 / 2)), rel=0.02)


def verdicts(*rights):
    return [{f"q{i}": bool(right) for i, right in enumerate(some)} for some in rights]


def test_a_difference_is_that_of_the_accuracies_and_its_stderr_that_of_the_differences():
    rng = random.Random(0)
    first, second = verdicts(*([rng.random() < p for _ in range(300)] for p in (0.6, 0.8)))
    found = stats.paired_difference(first, second)
    differences = [second[id] - first[id] for id in first]
    assert found["mean"] == pytest.approx(sum(second.values()) / 300 - sum(first.values()) / 300)
    assert found["stderr"] == pytest.approx(statistics.pstdev(differences) / math.sqrt(300))
    low, high = found["interval"]
    assert low == pytest.approx(found["mean"] - stats.Z * found["stderr"], abs=0.01)
    assert high == pytest.approx(found["mean"] + stats.Z * found["stderr"], abs=0.01)
    counts = [found[key] for key in ("both", "only_first", "only_second", "neither")]
    assert sum(counts) == found["n"] == 300
    assert counts == [sum((first[i], second[i]) == pair for i in first) for pair in
                      [(True, True), (True, False), (False, True), (False, False)]]
    assert found["p"] == stats.mcnemar(counts[1], counts[2])


def test_a_difference_turns_its_sign_when_the_models_change_places():
    first, second = verdicts([1, 1, 0, 0, 1, 0, 0, 1], [1, 0, 1, 1, 1, 1, 0, 1])
    one, other = stats.paired_difference(first, second), stats.paired_difference(second, first)
    assert one["mean"] == -other["mean"] == 0.25
    assert (one["stderr"], one["p"]) == (other["stderr"], other["p"])


@pytest.mark.parametrize("rights, mean", [(([1, 1], [1, 1]), 0), (([0], [1]), 1), (([1], [0]), -1)])
def test_where_all_questions_differ_alike_nothing_is_uncertain_but_p(rights, mean):
    found = stats.paired_difference(*verdicts(*rights))
    assert (found["mean"], found["stderr"], found["interval"]) == (mean, 0, (mean, mean))
    assert found["p"] == 1


def test_other_questions_are_not_compared():
    for first, second in [({"a": True}, {"b": True}), ({}, {}), ({"a": True}, {})]:
        with pytest.raises(ValueError, match="not to the same questions"):
            stats.paired_difference(first, second)


def test_the_bootstrap_draws_questions_with_replacement():
    """Its interval for three questions, from all 27 draws."""
    values = [-1, 0, 1]
    means = sorted(sum(draw) / 3 for draw in itertools.product(values, repeat=3))
    low, high = stats.bootstrap(values, n_resamples=100_000)
    assert (low, high) == pytest.approx((means[0], means[-1]))      # 1 / 27 > 2.5 %
    other = stats.bootstrap([0.5] * 40 + [2.0] * 60, n_resamples=100_000)
    sd = math.sqrt(100 * 0.4 * 0.6) * 1.5 / 100
    assert other == pytest.approx((1.4 - stats.Z * sd, 1.4 + stats.Z * sd), abs=0.02)


def test_the_bootstrap_is_the_same_each_time_and_other_with_another_seed():
    values = [random.Random(i).random() for i in range(200)]
    assert stats.bootstrap(values) == stats.bootstrap(list(reversed(values)))
    assert stats.bootstrap(values) != stats.bootstrap(values, seed=1)


def test_in_words_a_difference_keeps_to_100_columns():
    first, second = verdicts([0] * 9_000 + [1] * 5_042, [1] * 9_000 + [0] * 5_042)
    text = stats.in_words(stats.paired_difference(first, second), "model", "base")
    assert max(map(len, text.splitlines())) <= 100
    assert "base - model = +28.2 +- 0.8 points" in text and "p < 0.0001" in text
    assert "both 0, only model 5042, only base 9000, neither 0" in text


# ---- seeds ----


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
@settings(max_examples=50, deadline=None)
def test_mean_and_both_deviations_are_the_textbooks(accuracies):
    found = stats.over_seeds(accuracies)
    assert found["mean"] == pytest.approx(statistics.mean(accuracies))
    assert found["sd_ddof1"] == pytest.approx(statistics.stdev(accuracies), abs=1e-9)
    assert found["sd_ddof0"] == pytest.approx(statistics.pstdev(accuracies), abs=1e-9)
    assert found["stderr"] == pytest.approx(found["sd_ddof1"] / math.sqrt(len(accuracies)))
    assert (found["min"], found["max"], found["n"]) == (min(accuracies), max(accuracies),
                                                        len(accuracies))


@pytest.mark.parametrize("accuracies", [[], [0.5]])
def test_one_run_has_no_spread(accuracies):
    with pytest.raises(ValueError, match="two or more"):
        stats.over_seeds(accuracies)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_refused_or_stays_nan(bad):
    for call in (stats.bootstrap, stats.over_seeds):
        with pytest.raises(ValueError, match=f"^{bad} is not a number to average$"):
            call([0.5, bad, 0.5])
    for p in ({"a": bad}, {"a": 0.1, "b": bad}, {"a": -0.1}, {"a": 1.1}):
        with pytest.raises(ValueError, match="are not all between 0 and 1"):
            stats.holm(p)
    assert math.isnan(stats.half_95([1.0, 2.0, bad])) and math.isnan(stats.half_95([bad] * 9))
    assert math.isnan(stats.t_test(math.nan, 1.0, 3)) and math.isnan(stats.t_test(1.0, math.nan, 3))


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="there are no values"):
        stats.bootstrap([])
    for right, n in ((0, 0), (1, 0), (-1, 3), (4, 3), (0, -1)):
        with pytest.raises(ValueError, match=f"^{right} of {n} is not a share$"):
            stats.wilson(right, n)
    for df in (0, -1):
        with pytest.raises(ValueError, match="degree of freedom"):
            stats.t_test(1.0, 1.0, df)


def test_extreme_differences_have_p_values_too():
    assert stats.mcnemar(0, 0) == 1.0 and stats.t_test(0.0, 1.0, 3) == 1.0
    assert stats.t_test(math.inf, 1.0, 3) == stats.t_test(1e300, 1e-300, 5) == pytest.approx(0)
    one = stats.paired_difference({"q": False}, {"q": True})
    assert (one["mean"], one["stderr"], one["interval"], one["p"]) == (1, 0, (1, 1), 1)


# ---- files ----


def write(path, ids, right=True, end="\n", **more):
    lines = [json.dumps({"id": id, "gold": "1", "verdict": right, **more}) for id in ids]
    path.write_text("\n".join(lines) + end)
    return str(path)


def test_questions_that_are_not_in_all_files_are_left_out_and_counted(tmp_path):
    a = write(tmp_path / "a", ["p", "q", "r"])
    b = write(tmp_path / "b", ["r", "s", "q"], right=False)
    found, n_others = read_common([a, b])
    assert found == [{"q": True, "r": True}, {"q": False, "r": False}] and n_others == 2


def test_files_that_cannot_be_compared_end_in_one_sentence(tmp_path):
    a, b = write(tmp_path / "a", ["p"]), write(tmp_path / "b", ["q"])
    other = write(tmp_path / "c", ["p"], gold="2")
    for paths, words in [([a, b], "no question is in all"), ([a, a], "named twice"),
                         ([a, other], "not the same question"), ([a, a + "x"], "there is no file"),
                         ([a, str(tmp_path)], "is not a file"), ([a, ""], "has no name"),
                         ([a, " "], "has no name")]:
        with pytest.raises((ValueError, OSError), match=words) as error:
            read_common(paths)
        assert "\n" not in str(error.value)


def test_a_line_cut_anywhere_is_left_out_and_a_whole_one_without_its_end_counts(tmp_path):
    path = tmp_path / "x"
    last = json.dumps({"id": "{}", "text": 'a}"\u2028\x85b', "gold": None, "verdict": True})
    for cut in range(len(last)):
        write(path, ["p", "q"], end="\n" + last[:cut])
        assert list(read_answers(path)) == ["p", "q"]
    write(path, ["p", "q"], end="\n" + last)
    assert list(read_answers(path)) == ["p", "q", "{}"]


@pytest.mark.parametrize("bad", [b"{}", b"[]", b"null", b"7", b"x", b"\xff", b"[" * 100_000,
                                 b'{"id": [], "verdict": true}', b'{"id": 1, "verdict": 1}',
                                 b'{"id": 1, "verdict": true}', b'{"id": null, "verdict": true}',
                                 b'{"id": "q2", "verdict": NaN}', b'{"id": "q2", "verdict": null}',
                                 b'{"id": "q2", "verdict": %s}' % (b"9" * 5_000),
                                 b'{"id": "p", "verdict": true}', b'{"verdict": true}'])
def test_a_line_that_is_no_answer_or_no_new_one_is_named(tmp_path, bad):
    path = tmp_path / "x"
    write(path, ["p"])
    path.write_bytes(path.read_bytes() + bad + b"\n\n" + b'{"id": "q", "verdict": true}\n')
    with pytest.raises(ValueError, match="line 2,") as error:
        read_answers(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_settings_in_which_two_files_differ_are_printed(tmp_path, capsys):
    a, b, c = (write(tmp_path / f"{name}.jsonl", ["p", "q"]) for name in "abc")
    same = dict(task="toy", steps=8, weights_hash="1", init_from="x", file="x", device="cpu")
    for name, n_shot in (("a", 0), ("b", 4)):
        other = dict(weights_hash=name, init_from=name, file=name, n_shot=n_shot, device=name)
        (tmp_path / f"{name}.json").write_text(json.dumps({"settings": same | other}))
    answers.print_comparison(a, b)
    printed = capsys.readouterr().out
    assert "made with n_shot = 0, 4\n" in printed and printed.count("made with") == 1
    for content in (None, "{", "[" * 100_000, '{"settings": 5}', '{"settings": null}', "[]", "\0"):
        if content is not None:
            (tmp_path / "c.json").write_text(content)
        answers.print_seeds([a, c])
        printed = capsys.readouterr().out
        assert "how 1 of 2 files were made is not known" in printed and "made with" not in printed


def test_an_empty_file_has_no_answers(tmp_path):
    assert read_answers(write(tmp_path / "x", [])) == {}


# ---- Student's t ----


@pytest.mark.parametrize("t, df, p", [      # from printed tables of the two-sided t
    (12.706, 1, 0.05), (4.303, 2, 0.05), (3.182, 3, 0.05), (2.776, 4, 0.05), (2.571, 5, 0.05),
    (2.262, 9, 0.05), (63.657, 1, 0.01), (9.925, 2, 0.01), (3.169, 10, 0.01), (2.750, 30, 0.01)])
def test_students_t_is_that_of_the_tables(t, df, p):
    assert stats.t_test(t, 1.0, df) == pytest.approx(p, rel=2e-3)
    assert stats.t_test(-3 * t, 3.0, df) == pytest.approx(p, rel=2e-3)


@given(st.integers(1, 40), st.floats(0.01, 50))
def test_students_t_is_its_density_summed_up(df, t):
    density = lambda x: math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(
        df * math.pi) * (1 + x * x / df) ** (-(df + 1) / 2)
    n = 4000
    inside = sum((1 if i in (0, n) else 4 if i % 2 else 2) * density(t * i / n)
                 for i in range(n + 1)) * t / n / 3             # Simpson
    assert stats.t_test(t, 1.0, df) == pytest.approx(1 - 2 * inside, abs=1e-6)


def test_a_p_is_never_below_zero_however_far_the_mean_is():
    for df in range(1, 60):
        for t in (10.0, 30.0, 100.0, 1e3, 1e6):
            assert 0 <= stats.t_test(t, 1.0, df) < 0.07
            assert stats.holm({"a": stats.t_test(t, 1.0, df)})["a"] >= 0


def test_half_of_an_interval_is_students_for_any_number_of_seeds():
    assert math.isnan(stats.half_95([])) and math.isnan(stats.half_95([1.0, 2.0]))
    # at df = 2 p = 1 - t / sqrt(2 + t * t), so t = sqrt(2 q q / (1 - q q)) at q = 0.95
    t = math.sqrt(2 * 0.95 ** 2 / (1 - 0.95 ** 2))
    assert stats.half_95([1.0, 2.0, 3.0]) == pytest.approx(t / math.sqrt(3), rel=1e-12)
    for n in (4, 11, 25, 100):                  # 25 and 100 are beyond any printed table
        values = [float(i % 5) for i in range(n)]
        stderr = statistics.stdev(values) / math.sqrt(n)
        assert stats.t_test(stats.half_95(values), stderr, n - 1) == pytest.approx(0.05, abs=1e-12)
    many = [0.0, 1.0] * 20_000
    assert stats.half_95(many) == pytest.approx(stats.Z * 0.5 / math.sqrt(len(many)), rel=1e-4)


# ---- several comparisons at once ----


def test_holms_p_values_are_the_textbooks():
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    assert stats.holm(p) == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert stats.holm({}) == {} and stats.holm({"a": 0.3}) == {"a": 0.3}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holms_p_values_keep_the_order_and_are_between_one_and_n_times_the_own(values):
    p = dict(enumerate(values))
    adjusted = stats.holm(p)
    order = sorted(p, key=p.get)
    assert all(adjusted[a] <= adjusted[b] for a, b in zip(order, order[1:]))
    assert all(p[i] <= adjusted[i] <= min(1.0, len(p) * p[i]) for i in p)


def test_in_words_a_p_is_a_number_down_to_one_in_ten_thousand():
    difference = {"mean": 0.5, "stderr": 0.1, "interval": (0.3, 0.7), "n": 9, "both": 1,
                  "only_first": 2, "only_second": 3, "neither": 3}
    for p, said in ((0.0412, "p = 0.041"), (1e-4, "p = 0.0001"), (9e-5, "p < 0.0001")):
        assert f"exact {said}\n" in stats.in_words({**difference, "p": p}, "A", "B")


# ---- Fisher's F ----


@pytest.mark.parametrize("ratio, above, below, p", [     # from printed tables of the upper tail
    (161.45, 1, 1, 0.05), (9.6045, 4, 4, 0.025), (3.3258, 5, 10, 0.05), (5.9525, 3, 12, 0.01),
    (2.1526, 9, 36, 0.05), (15.439, 3, 3, 0.025), (1.0, 7, 7, 0.5)])
def test_fishers_f_is_that_of_the_tables(ratio, above, below, p):
    assert stats.f_test(ratio, above, below) == pytest.approx(p, rel=2e-4)


@given(st.floats(1e-3, 50), st.integers(1, 60))
@settings(deadline=None)
def test_f_with_one_degree_above_is_students_t_squared(t, df):
    assert stats.f_test(t * t, 1, df) == pytest.approx(stats.t_test(t, 1.0, df), abs=1e-11)


@given(st.floats(1e-3, 1e3), st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None)
def test_f_turned_over_is_f_with_its_degrees_exchanged(ratio, above, below):
    assert stats.f_test(ratio, above, below) == pytest.approx(
        1 - stats.f_test(1 / ratio, below, above), abs=1e-11)
    if above % 2 == 0:                      # a finite sum: the tail of a binomial
        x, k = below / (below + above * ratio), above // 2
        total = sum(math.exp(math.lgamma(below / 2 + i) - math.lgamma(below / 2)
                             - math.lgamma(i + 1)) * (1 - x) ** i for i in range(k))
        assert stats.f_test(ratio, above, below) == pytest.approx(x ** (below / 2) * total,
                                                                 rel=1e-8, abs=1e-12)


def test_f_at_its_borders_and_of_what_is_none():
    assert stats.f_test(0.0, 3, 4) == 1.0 and stats.f_test(math.inf, 3, 4) == 0.0
    assert math.isnan(stats.f_test(math.nan, 3, 4))
    for wrong in ((1.0, 0, 3), (1.0, 3, 0), (-1.0, 3, 3)):
        with pytest.raises(ValueError, match="degrees of freedom"):
            stats.f_test(*wrong)


# ---- two spreads ----


@given(st.integers(0, 10_000), st.integers(3, 20), st.floats(-0.95, 0.95))
@settings(max_examples=60, deadline=None)
def test_at_the_ends_of_a_ratio_of_spreads_sum_and_difference_just_correlate(seed, n, r):
    draw = random.Random(seed)
    first = [draw.gauss(40, 3) for _ in range(n)]
    second = [r * x + 6 * draw.gauss(0, 1) for x in first]
    ratio, low, high = stats.sd_ratio(first, second)
    assert ratio == pytest.approx(statistics.stdev(second) / statistics.stdev(first))
    assert low * high == pytest.approx(ratio ** 2) and low <= ratio <= high
    assert stats.sd_ratio(second, first) == pytest.approx((1 / ratio, 1 / high, 1 / low))
    for end in (low, high):
        rho = statistics.correlation([y + end * x for x, y in zip(first, second)],
                                     [y - end * x for x, y in zip(first, second)])
        t = rho * math.sqrt((n - 2) / (1 - rho * rho))
        assert stats.t_test(t, 1.0, n - 2) == pytest.approx(0.05, abs=1e-6)


def test_the_interval_of_a_ratio_of_spreads_covers_it_19_times_of_20():
    draw, hits = random.Random(0), 0
    for _ in range(2000):
        shared = [draw.gauss(0, 2) for _ in range(6)]
        first = [x + draw.gauss(0, 1) for x in shared]
        second = [2 * (x + draw.gauss(0, 1)) for x in shared]
        _, low, high = stats.sd_ratio(first, second)
        hits += low <= 2 <= high
    assert 0.935 < hits / 2000 < 0.965


def test_spreads_that_do_not_vary_or_of_few_pairs_have_no_ratio_or_no_ends():
    for none in (([1.0], [1.0]), ([], []), ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])):
        assert all(map(math.isnan, stats.sd_ratio(*none)))
    for first, second, ratio in (([1.0, 2.0], [2.0, 6.0], 4), ([1.0, 2.0, 3.0], [2.0] * 3, 0)):
        found, *ends = stats.sd_ratio(first, second)
        assert found == pytest.approx(ratio) and all(map(math.isnan, ends))
    assert stats.sd_ratio([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]) == pytest.approx((2, 2, 2))
