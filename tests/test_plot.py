"""Laws of plot.py: known numbers, pairs by seed, a picture of everything, no name breaks one."""
import json
import math
import os
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest

from helpers import script

from analysis import plot
from analysis.arms import ARMS
from analysis.frames import brief_names, by_arm, last_of_each, read_study, run_of
from analysis.drawing import COLOURS, FEW, WIDE, WIDTH, save, short, style_of
from analysis.plot import FIGURES, PlotConfig, draw, pareto
from tasks.stats import pearson

pytest.importorskip("matplotlib", reason="figures need requirements-plots.txt")
ROOT = Path(__file__).resolve().parent.parent
NAMES = list(FIGURES)
HOSTILE = ("$\\frac{", "_hidden", "</svg><script>alert(1)</script>", "a\x00\x1b[2J\nb", "x" * 400,
           "\u4e2d\u6587 \U0001f642", "\u202eabc", "&lt;&amp;\"'", "%s {x} {", "..")


def write(path, what):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = what if isinstance(what, list) else [what]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_study(root, seeds=4, task="toy", config="config/tiny.py", extra="no_predictor",
                text="toy_base", base="out/base", n_layer=4, n_arms=4):
    """The files of a study as the scripts write them, with made-up numbers -> root."""
    g = np.random.default_rng(0)
    models, results = {base: numbers_of(g, n_layer, 0)}, []
    arms = [("plain", 0, 2, 0.2, 0.7), ("jepa", 1, 2, 0.2, 0.7), (extra, 1, 0, 0.2, 0.7),
            ("rates_0.2_0.5", 1, 2, 0.2, 0.5), ("rates_0.3_0.9", 1, 2, 0.3, 0.9)][:n_arms]
    for seed in range(1, seeds + 1):
        for k, (arm, weight, depth, t_ctx, t_tgt) in enumerate(arms):
            out_dir = f"{root}/{arm}_lambda{weight}_depth{depth}_seed{seed}"    # as in grid.py
            log = [{"step": 0, "held_out": {task: {"0.5": 9.0}, text: {"0.5": 0.6}}}]
            for step in (10, 20, 30, 40):
                loss = 5 / step + g.random() / 5
                jepa = {"jepa": 1 / step, "jepa_floor": 0.2} if weight else {}
                log.append({"step": step, "loss": loss, "diffusion": loss, **jepa, "ms": 100.0})
            log.append({"step": 40, "held_out": {task: {"0.5": 0.4}, text: {"0.5": 2.6}}})
            name = arm if arm in ARMS else k                    # a path takes fewer characters
            write(root / f"{name}_seed{seed}" / "log.jsonl", log)
            for step in (20, 40):
                models[f"{out_dir}/step_{step:07d}"] = {
                    **numbers_of(g, n_layer, step / 40), "trained": {"step": step}}
            tried = [(weight, "validation"), (weight, "test")]
            tried += [(0.5, "validation")] * (arm == "jepa")
            for n_shot in (0, 4):
                for lamb, split in tried:
                    held_out = {"1": [9.0, 0.5 + k / 9], "0.2": [8.0, 0.1 + seed / 99]}
                    score = 0.3 + 0.05 * k + 0.01 * seed - 0.02 * (lamb == 0.5)
                    folder = f"{arm}_lambda{lamb}_depth{depth}_seed{seed}"
                    results.append({
                        "config": config, "arm": arm, "lambda": lamb, "depth": depth,
                        "seed": seed, "task": task, "split": split, "n_shot": n_shot,
                        "t_ctx": t_ctx, "t_tgt": t_tgt, "revision": "abc1234", "init_from": base,
                        "command": f"python eval_gsm8k.py '--init_from={out_dir}' --task=toy",
                        "answers": f"{folder}/{split}_{n_shot}shot.jsonl",
                        "held_out": {"task": held_out, "text": {"0.5": [0.6, 0.9 + k]}},
                        "metrics": {"accuracy": round(score, 3), "stderr": 0.02, "n": 500}})
    for n_shot in (0, 4):
        results.append(results[0] | {
            "arm": "base", "seed": None, "split": "test", "n_shot": n_shot,
            "answers": f"base/test_{n_shot}shot.jsonl", "metrics": {"accuracy": 0.75, "n": 500}})
    write(root / "probe.json", {
        "settings": {"base": base, "text": text, "rates": [0.2, 0.5, 0.8]}, "commit": "abc1234",
        "n": 64, "tokens": 1159, "models": models,
        "depths": ["embed", *map(str, range(1, n_layer + 1)), "norm"]})
    write(root / "results.jsonl", results)
    kept = {"wikitext": {"n": 8, "mean": 2.0, "minus_base": 0.25, "half_95": 0.1},
            "mmlu": {"n": 500, "accuracy": 0.57}}
    write(root / "kept" / "summary.json", {"settings": {"base": base}, "models": {
        f"{root}/plain_lambda0_depth2_seed1": kept}})
    return root


