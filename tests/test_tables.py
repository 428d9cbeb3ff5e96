"""Laws of tables.py: numbers as by hand, cells without one say so, validation chooses."""
import json
import math
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from analysis import tables
from analysis.arms import ARMS, label
from analysis.effects import cells_of, pooled
from analysis.frames import choose, frame_of, losses_in, read_results, read_study
from analysis.tables import TablesConfig, render
from tasks.stats import half_95, t_test

ROOT = Path(__file__).resolve().parent.parent


def line(arm, seed, accuracy, pair=(0.0, 0), split="test", n_shot=0, config="words", **more):
    name = f"{arm}_{pair[0]}_{pair[1]}_seed{seed}"
    return {"config": config, "arm": arm, "lambda": pair[0], "depth": pair[1], "seed": seed,
            "split": split, "n_shot": n_shot, "init_from": "", "metrics": {"accuracy": accuracy,
            "n": 10}, "answers": f"{config}/{name}/{split}_{n_shot}shot.jsonl", **more}


def write(folder, lines, verdicts=None):
    """results.jsonl in folder; verdicts: {(arm, seed): a string of 1 and 0, by question}."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    for each in lines:
        if (each["arm"], each["seed"]) in (verdicts or {}):
            path = folder / each["answers"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(
                json.dumps({"id": str(i), "gold": "x", "verdict": v == "1"}) + "\n"
                for i, v in enumerate(verdicts[each["arm"], each["seed"]])))
    return str(folder / "results.jsonl")


def rows_of(text, name):
    """{first cells of a row: its cells} of the table with this name."""
    body = next(part for part in text.split("## ") if part.startswith(name))
    rows = [row.strip("| ").split(" | ") for row in body.splitlines() if row.startswith("|")]
    assert len({len(row) for row in rows}) == 1                 # as many cells as the header
    return [dict(enumerate(row)) for row in rows[2:]]


def row(text, name, *first):
    [found] = [cells for cells in rows_of(text, name)
               if all(cells[i] == value for i, value in enumerate(first))]
    return list(found.values())


# ---- numbers ----


def test_the_main_table_is_what_a_hand_computes(tmp_path):
    at = (1.0, 2)
    lines = [line("plain", 1, 0.4), line("plain", 2, 0.5), line("plain", 3, 0.6),
             line("jepa", 1, 0.5, at), line("jepa", 2, 0.7, at), line("jepa", 3, 0.9, at),
             line("jepa", 1, 0.1, at, "validation")]
    path = write(tmp_path, lines, {("plain", 1): "1111000000", ("jepa", 1): "1111100000",
                                   ("plain", 2): "1111100000", ("jepa", 2): "0000011111"})
    cells = row(render(read_results([path])), "0-shot", "words")
    assert cells[1:6] == ["10", "from scratch", "50.00 (sd 10.00, n = 3)",
                          "70.00 (sd 20.00, n = 3)", "1, 2"]
    # differences 10, 20, 30: mean 20, stderr 10 / sqrt(3), t = 2 sqrt(3) = 3.46, df = 2
    assert cells[6] == f"+20.00 +- {4.302653 * 10 / math.sqrt(3):.2f} (n = 3)"
    t = 2 * math.sqrt(3)
    assert cells[7] == f"{1 - t / math.sqrt(2 + t * t):.2g}" == "0.074"     # closed form at df = 2
    assert cells[8] == "1: 1, 2: 1"         # 0 against 1, 5 against 5; seed 3 is not on file
    assert cells[9:] == ["not given", "not given"]


def test_one_seed_has_no_spread_and_no_p_of_seeds(tmp_path):
    lines = [line("plain", 42, 0.2, n_shot=4), line("jepa", 42, 0.9, (1.0, 2), n_shot=4)]
    path = write(tmp_path, lines, {("plain", 42): "1100000000", ("jepa", 42): "0111111111"})
    cells = row(render(read_results([path])), "Main table, 4-shot", "words")
    assert cells[3:9] == ["20.00 (n = 1)", "90.00 (n = 1)", "1, 2", "+70.00 (n = 1)", "-",
                          f"42: {2 * (1 + 9) / 2 ** 9:.2g}"]


def test_a_difference_takes_the_seeds_that_both_arms_have():
    lines = [line("plain", 1, 0.1), line("plain", 2, 0.2), line("jepa", 2, 0.5, (1.0, 2)),
             line("jepa", 3, 0.9, (1.0, 2))]
    assert row(render(lines), "0-shot", "words")[6] == "+30.00 (n = 1)"


def test_published_numbers_stand_beside_ours():
    text = render([line("jepa", 42, 0.5, (0.5, 1), n_shot=4, config="llada8b_gsm8k"),
                   line("plain", 42, 0.4, n_shot=4, config="llada8b_gsm8k")])
    cells = row(text, "Main table, 4-shot", "llada8b_gsm8k")
    assert cells[3:5] == ["40.00 (n = 1)", "50.00 (n = 1)"] and cells[9:] == ["42.61", "61.33"]
    assert row(text, "Main table", "dream7b_django")[9:] == ["69.58", "72.35"]
    assert row(text, "0-shot", "llada8b_gsm8k_wide_t")[9:] == ["65.23 (sd 0.93)",
                                                               "67.07 (sd 0.41)"]
    assert row(text, "Sensitivity", "llada8b_gsm8k", "rates 0.3, 0.9")[6] == "40.11 (11 %)"
    full = row(text, "Sensitivity", "llada8b_gsm8k", "JEPA")
    assert full[2:] == ["0.5, 1", "not run", "-", "-", "44.88", "50.00 (n = 1)", "+10.00 (n = 1)",
                        "-", "61.33"]


def test_the_base_row_is_a_score_from_scratch_or_not_run():
    base = line("base", None, 0.7, config="a", init_from="x")
    text = render([base, line("plain", 1, 0.5, config="a", init_from="x"),
                   line("plain", 1, 0.5, config="b", init_from="x"), line("plain", 1, 0.5)])
    assert [row(text, "0-shot", config)[2] for config in ("a", "b", "words", "llada8b_gsm8k")] == [
        "70.00", "not run", "from scratch", "not run"]


def test_what_was_run_comes_before_what_the_paper_alone_has():
    text = render([line("plain", 1, 0.5)])
    for name in ("0-shot",):
        configs = [cells[0] for cells in rows_of(text, name)]
        assert configs == ["words", "llada8b_gsm8k", "llada8b_gsm8k_wide_t"]
    assert "words" not in [cells[0] for cells in rows_of(text, "Main table, 4-shot")]


def test_where_nothing_was_run_every_cell_of_ours_says_so():
    text = render([])
    theirs = {value for arms in (*tables.PUBLISHED.values(), tables.PRESERVED)
              for both in arms.values() for value in both}
    arms = {"base", "-", *map(label, ARMS)}
    for name in ("Main", "0-shot", "Sensitivity", "Ablation", "Base"):
        for cells in rows_of(text, name):
            cells = [re.sub(r" \(-?\d+ %\)$", "", cell) for cell in cells.values()]
            ours = {*cells[1:]} - theirs - arms
            assert ours == {"not run"}
    assert text.count("not run") > 90


# ---- choosing ----


def validated(scores, config="words"):
    return [line("jepa", seed, accuracy, pair, "validation", config=config)
            for pair, by_seed in scores.items() for seed, accuracy in by_seed.items()]


def test_the_choice_is_the_mean_on_validation_over_seeds_that_all_have():
    a, b, c = (0.5, 1), (1.0, 1), (1.0, 2)
    def chosen(scores, more=()):
        return choose(frame_of(validated(scores) + list(more)), "words")

    assert chosen({a: {1: 0.5, 2: 0.5}, b: {1: 0.9, 2: 0.2}}) == b
    assert chosen({a: {1: 0.5, 2: 0.5}, b: {1: 0.9, 2: 0.0}}) == a
    assert chosen({a: {1: 0.5}, b: {1: 0.4, 2: 1.0}}) == a                      # seed 1 only
    assert chosen({a: {1: 0.5}, b: {2: 0.6}}) is None
    assert chosen({c: {1: 0.5}, b: {1: 0.5}, a: {1: 0.4}}) == b                 # of equals
    assert chosen({}) is None
    others = validated({c: {1: 1.0}}, "other") + [line("jepa", 1, 1.0, c)]
    assert chosen({a: {1: 0.1}}, others) == a


def test_tables_show_the_pair_of_validation_though_another_is_better_on_test():
    a, b = (0.5, 1), (1.0, 3)
    lines = validated({a: {1: 0.6, 2: 0.6}, b: {1: 0.5, 2: 0.5}})
    tested = [line("jepa", 1, 0.3, a), line("jepa", 2, 0.4, a), line("jepa", 1, 0.5, b),
              line("jepa", 2, 0.8, b), line("plain", 1, 0.1)]
    assert row(render(lines + tested), "0-shot", "words")[4:6] == [
        f"35.00 (sd {statistics.stdev([30, 40]):.2f}, n = 2)", "0.5, 1"]
    text = render(validated({a: {1: 0.5}, b: {2: 0.6}}) + tested)       # nothing is chosen
    assert row(text, "0-shot", "words")[3:6] == ["10.00 (n = 1)", "not run", "not run"]


def test_ablation_takes_each_arm_at_the_chosen_pair_as_far_as_it_has_it():
    a, b = (0.5, 1), (1.0, 3)
    lines = validated({a: {1: 0.1}, b: {1: 0.5}}) + [
        line("plain", 1, 0.2), line("jepa", 1, 0.6, b), line("symmetric", 1, 0.9, a),
        line("symmetric", 1, 0.3, b), line("no_predictor", 1, 0.5, (1.0, 0)),
        line("shuffled", 1, 0.4, b)]
    text = render(lines)
    assert [(cells[1], cells[2], cells[3], cells[4]) for cells in rows_of(text, "Ablation")
            if cells[0] == "words"] == [
        ("plain", "0, 0", "20.00 (n = 1)", "-"),
        ("symmetric rates", "1, 3", "30.00 (n = 1)", "+10.00 (n = 1)"),
        ("no predictor", "1, 0", "50.00 (n = 1)", "+30.00 (n = 1)"),
        ("shuffled target", "1, 3", "40.00 (n = 1)", "+20.00 (n = 1)"),
        ("JEPA", "1, 3", "60.00 (n = 1)", "+40.00 (n = 1)")]


# ---- controls ----


def test_controls_are_compared_with_jepa_and_the_p_of_all_are_raised_together():
    at = (1.0, 2)
    scores = {"jepa": (0.6, 0.7, 0.9), "shuffled": (0.5, 0.6, 0.7), "plain": (0.6, 0.6, 0.7),
              "online": (0.6, 0.7, 0.9), "l2": (0.1,)}
    text = render([line(arm, seed, score, (0.0, 0) if arm in ("plain", "l2") else at)
                   for arm, of in scores.items() for seed, score in enumerate(of)])
    name = "Controls: words, 0-shot"
    assert [cells[0] for cells in rows_of(text, name)] == [
        "JEPA", "online target", "plain", "shuffled target", "L2 to the base"]
    def p(values):
        return t_test(statistics.mean(values), statistics.stdev(values) / math.sqrt(3), 2)
    over, under = [-10, 0, 0], [10, 10, 20]
    shuffled = row(text, name, "shuffled target")
    [first, second] = shuffled[5::4]
    assert re.fullmatch(r"-6\.67 \+- [\d.]+, p = [\d.]+", second.replace("+13.33", "-6.67"))
    assert re.fullmatch(r"-3\.33 \+- [\d.]+, p = [\d.]+", first)
    del shuffled[5::4]
    assert shuffled == [
        "shuffled target", "60.00 (sd 10.00, n = 3)", with_half(over), f"{p(over):.2g}",
        f"{3 * p([0, 10, 20]):.2g}", with_half(under), f"{p(under):.2g}", f"{2 * p(under):.2g}"]
    assert "Holm over 3 arms - plain, and over 2 JEPA - arm." in text
    assert row(text, name, "online target")[6:9] == ["+0.00 +- 0.00 (n = 3)", "-", "-"]
    assert row(text, name, "L2 to the base")[2:5] == ["-50.00 (n = 1)", "-", "-"]
    assert row(text, name, "JEPA")[6:] == ["-"] * 4 == row(text, name, "plain")[2:6]


def with_half(values, form="+.2f"):
    half = 4.302653 * statistics.stdev(values) / math.sqrt(3)
    return f"{statistics.mean(values):{form}} +- {half:{form[1:]}} (n = 3)"


def test_each_outcome_has_a_table_of_its_own_and_of_losses_the_least_is_first():
    def held_out(arm, seed):
        own, other = seed / 4 - (arm == "jepa") * seed / 8, seed + (arm == "jepa")
        return {"toy": {"1": [9.0, 2 * own], "0.25": [9.0, own]},
                "toy_base": {"0.5": [1.0, 1.0 + other], "1": [2.0, 2.0 + other]}}
    text = render([line(arm, seed, 0.5, (0.0, 0) if arm == "plain" else (1.0, 2), n_shot=n_shot,
                        held_out=held_out(arm, seed))
                   for arm in ("plain", "jepa") for seed in (1, 2, 3) for n_shot in (0, 4)])
    names = re.findall("## (Controls: .*)", text)
    assert names == [f"Controls: words, {name}" for name in (
        "4-shot", "0-shot", "held-out loss, t = 0.25", "held-out loss, t = 1",
        "held-out loss, mean over t", "growth of the loss on the other corpus")]
    for over in ("t = 1", "mean over t"):
        assert f" ({over}, p = 0.074)" in text.partition("## ")[0]
    for name, differences in zip(names[2:], ([-1 / 8, -2 / 8, -3 / 8], [-2 / 8, -4 / 8, -6 / 8],
                                             [-3 / 16, -6 / 16, -9 / 16], [1, 1, 1])):
        assert row(text, name, "JEPA")[2] == with_half(differences, "+.3f")
        arms = [cells[0] for cells in rows_of(text, name)]
        assert arms == (["JEPA", "plain"] if "held-out" in name else ["plain", "JEPA"])


def test_an_arm_of_the_uniform_rate_is_compared_with_its_own_plain():
    scores = {"plain": (0.2, 0.3), "jepa": (0.3, 0.5), "plain_uniform": (0.6, 0.6),
              "jepa_uniform": (0.6, 0.7)}
    text = render([line(arm, seed, score, (1.0, 2) if "jepa" in arm else (0.0, 0))
                   for arm, of in scores.items() for seed, score in enumerate(of)])
    for name, column in (("Controls: words, 0-shot", 2), ("Ablation", 4)):
        rows = {cells[0] if column == 2 else cells[1]: cells[column]
                for cells in rows_of(text, name) if "llada8b" not in cells[0]}
        assert rows == {"JEPA, t ~ U(0, 1)": "+5.00 (n = 2)", "plain, t ~ U(0, 1)": "-",
                        "JEPA": "+15.00 (n = 2)", "plain": "-"}
    assert "(JEPA - plain, both with t ~ U(0, 1)) = +10.00 (n = 2), p = " in text


def test_the_two_effects_of_jepa_are_compared_over_the_seeds_of_all_four_arms():
    scores = {"plain": {1: 0.9, 2: 0.2, 3: 0.3}, "jepa": {1: 0.1, 2: 0.3, 3: 0.5},
              "plain_uniform": {2: 0.6, 3: 0.6, 4: 0.1}, "jepa_uniform": {2: 0.6, 3: 0.7, 4: 0.9}}
    lines = [line(arm, seed, score, (1.0, 2) if "jepa" in arm else (0.0, 0))
             for arm, of in scores.items() for seed, score in of.items()]
    assert "(JEPA - plain, both with t ~ U(0, 1)) = +10.00 (n = 2)" in render(lines)
    three = [one for one in lines if one["arm"] != "plain_uniform"]
    assert "(JEPA - plain, both" not in render(three)


def test_losses_are_of_the_shots_with_most_seeds_and_controls_take_no_jepa():
    def study(arms):
        return [line(arm, seed, 0.5, n_shot=n_shot, held_out={"toy": {"1": [9.0, 1.0 + seed]}})
                for arm in arms for n_shot, n in ((4, 2), (0, 3)) for seed in range(n)]
    text = render(study(["plain", "l2"]))
    assert row(text, "Controls: words, held-out loss, t = 1", "plain")[1] == (
        "2.000 (sd 1.000, n = 3)")
    assert row(text, "Controls: words, 4-shot", "L2 to the base")[2] == "+0.00 (n = 2)"
    assert "Controls" not in render(study(["plain"]))


def test_with_other_seeds_the_pooled_difference_stands_beside_the_paired_one():
    """JEPA lacks the block in which plain is low: the pairs have 10 points, and so has the fit."""
    scores = {"plain": (0.1, 0.4, 0.5, 0.6), "jepa": (None, 0.5, 0.6, 0.7),
              "l2": (0.3, 0.4, 0.5, 0.6)}
    text = render([line(arm, seed, score, (1.0, 2) if arm == "jepa" else (0.0, 0))
                   for arm, of in scores.items() for seed, score in enumerate(of) if score])
    cells = row(text, "Controls: words, 0-shot", "JEPA")
    assert cells[2] == "+10.00 +- 0.00 (n = 3)"
    fit = pooled(cells_of(frame_of([line(arm, seed, score) for arm, of in scores.items()
                                    for seed, score in enumerate(of) if score]), "words", 0,
                          "accuracy"))
    found = fit.difference("jepa", "plain")
    assert cells[5] == f"{found.mean:+.2f} +- {found.half:.2f}, p = {found.p:.2g}"
    assert abs(found.mean - 10) > 1


def test_a_family_of_one_is_not_corrected_and_a_label_with_a_comma_is_in_brackets():
    lines = [line(arm, seed, score / 100, (1.0, 2) if arm == "jepa" else (0.0, 0))
             for arm, scores in (("plain", (40, 50, 61)), ("equal_flop", (45, 52, 60)),
                                 ("jepa", (50, 70, 90))) for seed, score in enumerate(scores)]
    text = render(lines)
    assert "(JEPA - (plain" not in text and "JEPA - (plain, 4/3 of the steps), the same" in text
    for cells in rows_of(text, "What the 95 %"):
        assert cells[4] != "-" and cells[5] == "-"
    assert row(text, "Controls: words, 0-shot", "JEPA")[4] != "-"       # of two
    two = render(lines[:3] + lines[6:])
    assert row(two, "Controls: words, 0-shot", "JEPA")[3] != "-"
    assert row(two, "Controls: words, 0-shot", "JEPA")[4] == "-"


def test_tables_of_the_paper_alone_come_last():
    names = re.findall("## (.*)", render([line(arm, seed, 0.5) for arm in ("plain", "jepa")
                                          for seed in (1, 2)]))
    assert names[0] == "0-shot" and names.index("Main table, 4-shot") > names.index(
        "Controls: words, 0-shot")


# ---- base preservation ----


def test_models_of_a_grid_are_arms_and_others_have_rows_of_their_own():
    at, config = (1.0, 2), "llada8b_gsm8k_wide_t"
    lines = [line("plain", seed, 0.5, config=config) for seed in (1, 2)]
    lines += [line("jepa", 1, 0.5, at, config=config)]
    scores = lambda loss, share: {"wikitext": {"minus_base": loss}, "mmlu": {"accuracy": share}}
    summary = {"settings": {"base": "GSAI-ML/LLaDA-8B-Base"}, "models": {
        "GSAI-ML/LLaDA-8B-Base": scores(0.0, 0.5), "elsewhere/run": scores(-0.5, 0.25),
        f"out/grid/{config}/plain_0.0_0_seed1": scores(0.01, 0.5),
        f"out/grid/{config}/plain_0.0_0_seed2": scores(0.03, 0.6),
        f"out/grid/{config}/jepa_1.0_2_seed1/": scores(-0.02, 0.7)}}
    text = render(lines, [summary])
    assert row(text, "Base", config, "plain")[2:] == [
        f"+0.0200 (sd {statistics.stdev([0.01, 0.03]):.4f}, n = 2)", "-0.0004",
        f"55.00 (sd {statistics.stdev([50, 60]):.2f}, n = 2)", "57.93 (sd 0.42)",
        "50.00 (sd 0.00, n = 2)", "65.23 (sd 0.93)"]
    assert row(text, "Base", config, "JEPA")[2:5:2] == ["-0.0200 (n = 1)", "70.00 (n = 1)"]
    assert row(text, "Base", config, "L2 to the base")[2] == "not run"
    assert row(text, "Base", "elsewhere/run")[1:] == ["-", "-0.5000 (n = 1)", "not given",
                                                      "25.00 (n = 1)", "not given", "not run",
                                                      "not given"]
    assert row(text, "Base", "GSAI-ML/LLaDA-8B-Base")[1:3] == ["base", "+0.0000 (n = 1)"]


def test_equal_differences_allow_no_p():
    assert math.isnan(t_test(0.5, 0.0, 2))
    lines = [line("plain", s, 0.25) for s in (1, 2)] + [line("jepa", s, 0.5, (1.0, 2))
                                                        for s in (1, 2)]
    assert row(render(lines), "0-shot", "words")[6:8] == ["+25.00 (n = 2)", "-"]


# ---- files ----


def test_several_files_are_one_table_in_any_order(tmp_path):
    one = [line("plain", s, 0.1 * s) for s in (1, 2, 3)]
    two = [line("jepa", s, 0.2 * s, (1.0, 2)) for s in (1, 2, 3)]
    paths = [write(tmp_path / "one", one), write(tmp_path / "two", two)]
    together = render(read_results(paths))
    random.Random(0).shuffle(one)
    write(tmp_path / "one", one)
    assert render(read_results(paths[::-1])) == together
    assert f"+20.00 +- {half_95([10, 20, 30]):.2f} (n = 3)" in together
    assert render(read_results([tmp_path])) == together     # a folder is all that it holds


def test_bad_files_are_told_in_one_sentence(tmp_path):
    path = Path(write(tmp_path, [line("plain", 1, 0.5)]))
    good = path.read_text()
    with pytest.raises(FileNotFoundError, match="grid.py"):
        read_results([tmp_path / "none.jsonl"])
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", ""):
        with pytest.raises(FileNotFoundError, match="grid.py"):
            read_results([path, folder])
    for bad in (good + good, good + "{}\n", good + "[1]\n", good + "\0\n", good + "x\n" + good,
                good.replace("0.5", '"0.5"'), good.replace("0.5", "NaN")):
        path.write_text(bad)
        with pytest.raises(ValueError) as error:
            read_results([path])
        assert f"{path}, line" in str(error.value) and len(str(error.value).splitlines()) == 1
    with pytest.raises(ValueError, match="second time"):
        path.write_text(good)
        read_results([path, write(tmp_path / "other", [line("plain", 1, 0.5)])])
    path.write_text(good + good[:50])                   # a kill has cut it short
    assert len(read_results([path])) == 1


def test_the_script_prints_the_tables_of_the_file_of_grid_py(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "out/grid", [line("plain", 1, 0.5)])
    done = subprocess.run([sys.executable, str(ROOT / "analysis/tables.py"), f"--results={path}"],
                          cwd=tmp_path, text=True, capture_output=True)
    assert done.stdout.rstrip("\n") == render(read_results([path])) and "words" in done.stdout
    monkeypatch.chdir(tmp_path)
    tables.main(TablesConfig())
    assert capsys.readouterr().out == done.stdout
    Path("out/grid/results.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="grid.py"):
        tables.main(TablesConfig())


def test_the_losses_of_a_result_are_those_after_training_by_rate_and_their_mean():
    """Rates are numbers: written out, 9e-02 comes after 1 and 0.5."""
    held_out = {"toy": {"0.5": [9.0, 2.0], "9e-02": [8.0, 1.0], "1": [7.0, 3.0]},
                "toy_base": {"0.5": [1.0, 1.5], "1": [2.0, 3.5]}}
    frame = frame_of([line("jepa", 1, 0.5, (1.0, 2), held_out=held_out), line("plain", 1, 0.5)])
    assert losses_in(frame) == ["t = 0.09", "t = 0.5", "t = 1", "mean over t"]
    [found, without] = frame[[*losses_in(frame), "forgetting", "accuracy"]].values.tolist()
    assert found == [1.0, 2.0, 3.0, 2.0, 1.0, 50.0]
    assert all(map(math.isnan, without[:-1])) and losses_in(frame.iloc[1:]) == []


def test_a_score_on_validation_is_in_no_table_of_test_scores():
    text = render([line("plain", 1, 0.25), line("plain", 2, 0.75, split="validation")])
    assert row(text, "0-shot", "words")[3] == "25.00 (n = 1)"


# ---- what is kept, and what is excluded ----


def kept_study(base=0.9):
    """Three bases, each of two seeds; JEPA keeps half of what plain loses."""
    lines = [line("base", None, base + k / 100, init_from=f"out/base_{k}") for k in range(3)]
    for seed in range(6):
        k, lost = seed % 3, 0.2 + seed / 50
        for arm, share in (("plain", 0.0), ("jepa", 0.5), ("equal_flop", -0.25)):
            score = round(0.9 + k / 100 - lost * (1 - share), 6)
            lines.append(line(arm, seed, score, (1.0, 2) if arm == "jepa" else (0.0, 0),
                              init_from=f"out/base_{k}"))
    return lines


def test_what_an_arm_keeps_is_its_share_of_the_distance_from_plain_to_the_own_base():
    text = render(kept_study())
    name = "What is kept of the base's score"
    assert row(text, name, "words", "0", "JEPA")[3:] == [
        "91.00 (sd 1.00, n = 3)", "78.50 (sd 1.64, n = 6)", "-12.50 +- 1.96 (n = 6)",
        "50 % [50, 50]", "not given"]
    assert row(text, name, "words", "0", "plain")[6] == "-"
    assert row(text, name, "words", "0", "plain, 4/3 of the steps")[6] == "-25 % [-25, -25]"
    assert row(text, name, "llada8b_gsm8k", "4", "JEPA")[6:] == ["-", "68 %"]
    assert "JEPA keeps 50 % [50, 50]." in text
    assert row(text, "0-shot", "words")[2] == "91.00 (sd 1.00, n = 3)"


def test_where_plain_is_no_worse_than_its_base_there_is_nothing_to_keep():
    text = render(kept_study(base=0.1))
    assert [cells[0] for cells in rows_of(text, "What is kept")] == ["llada8b_gsm8k"]
    assert "JEPA keeps" not in text


def test_a_loss_that_is_not_told_from_zero_bounds_no_share():
    lines = [line("base", None, 0.5, init_from="b")] + [
        line(arm, seed, 0.5 + shift / 100, (1.0, 2) if arm == "jepa" else (0.0, 0), init_from="b")
        for arm, shifts in (("plain", (-3, 2, -2)), ("jepa", (1, 0, 2)))
        for seed, shift in enumerate(shifts)]
    assert row(render(lines), "What is kept", "words", "0", "JEPA")[6] == "not bounded"
    assert "Which share JEPA keeps of what plain loses of its base's score is not bounded." in (
        render(lines))


def test_the_intervals_are_written_with_both_ends_beside_the_papers_gain():
    lines = [line(arm, seed, score, (1.0, 2) if arm == "jepa" else (0.0, 0), n_shot=4,
                  config="llada8b_gsm8k")
             for arm, scores in (("plain", (0.4, 0.5, 0.6)), ("jepa", (0.5, 0.7, 0.9)))
             for seed, score in enumerate(scores)]
    text, half = render(lines), 4.302653 * 10 / math.sqrt(3)
    assert row(text, "What the 95 %", "llada8b_gsm8k") == [
        "llada8b_gsm8k", "4-shot", "JEPA - plain", f"+20.0 +- {half:.1f} (n = 3)", "0.074", "-",
        f"[{20 - half:+.1f}, {20 + half:+.1f}]", "-", "+18.72"]
    assert "8 cells, 4-shot, are +1.00 to +18.72." in text
    assert "at 95 % (p = 0.074, not corrected)" in text
    assert f"excluded are less than {20 - half:+.1f} and more than {20 + half:+.1f}." in text


def test_the_answer_says_what_is_not_told_and_what_is():
    two = [line("plain", 1, 0.4), line("jepa", 1, 0.5, (1.0, 2))]
    assert "words, 0-shot. JEPA - plain = +10.0 points of accuracy, from too few seeds" in (
        render(two))
    for shifts, told in (((0.1, 0.2, 0.15), "told from zero"), ((0.1, -0.2, 0.15), "not told")):
        lines = [line("plain", seed, 0.4) for seed in range(3)]
        lines += [line("jepa", seed, 0.4 + shift, (1.0, 2)) for seed, shift in enumerate(shifts)]
        assert f"points of accuracy, {told}" in render(lines)
    assert "points of accuracy" not in render([line("plain", 1, 0.4)]).partition("## ")[0]


def test_some_arms_only_are_shown_and_an_unknown_one_is_told(tmp_path, capsys):
    lines = kept_study()
    path = write(tmp_path, [one for one in lines if one["init_from"] == "out/base_2"]
                 + [line("plain", 1, 0.5, config="elsewhere")])
    tables.main(TablesConfig(results=(path,), arms=("plain", "jepa"), configs=("words",)))
    text = capsys.readouterr().out
    assert "4/3 of the steps |" not in text and "elsewhere" not in text and "| 92.00 |" in text
    with pytest.raises(ValueError, match="no arm 'jeppa' in the results, which have base, equal"):
        tables.main(TablesConfig(results=(path,), arms=("jeppa",)))
    with pytest.raises(ValueError, match="no config 'wrods' in the results, which have else"):
        tables.main(TablesConfig(results=(path,), configs=("wrods",)))


# ---- the mechanism ----


def test_the_mechanism_is_read_from_scores_probe_and_logs(tmp_path):
    """A drift that JEPA doubles with each seed, views that come apart, sd of 1 and of 2."""
    lines, models = [], {"base": dict(drift=[0.0] * 3, weight_drift=[0.0] * 3, mean_drift=0.0,
                                      forgetting=0.0)}
    for seed in (1, 2, 3, 4):
        for arm, k in (("plain", 1), ("jepa", 2)):
            lines.append(line(arm, seed, 0.5 + k * seed / 100, (k - 1.0, 2 * k - 2)))
            models[f"out/words/{arm}_seed{seed}"] = dict(
                drift=[1.0] * 3, weight_drift=[1.0] * 3, mean_drift=float(k * seed),
                forgetting=float(seed if arm == "plain" else -seed))
            log = [{"step": step, "corr_views": 1 - k * step / 10} for step in (1, 2, 3)]
            write_lines(tmp_path / "words" / f"{arm}_seed{seed}" / "log.jsonl", log)
    write_lines(tmp_path / "probe.json", [{
        "settings": {"base": "base", "text": "toy"}, "n": 4, "tokens": 9,
        "depths": ["embed", "1", "norm"], "models": models}])
    text = render(lines, study=read_study([str(tmp_path)]))
    rows = {cells[1]: cells[2] for cells in rows_of(text, "Mechanism") if cells[0] != "llada"}
    assert rows["drift of states, JEPA / plain"] == "2.00 [2.00, 2.00] (n = 4)"
    assert rows["r(drift, forgetting), plain"] == "+1.00 (n = 4)"
    assert rows["r(drift, forgetting), JEPA"] == "-1.00 (n = 4)"
    assert rows["forgetting of the probe, JEPA - plain"].startswith("-5.000 +- ")
    assert rows["correlation of embeddings, the two views of a row"] == (
        "0.800 (sd 0.000, n = 4) at step 1; 0.400 (sd 0.000, n = 4) at step 3")
    # JEPA's scores are a line through plain's
    assert rows["sd over seeds, 0-shot: plain, JEPA"] == "1.3, 2.6 (n = 4); ratio 2.00 [2.00, 2.00]"


def test_a_run_that_has_not_moved_is_a_row_and_the_other_tables_stay(tmp_path):
    still = dict(drift=[0.0] * 3, weight_drift=[0.0] * 3, mean_drift=0.0, forgetting=0.0)
    write_lines(tmp_path / "probe.json", [{
        "settings": {"base": "base", "text": "toy"}, "n": 4, "tokens": 9,
        "depths": ["embed", "1", "norm"],
        "models": {f"out/words/{arm}_seed1": still for arm in ("plain", "jepa")}}])
    text = render([line("plain", 1, 0.5)], study=read_study([str(tmp_path)]))
    assert row(text, "Mechanism", "words", "drift of states, JEPA / plain")[2] == "not moved"
    assert row(text, "0-shot", "words")[3] == "50.00 (n = 1)"


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))


def test_a_correlation_of_views_that_is_no_number_is_told_with_its_line(tmp_path):
    write_lines(tmp_path / "a" / "jepa_seed1" / "log.jsonl", [{"step": 1, "corr_views": "x"}])
    with pytest.raises(ValueError, match="log.jsonl, line 1, .* corr_views='x' is not a number"):
        read_study([str(tmp_path)])