def numbers_of(g, n_layer, amount):
    some = lambda: [float(x) for x in amount * (1 + g.random(n_layer + 2))]
    drift = some()
    return {"mean_drift": sum(drift[1:-1]) / n_layer, "drift": drift, "weight_drift": some(),
            "forgetting": some()[0], "half_95": 0.1}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("plot") / "study")


@pytest.fixture(scope="module")
def logs(study):
    return read_study([str(study)])


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """One arm more than share their axes."""
    root = write_study(tmp_path_factory.mktemp("many") / "study", seeds=3, n_arms=FEW + 1)
    return read_study([str(root)])


# ---- numbers ----


def test_the_interval_of_r_is_fishers():
    """The paper's r = +0.94 and +0.75 with n = 10; ends by tanh(atanh(r) -+ 1.96 / sqrt(7))."""
    u = np.array([1, -1] * 5) / math.sqrt(10)
    v = np.array([1, 1, -1, -1, 1, 1, -1, -1, 0, 0]) / math.sqrt(8)
    assert abs(u @ v) < 1e-12 and abs(u.sum()) < 1e-12 and abs(v.sum()) < 1e-12
    for r, low, high in ((0.94, 0.7604, 0.9861), (0.75, 0.2281, 0.9372), (0.0, -0.6297, 0.6297)):
        found = pearson((3 * u + 1).tolist(), (r * u + math.sqrt(1 - r * r) * v).tolist())
        assert found == pytest.approx((r, low, high), abs=2e-4)


def test_r_has_no_interval_for_three_and_no_value_where_nothing_varies():
    r, low, high = pearson([1, 2, 4], [1, 2, 3])
    assert 0.9 < r < 1 and math.isnan(low) and math.isnan(high)
    assert all(map(math.isnan, pearson([1, 1, 1, 1], [1, 2, 3, 4])))
    assert all(map(math.isnan, pearson([1], [2])))
    assert pearson([1, 2, 3, 4], [2, 4, 6, 8])[0] == pytest.approx(1)


def test_nothing_beats_what_is_on_the_front():
    g = np.random.default_rng(0)
    points = [tuple(map(float, point)) for point in g.integers(0, 9, size=(60, 2))]
    best = pareto(points)
    beats = lambda a, b: a[0] <= b[0] and a[1] >= b[1] and a != b
    assert set(best) == {p for p in points if not any(beats(q, p) for q in points)}
    assert best == sorted(best) and len(best) == len(set(best))


# ---- whose number it is ----


def test_a_run_is_known_by_its_last_two_folders_wherever_it_lies():
    for path in ("out/tiny/plain_seed1", "out/tiny/plain_seed1/", "a/b/tiny/plain_seed1",
                 "out/tiny/plain_seed1/step_0000040"):
        assert run_of(path) == "tiny/plain_seed1"
    assert run_of("GSAI-ML/LLaDA-8B-Base") == "GSAI-ML/LLaDA-8B-Base"


def test_a_folder_is_named_after_its_arm_and_seeds_of_an_arm_are_one_curve(tmp_path):
    names = ("plain_seed1", "plain_seed2", "jepa_lambda1.0_depth2_seed1", "jepa_uniform_seed1",
             "mine")
    for name in names:
        write(tmp_path / name / "log.jsonl", [{"step": 1, "diffusion": 2.0, "jepa": 0.1}])
    figure, _ = draw("training", read_study([str(tmp_path)]))
    assert [text.get_text() for text in figure.legends[0].texts] == [
        "plain, n = 2", "JEPA, n = 1", "JEPA, t ~ U(0, 1), n = 1", "mine, n = 1"]


def test_runs_of_other_folders_are_left_out_and_counted(tmp_path):
    for name in ("one/plain_seed1", "two/plain_seed1", "two/jepa_seed1", "three/plain_seed1"):
        write(tmp_path / name / "log.jsonl", [{"step": 1, "diffusion": 2.0}])
    figure, caption = draw("training", read_study([str(tmp_path)]))
    assert len(figure.legends[0].texts) == 2
    assert "two. 2 runs of other folders are left out." in caption


def test_the_constant_predictor_is_that_of_the_first_arm_with_a_jepa_term(tmp_path):
    for name, floor in (("plain_seed1", None), ("shuffled_seed1", 0.5), ("mine", 0.25)):
        write(tmp_path / name / "log.jsonl", [
            {"step": step, "diffusion": 2.0, "jepa": 0.1} | ({"jepa_floor": floor} if floor else {})
            for step in (1, 2)])
    figure, _ = draw("training", read_study([str(tmp_path)]))
    [line] = [line for ax in figure.axes for line in ax.lines
              if line.get_label() == "constant predictor"]
    assert list(line.get_ydata()) == [0.5, 0.5]


def test_of_many_arms_some_are_drawn(study, logs):
    some = read_study([str(study)], ("plain", "jepa"))
    for frame in (some.log, some.probed, some.results):
        assert set(frame["arm"]) - {"base"} == {"plain", "jepa"}
    assert "base" in set(some.results["arm"])
    assert set(logs.results["arm"]) == {"base", "plain", "jepa", "no_predictor", "rates_0.2_0.5"}
    with pytest.raises(ValueError, match="no arm 'shuffeld' in the inputs, which have"):
        read_study([str(study)], ("plain", "shuffeld"))


def test_the_front_of_a_grid_needs_no_probe(tmp_path):
    lines = [{"config": "a", "arm": arm, "seed": 1, "task": "toy", "split": split, "n_shot": 0,
              "lambda": float(arm == "jepa"), "depth": 2, "init_from": "base", "answers": "x",
              "metrics": {"accuracy": 0.5, "stderr": 0.1, "n": 9},
              "held_out": {"toy": {"1": [9.0, 0.5]},
                           "toy_base": {"0.2": [1.0, loss], "1": [2.0, loss + 1]}}}
             for split in ("validation", "test") for arm, loss in (("plain", 3.0), ("jepa", 2.5))]
    write(tmp_path / "results.jsonl", lines)
    figure, caption = draw("front", read_study([str(tmp_path)]))
    assert "toy test" in caption
    points = {tuple(line.get_xydata()[0]) for line in figure.axes[0].lines
              if line.get_linestyle() == "None"}
    assert points == {(2.0, 50.0), (1.5, 50.0)}


def test_of_several_checkpoints_of_a_run_only_the_last_is_a_run(logs):
    assert len(logs.probed) == 2 * 4 * 4
    last = last_of_each(logs.probed)
    assert len(last) == 4 * 4 and set(last["step"]) == {40}


def test_of_several_pairs_the_figures_have_the_one_that_validation_has_chosen(tmp_path):
    lines = [{"config": "a", "arm": arm, "seed": 1, "task": "toy", "split": split, "n_shot": 0,
              "lambda": weight, "depth": 2 * bool(weight), "init_from": "base", "answers": "x",
              "metrics": {"accuracy": accuracy, "n": 9}}
             for arm, weight, accuracy in (("plain", 0.0, 0.5), ("jepa", 1.0, 0.75),
                                           ("jepa", 2.0, 0.25))
             for split in ("validation", "test")]
    write(tmp_path / "results.jsonl", lines)
    figure, _ = draw("ablation", read_study([str(tmp_path)]))
    assert markers_of(figure.axes[0], ["jepa"]) == {"jepa": 25.0}


def test_an_arm_looks_the_same_in_every_figure_and_like_no_other(logs):
    drawn = list(by_arm(logs.probed)["arm"].unique())
    assert drawn == ["plain", "jepa", "no_predictor", "rates_0.2_0.5"]
    looks = [style_of(arm) for arm in ARMS]
    for keys in (("color", "marker"), ("color", "linestyle")):
        assert len({tuple(look[key] for key in keys) for look in looks}) == len(ARMS)
    assert len({look["color"] for look in looks[:10]}) == 10
    assert style_of("an arm of mine") == style_of("an arm of mine")
    for name in ("training", "drift", "scatter", "front"):              # they share the axes
        few, _ = draw(name, logs)
        handles, labels = few.axes[0].get_legend_handles_labels()
        drawn = {text.split(", n =")[0].split(": n =")[0]: handle
                 for text, handle in zip(labels, handles)}
        for arm in ("plain", "jepa", "no_predictor"):
            handle, style = drawn[ARMS[arm].label], style_of(arm)
            assert (handle.get_color(), handle.get_marker()) == (style["color"], style["marker"])
    for name in ("ablation", "accuracy", "loss", "kept"):               # a row each
        figure, _ = draw(name, logs)
        rows = [text.get_text() for text in figure.axes[0].get_yticklabels()]
        for y, row in enumerate(rows):
            [arm] = [arm for arm in ARMS if row.split(", n =")[0] == ARMS[arm].label]
            own = [line for line in figure.axes[0].lines
                   if line.get_marker() == style_of(arm)["marker"]
                   and list(line.get_ydata()) == [y]]
            assert [line.get_color() for line in own] == [style_of(arm)["color"]]


def markers_of(ax, arms):
    """{arm: the value at its marker} in a panel of dots, whose rows are these arms."""
    return {arm: float(line.get_xdata()[0]) for y, arm in enumerate(arms) for line in ax.lines
            if line.get_marker() == style_of(arm)["marker"] and list(line.get_ydata()) == [y]}


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB
SEEN = {"deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                         [-0.011820, 0.042940, 0.968881]],
        "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                       [-0.003882, -0.048116, 1.051998]],
        "all cones": np.eye(3).tolist()}


@pytest.mark.parametrize("eye", SEEN)
def test_the_first_colours_can_be_told_apart_by_every_eye_and_from_the_ground(eye):
    """Distance in CIE L*a*b*: 2.3 is just seen; markers differ besides."""
    def lab(colour):
        rgb = np.array([int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        linear = np.clip(np.array(SEEN[eye]) @ linear, 0, 1)
        xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722],
                        [0.0193, 0.1192, 0.9505]]) @ linear / np.array([0.9505, 1, 1.089])
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])
    seen = [lab(colour) for colour in COLOURS]
    pairs = [(np.linalg.norm(a - b), COLOURS[i], COLOURS[j]) for i, a in enumerate(seen)
             for j, b in enumerate(seen) if i < j]
    assert min(pairs)[0] > 15, min(pairs)
    assert min(np.linalg.norm(a - lab("#ffffff")) for a in seen) > 35


# ---- figures ----


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_has_the_width_of_one_column_or_two_and_nothing_leaves_it(logs, name, tmp_path):
    check_room(*draw(name, logs), tmp_path)


@pytest.mark.parametrize("name", ["training", "drift", "scatter", "front"])
def test_so_have_those_with_a_panel_an_arm(many, name, tmp_path):
    check_room(*draw(name, many), tmp_path)


def check_room(figure, caption, tmp_path):
    assert caption[0].isupper() and caption.endswith(".") and "\n" not in caption
    for kind in ("png", "svg"):
        save(figure, tmp_path / f"a.{kind}", kind)
    box = figure.get_tightbbox()        # in inches, of all that is drawn, with a blank's breadth
    assert min(box.x0, box.y0) >= -0.05
    width = figure.get_figwidth()
    assert width in (WIDTH, WIDE)
    assert box.x1 <= width + 0.05 and box.y1 <= figure.get_figheight() + 0.05
    png = (tmp_path / "a.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(png[16:20], "big") == 300 * width
    assert xml.etree.ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


def test_the_command_writes_every_figure_and_twice_the_same(study, tmp_path, capsys):
    plot.main(PlotConfig(inputs=(str(study),), out=str(tmp_path / "a")))
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(f"{name}.{kind}" for name in NAMES for kind in ("png", "svg"))
    assert all(path.stat().st_size > 3000 for path in (tmp_path / "a").iterdir())
    assert capsys.readouterr().out.count(".png, .svg: ") == len(NAMES)
    plot.main(PlotConfig(inputs=(str(study),), out=str(tmp_path / "b"), figure="scatter"))
    for path in (tmp_path / "b").iterdir():
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()


def test_a_figure_that_cannot_be_written_leaves_the_one_before(study, tmp_path, monkeypatch):
    cfg = PlotConfig(inputs=(str(study),), out=str(tmp_path), figure="scatter")
    plot.main(cfg)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="scatter.png"):
        plot.main(cfg)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_scatter_draws_each_run_where_the_probe_has_found_it(logs, many):
    """A few arms share the axes; of many each has its own, with all others in grey."""
    last = last_of_each(many.probed)
    def ends(ax):
        return {tuple(point) for line in ax.lines if line.get_marker() != "."
                and line.get_linestyle() == "None" for point in line.get_xydata().tolist()}
    def ends_of(*arms):
        own = last[last["arm"].isin(arms)]
        return set(zip(own["mean_drift"], own["forgetting"]))
    figure, _ = draw("scatter", many)
    for ax, arm in zip(figure.axes, ("plain", "jepa", "no_predictor", "rates_0.2_0.5")):
        assert ends(ax) == ends_of(arm)
        assert set(map(tuple, ax.lines[0].get_xydata().tolist())) == ends_of(*set(last["arm"]))
    figure, _ = draw("scatter", logs)
    last = last_of_each(logs.probed)
    assert ends(figure.axes[0]) == ends_of(*set(last["arm"]))
    plain = last[last["arm"] == "plain"]
    r, low, high = pearson(list(plain["mean_drift"]), list(plain["forgetting"]))
    assert figure.legends[0].texts[0].get_text() == (
        f"plain: n = 4, r = {r:+.2f} [{low:+.2f}, {high:+.2f}]")


def test_dots_of_ablation_are_mean_gains_over_the_plain_run_with_the_same_seed(study, logs):
    figure, _ = draw("ablation", logs)
    lines = [json.loads(line) for line in (study / "results.jsonl").read_text().splitlines()]
    score = {(line["arm"], line["n_shot"], line["seed"]): 100 * line["metrics"]["accuracy"]
             for line in lines if line["split"] == "test"}
    arms = ["jepa", "no_predictor", "rates_0.2_0.5"]
    assert len(figure.axes) == 2
    for ax, n_shot in zip(figure.axes, (0, 4)):
        assert f"{n_shot}-shot\nplain: 32.5 %" in ax.get_title()
        assert markers_of(ax, arms) == pytest.approx(
            {arm: np.mean([score[arm, n_shot, seed] - score["plain", n_shot, seed]
                           for seed in (1, 2, 3, 4)]) for arm in arms})


def test_a_dot_over_another_plain_says_so(tmp_path):
    lines = [{"config": "a", "arm": arm, "seed": 1, "task": "toy", "split": "test", "n_shot": 0,
              "lambda": float("jepa" in arm), "depth": 2, "init_from": "base", "answers": "x",
              "metrics": {"accuracy": accuracy, "n": 9}}
             for arm, accuracy in (("plain", 0.25), ("jepa", 0.5), ("plain_uniform", 0.75),
                                   ("jepa_uniform", 0.625))]
    write(tmp_path / "results.jsonl", lines)
    figure, _ = draw("ablation", read_study([str(tmp_path)]))
    [ax] = figure.axes
    assert [text.get_text() for text in ax.get_yticklabels()] == [
        "JEPA, n = 1", "JEPA, t ~ U(0, 1), n = 1\nover plain, t ~ U(0, 1)"]
    assert markers_of(ax, ["jepa", "jepa_uniform"]) == {"jepa": 25.0, "jepa_uniform": -12.5}


def test_levels_are_beside_their_base_and_kept_is_the_share_of_the_distance_to_it(logs):
    arms = ["plain", "jepa", "no_predictor", "rates_0.2_0.5"]
    figure, _ = draw("accuracy", logs)
    assert markers_of(figure.axes[0], arms) == pytest.approx(
        {arm: 32.5 + 5 * k for k, arm in enumerate(arms)})
    dashed = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in dashed] == [75.0]
    figure, _ = draw("kept", logs)                  # plain loses 42.5 points
    assert markers_of(figure.axes[0], arms[1:]) == pytest.approx(
        {arm: 100 * k * 5 / 42.5 for k, arm in enumerate(arms) if k})
    figure, caption = draw("loss", logs)
    assert len(figure.axes) == 1 and "at t = 1;" in caption
    assert markers_of(figure.axes[0], arms) == pytest.approx(
        {arm: 0.5 + k / 9 for k, arm in enumerate(arms)})


def scores(config, arms, n_shot=0):
    """Lines of results; arms: {arm: accuracy by seed}."""
    return [{"config": config, "arm": arm, "seed": None if arm == "base" else seed, "task": "toy",
             "split": "test", "n_shot": n_shot, "lambda": float(arm == "jepa"), "depth": 2,
             "init_from": "base", "answers": f"{config}/{arm}_seed{seed}/{n_shot}", "metrics": {
                 "accuracy": accuracy, "n": 9}}
            for arm, by_seed in arms.items() for seed, accuracy in enumerate(by_seed)]


def test_shares_are_drawn_where_they_have_two_ends_and_the_others_are_named(tmp_path):
    """A config whose loss is told, with an arm far beyond; and one whose loss is not."""
    write(tmp_path / "results.jsonl", scores("told", {
        "base": [0.9], "plain": [0.5, 0.52, 0.54, 0.5], "jepa": [0.7, 0.7, 0.75, 0.7],
        "consistency": [0.0, 0.0, 0.01, 0.0], "frozen": [0.7, 0.7]}) + scores("not_told", {
            "base": [0.9], "plain": [0.95, 0.7, 0.96, 0.9], "jepa": [0.9, 0.8, 0.9, 0.9]}))
    study = read_study([str(tmp_path)])
    study.results["accuracy"] = study.results["accuracy"].where(
        study.results["arm"] != "consistency", -50.0)       # no accuracy falls so far
    figure, caption = draw("kept", study)
    assert [ax.get_title() for ax in figure.axes] == ["told, 0-shot"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["JEPA"]
    assert "Left out" in caption and caption.endswith(
        "frozen target (told, 0-shot), consistency (told, 0-shot), JEPA (not_told, 0-shot).")
    [value] = markers_of(figure.axes[0], ["jepa"]).values()
    assert figure.axes[0].get_xlim()[0] < value < figure.axes[0].get_xlim()[1]


def test_a_row_says_every_n_of_its_panels_and_panels_of_one_title_stay_two(tmp_path):
    long = "x" * 30
    write(tmp_path / "results.jsonl", scores(long + "1", {
        "plain": [0.5] * 4, "jepa": [0.6, 0.7, 0.6, 0.7]}) + scores(long + "2", {
            "plain": [0.5] * 2, "jepa": [0.5, 0.6]}))
    figure, _ = draw("ablation", read_study([str(tmp_path)]))
    assert len(figure.axes) == 2 and len({ax.get_title() for ax in figure.axes}) == 1
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["JEPA, n = 4 or 2"]


def test_the_loss_is_that_of_the_shots_with_most_seeds(tmp_path):
    lines = scores("a", {"plain": [0.5], "jepa": [0.5]}) + scores("a", {
        "plain": [0.5] * 3, "jepa": [0.5] * 3}, n_shot=4)
    for line in lines:
        line["held_out"] = {"toy": {"1": [4.0, 1.0 + (line["seed"] or 0)]}}
    write(tmp_path / "results.jsonl", lines)
    figure, _ = draw("loss", read_study([str(tmp_path)]))
    assert markers_of(figure.axes[0], ["plain", "jepa"]) == {"plain": 2.0, "jepa": 2.0}


def test_names_of_runs_tell_configs_and_pairs_apart_where_there_are_several():
    one = ["out/base", "g/hot/plain_seed1", "g/hot/jepa_lambda1.0_depth2_seed1"]
    assert list(brief_names(one, 17).values()) == ["out/base", "plain 1", "jepa 1"]
    configs = [*one, "g/a_config_of_a_long_name/plain_seed1", "w" * 20 + "/end"]
    assert list(brief_names(configs, 17).values()) == [
        "out/base", "hot plain 1", "hot jepa 1", "a_config_of_a_long_name plain 1",
        "w" * 13 + "/end"]
    pairs = [*one, "g/hot/jepa_lambda0.5_depth2_seed1"]
    names = brief_names(pairs, 17)
    assert names[one[1]] == "plain 1" and names[pairs[3]] == "jepa_lambda0.5_depth2 1"
    assert len(set(names.values())) == 4


def test_panels_are_in_the_order_of_their_learning_rates(tmp_path):
    for config, lr in (("hot", 0.006), ("cold", 0.0005), ("warm", 0.002)):
        for arm in ("plain", "jepa"):
            write(tmp_path / config / f"{arm}_seed1" / "log.jsonl", [{"step": 1}])
            write(tmp_path / config / f"{arm}_seed1" / "settings.json", {"lr": lr})
    write(tmp_path / "results.jsonl", [
        {"config": config, "arm": arm, "seed": 1, "task": "toy", "split": "test", "n_shot": 0,
         "lambda": float(arm == "jepa"), "depth": 2, "init_from": "base",
         "answers": f"{config}/{arm}_seed1/x", "metrics": {"accuracy": 0.5, "n": 9}}
        for config in ("hot", "cold", "warm") for arm in ("plain", "jepa")])
    figure, _ = draw("ablation", read_study([str(tmp_path)]))
    assert [ax.get_title().split("\n")[:2] for ax in figure.axes] == [
        ["cold, 0-shot", "lr 0.0005"], ["warm, 0-shot", "lr 0.002"], ["hot, 0-shot", "lr 0.006"]]


@pytest.mark.parametrize("noise", [0.0, 20.0])
def test_colours_of_sensitivity_span_the_noise_of_a_cell(noise, tmp_path):
    """Cells 10 points apart with seeds that agree, or that do not."""
    lines = [{"config": "a", "arm": "jepa", "seed": seed, "task": "toy", "split": "validation",
              "n_shot": 0, "lambda": weight, "depth": depth, "init_from": "base",
              "answers": f"{weight}_{depth}_{seed}/x", "metrics": {"n": 9, "accuracy": (
                  50 + 10 * weight * (depth == 2)
                  + (seed + 1) * 3 + noise * (-1) ** (seed + depth + int(weight))) / 100}}
             for weight in (0.0, 1.0) for depth in (1, 2) for seed in (0, 1, 2)]
    write(tmp_path / "results.jsonl", lines)
    figure, caption = draw("sensitivity", read_study([str(tmp_path)]))
    [image] = figure.axes[0].images
    shown = image.get_array().max() - image.get_array().min()
    low, high = image.get_clim()
    if noise:
        assert high - low > 2 * shown
    assert high - low >= shown and "span at least the 95 % interval" in caption
    [star] = [line for line in figure.axes[0].lines if line.get_marker() == "*"]
    best = np.unravel_index(image.get_array().argmax(), image.get_array().shape)
    assert (round(star.get_ydata()[0]), round(star.get_xdata()[0])) == best


def test_arms_side_by_side_stay_at_their_block(logs, many):
    """Within 0.3 of a block on either side, and many arms have a row each, at the block."""
    for study, most in ((logs, 0.3), (many, 0)):
        figure, _ = draw("drift", study)
        points = np.concatenate([line.get_xdata() for line in figure.axes[0].lines])
        values = np.concatenate([line.get_ydata() for line in figure.axes[0].lines])
        x = points[np.isfinite(values)]                     # no value in the gap before norm
        assert 0 < np.abs(x - np.round(x)).max() <= most if most else (x == np.round(x)).all()
        assert len(figure.axes) == (2 if most else 2 * (FEW + 1))


def test_a_model_of_many_blocks_has_ticks_that_do_not_overlap(tmp_path):
    logs = read_study([str(write_study(tmp_path / "deep", seeds=2, n_layer=32))])
    figure, _ = draw("drift", logs)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[-1].get_xticklabels()]
    assert len(boxes) > 5 and all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:]))


@pytest.mark.parametrize("n", [0, 5])                       # every name, five at a time
def test_no_name_breaks_a_figure(n, tmp_path):
    logs = read_study([str(write_study(tmp_path / "study", 3, *HOSTILE[n:n + 5]))])
    for name in FIGURES:
        figure, caption = draw(name, logs)
        save(figure, tmp_path / "a.svg", "svg")
        root = xml.etree.ElementTree.parse(tmp_path / "a.svg").getroot()
        assert not any(element.tag.endswith("script") for element in root.iter())


def test_a_name_is_cut_to_its_room_and_says_so():
    assert short("abc") == "abc" and short("a" * 30) == "a" * 23 + "\u2026"
    assert short("_abc") == " _abc" and "\n" not in short("a\nb") and "\x1b" not in short("\x1b[2J")


# ---- what is missing or broken ----


def test_what_a_figure_lacks_is_one_sentence_and_the_others_are_drawn(study, tmp_path, capsys):
    cfg = PlotConfig(inputs=(f"{study}/plain_seed1/log.jsonl",), out=str(tmp_path / "out"))
    plot.main(cfg)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(NAMES) and sum("it takes" in line for line in lines) == len(NAMES) - 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["training.png",
                                                                           "training.svg"]
    for name in set(NAMES) - {"training"}:
        cfg.figure = name
        with pytest.raises(ValueError, match="it takes") as error:
            plot.main(cfg)
        assert len(str(error.value).splitlines()) == 1


def test_one_seed_is_enough_for_every_figure_but_that_of_shares(tmp_path):
    logs = read_study([str(write_study(tmp_path / "one", seeds=1))])
    for name in set(FIGURES) - {"kept"}:
        draw(name, logs)
    with pytest.raises(ValueError, match="of three seeds or more"):
        draw("kept", logs)


def test_a_line_that_is_still_being_written_is_left_out_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"step": 1')
    assert list(read_study([str(path)]).log["step"]) == [0]
    for broken in ('{"step"\n{}\n', "[1]\n", "\xff\n", "{}\n"):
        path.write_bytes(broken.encode("latin-1"))
        with pytest.raises(ValueError, match="log.jsonl") as error:
            read_study([str(path)])
        assert len(str(error.value).splitlines()) == 1


def test_mistakes_in_the_inputs_are_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_study(["nowhere"])
    for inputs in ([], [str(tmp_path)]):
        with pytest.raises(ValueError, match="no logs"):
            read_study(inputs)


def test_without_matplotlib_it_says_how_to_get_it(study, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OSError, match="requirements-plots.txt"):
        plot.main(PlotConfig(inputs=(str(study),), out=str(tmp_path / "out")))


# ---- the whole path ----


@pytest.mark.slow
def test_every_figure_of_real_runs_is_written(tmp_path, data_dir):
    """A base, three arms with three seeds, their probe and scores: no loss is made up."""
    def call(*command):
        done = script(*command)
        assert done.returncode == 0, done.stderr
    small = ["--device=cpu", "--eval_rows=8", "--eval_every=2", "--log_every=1", "--batch_size=4"]
    call("train.py", "config/tiny_base.py", f"--out_dir={tmp_path}/base", "--max_steps=3", *small)
    models, results = [], []
    for seed in (1, 2, 3):
        for arm, weight, t_tgt in (("plain", 0, 0.7), ("jepa", 1, 0.7), ("rates_0.2_0.5", 1, 0.5)):
            out = f"{tmp_path}/{arm}_seed{seed}"
            call("train.py", "config/tiny_tune.py", f"--init_from={tmp_path}/base",
                 "--task=gsm8k", f"--data_dir={data_dir}", f"--seed={seed}",
                 f"--lambda_jepa={weight}", f"--t_tgt={t_tgt}", f"--out_dir={out}", "--max_steps=4",
                 *small)
            models.append(out)
            more = [(0.5, "validation")] * (arm == "jepa")      # scores alone are made up
            results += [{"config": "tiny_tune", "arm": arm, "lambda": lamb, "depth": 2,
                         "init_from": f"{tmp_path}/base", "seed": seed, "task": "gsm8k",
                         "split": split, "n_shot": 0, "t_ctx": 0.2, "t_tgt": t_tgt,
                         "answers": f"{arm}_seed{seed}" + "_other" * (lamb == 0.5) + "/none.jsonl",
                         "held_out": {"gsm8k": {"1": [4.0, 3.0 + seed]}},
                         "metrics": {"accuracy": 0.1 * lamb + 0.01 * seed, "n": 8}}
                        for lamb, split in [(weight, "validation"), (weight, "test"), *more]]
    results.append(results[1] | {"arm": "base", "lambda": 0, "seed": None, "answers": "base/x",
                                 "metrics": {"accuracy": 0.5, "n": 8}})
    call("analysis/probe.py", f"--base={tmp_path}/base", f"--models={','.join(models)}",
         "--text=toy_base", "--n_rows=8", f"--out_dir={tmp_path}", "--device=cpu")
    write(tmp_path / "results.jsonl", results)
    call("analysis/plot.py", f"--inputs={tmp_path}", f"--out={tmp_path}/figures")
    for name in NAMES:
        for kind in ("png", "svg"):
            assert (tmp_path / "figures" / f"{name}.{kind}").stat().st_size > 3000, name


@pytest.mark.parametrize("name", ["", "file", "broken"])
def test_a_file_in_place_of_the_folder_of_figures_is_told(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("broken").symlink_to("gone")
    write_study(tmp_path / "study")
    with pytest.raises(OSError, match=f"^out='{name}' is not a folder; name a new one"):
        plot.main(PlotConfig(inputs=("study",), out=name))
