"""Laws of what is read: every number is one, a file names its line, unlike runs never merge."""
import copy
import json
import math
import random
from pathlib import Path

import pytest

from analysis.checks import check_alike, check_number, options_of
from analysis.frames import by_arm, read_results, read_study, read_summaries
from analysis.tables import render

ROOT = Path(__file__).resolve().parent.parent
STUDY = ROOT / "results" / "tiny_study"
BAD = (None, True, -1, 5, 1.5, math.nan, math.inf, 10 ** 400, 2 ** 63, "x", "", [], [1], {},
       {"a": 1}, [[[]]], 1e301)


def write(path, *objects):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in objects))
    return path


def result(arm="plain", seed=1, **more):
    return {"config": "a", "arm": arm, "lambda": float(arm == "jepa"), "depth": 2, "seed": seed,
            "split": "test", "n_shot": 0, "task": "toy", "init_from": "base", "t_ctx": 0.2,
            "t_tgt": 0.7, "metrics": {"accuracy": 0.5, "n": 9}, "answers": f"{arm}_{seed}/x.jsonl",
            "train": f"python train.py a.py --lr=1 --seed={seed} --out_dir=o/{arm}_{seed}",
            "command": f"python eval_gsm8k.py --init_from=o/{arm}_{seed} --limit=9",
            "held_out": {"toy": {"0.2": [9.0, 1.0], "1": [9.0, 2.0]}}, **more}


LOG = {"step": 1, "loss": 2.0, "diffusion": 2.0, "jepa": 0.1, "jepa_floor": 0.2}
HELD_OUT = {"step": 0, "held_out": {"toy": {"0.5": 9.0}}}
NUMBERS = {"drift": [1.0] * 3, "weight_drift": [1.0] * 3, "mean_drift": 1.0, "forgetting": 0.5,
           "trained": {"step": 4}}
PROBE = {"settings": {"base": "b", "text": "toy", "rates": [0.5]}, "n": 4, "tokens": 9,
         "depths": ["embed", "1", "norm"], "models": {"o/a/plain_seed1": NUMBERS}}
SUMMARY = {"settings": {"base": "b"}, "models": {
    "m": {"wikitext": {"minus_base": 0.5}, "mmlu": {"accuracy": 0.5}}}}


def places(what, path=()):
    """Yield the path of each value in a nested object."""
    for key, value in what.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def with_value(what, path, value):
    what = copy.deepcopy(what)
    inside = what
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return what


def read_all(folder):
    study = read_study([str(folder)])
    return render(read_results(sorted(folder.glob("results.jsonl")) or []), study.summaries)


# ---- one file ----


@pytest.mark.parametrize("name, good", [
    ("results.jsonl", result()), ("log.jsonl", LOG), ("log.jsonl", HELD_OUT),
    ("probe.json", PROBE), ("summary.json", SUMMARY)])
def test_a_value_of_any_kind_is_a_table_or_a_sentence_with_the_file(name, good, tmp_path):
    n_refused, drawn = 0, random.Random(0)
    for path in places(good):
        for value in drawn.sample(BAD, 5):
            write(tmp_path / name, with_value(good, path, value))
            try:
                read_all(tmp_path)
            except ValueError as error:
                assert name in str(error) and len(str(error).splitlines()) == 1, (path, value)
                n_refused += 1
    assert n_refused > 5


@pytest.mark.parametrize("accuracy", [5, -0.1, math.nan, math.inf, "0.5", [0.5], None, True])
def test_an_accuracy_that_is_no_share_is_told_with_its_line(accuracy, tmp_path):
    path = write(tmp_path / "results.jsonl", result(),
                 result(seed=2, metrics={"accuracy": accuracy, "n": 9}))
    for read in (lambda: read_results([path]), lambda: read_study([str(tmp_path)])):
        with pytest.raises(ValueError, match=r"results\.jsonl, line 2, .* accuracy="):
            read()


@pytest.mark.parametrize("line", [
    b"\xff\xfe", b"[1]", b"nothing", b"[" * 100_000, b'{"step": 1' + b"0" * 5000 + b"}",
    b'{"step": "\\ud800"}', b"{}", b"\0"], ids=lambda line: repr(line[:12]))
@pytest.mark.parametrize("name", ["log.jsonl", "results.jsonl"])
def test_a_broken_line_is_told_with_file_and_line(name, line, tmp_path):
    good = json.dumps(result() if name == "results.jsonl" else LOG).encode()
    (tmp_path / name).write_bytes(good + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=rf"{name}, line 2,"):
        read_study([str(tmp_path)])


@pytest.mark.parametrize("rest", [b"\0" * 50, b"garbage", b"[1"])
def test_an_unended_line_is_left_out_only_if_it_may_have_been_cut_short(rest, tmp_path):
    path = write(tmp_path / "results.jsonl", result())
    whole = path.read_bytes()
    for n in range(1, len(whole) - 1, 37):
        path.write_bytes(whole + whole[:n])
        assert len(read_results([path])) == 1
    path.write_bytes(whole + rest)
    with pytest.raises(ValueError, match="results.jsonl"):
        read_results([path])


@pytest.mark.parametrize("name", ["probe.json", "summary.json", "settings.json"])
@pytest.mark.parametrize("text", ["", "[]", '""', "null", "[[1, 2]]", "{", "[" * 100_000, "\0"],
                         ids=lambda text: repr(text[:9]))
def test_what_is_no_object_is_told_with_its_file(name, text, tmp_path):
    write(tmp_path / "a" / "plain_seed1" / "log.jsonl", LOG)
    (tmp_path / "a" / "plain_seed1" / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        read_study([str(tmp_path)])


def test_a_folder_in_the_place_of_a_file_and_an_empty_name_are_told(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "log.jsonl").mkdir()
    (tmp_path / "b" / "log.jsonl").symlink_to("log.jsonl")      # a loop
    for folder in "ab":
        with pytest.raises(OSError, match="log.jsonl"):
            read_study([str(tmp_path / folder)])
    with pytest.raises(ValueError, match="empty name"):
        read_study([""])


# ---- runs that are merged ----


SETTINGS = {"lr": 1.0, "seed": 1, "diffusion_t": "context", "masks": "independent", "pool_layer": 0,
            "pool": "visible", "pred_lr": 1.0, "ema_dtype": "float32", "eval_t": [0.5],
            "init_from": "out/base_seed1", "out_dir": "x", "device": "cpu", "commit": "a"}


def two_runs(folder, first="plain_seed1", second="plain_seed2", **other):
    for name, settings in ((first, {}), (second, {"seed": 2, "out_dir": "y", "commit": "b",
                                                 "init_from": "out/base_seed2", **other})):
        write(folder / "a" / name / "log.jsonl", LOG)
        write(folder / "a" / name / "settings.json", SETTINGS | settings)


def test_runs_that_differ_in_their_seed_are_one_arm(tmp_path):
    two_runs(tmp_path, device="cuda", resumed=[], torch="2.13")
    assert set(read_study([str(tmp_path)]).log["arm"]) == {"plain"}


@pytest.mark.parametrize("name, value", [
    ("lr", 2.0), ("diffusion_t", "uniform"), ("masks", "nested"), ("pool", "all"),
    ("pool_layer", 1), ("pred_lr", 0.0), ("ema_dtype", "bfloat16"), ("eval_t", [0.2]),
    ("init_from", "out/other_seed2")])
def test_runs_of_one_name_with_other_settings_are_refused_by_the_setting(name, value, tmp_path):
    two_runs(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=f"runs of 'plain' in 'a' are not alike: {name}=") as error:
        read_study([str(tmp_path)])
    assert "plain_seed1/settings.json" in str(error.value) and "plain_seed2" in str(error.value)


def test_runs_of_a_probe_are_compared_like_those_of_logs(tmp_path):
    models = {f"o/a/plain_seed{seed}": {**NUMBERS, "trained": {"step": 4, "lr": lr}}
              for seed, lr in ((1, 1.0), (2, 2.0))}
    write(tmp_path / "probe.json", PROBE | {"models": models})
    with pytest.raises(ValueError, match="lr=1.0 in .*probe.json, lr=2.0"):
        read_study([str(tmp_path)])


def test_pairs_of_lambda_and_depth_are_arms_of_their_own_unless_one_was_chosen(tmp_path):
    names = [f"jepa_lambda{weight}_depth2_seed{seed}" for weight in (0.5, 1.0) for seed in (1, 2)]
    for name in names:
        write(tmp_path / "a" / name / "log.jsonl", LOG)
    assert list(by_arm(read_study([str(tmp_path)]).log)["arm"].unique()) == [
        "jepa_lambda0.5_depth2", "jepa_lambda1.0_depth2"]
    write(tmp_path / "results.jsonl", *(
        result("jepa", seed, **{"lambda": weight, "split": "validation", "answers":
                                f"a/jepa_lambda{weight}_depth2_seed{seed}/x.jsonl",
                                "metrics": {"accuracy": weight / 2, "n": 9}})
        for weight in (0.5, 1.0) for seed in (1, 2)))
    log = read_study([str(tmp_path)]).log
    assert set(log["arm"]) == {"jepa"} and set(log["run"]) == {f"a/{name}" for name in names[2:]}


def test_a_run_is_read_once(tmp_path):
    two_runs(tmp_path / "one")
    two_runs(tmp_path / "two")
    inside = str(tmp_path / "one")
    assert len(read_study([inside, f"{inside}/a", inside + "/a/../a"]).log) == 2
    with pytest.raises(ValueError, match="both the run a/plain_seed1"):
        read_study([str(tmp_path)])
    for name in ("x", "y"):
        write(tmp_path / "probes" / name / "probe.json", PROBE)
    with pytest.raises(ValueError, match="step 4 of the run a/plain_seed1"):
        read_study([str(tmp_path / "probes")])


def test_probes_of_other_texts_are_not_one_figure(tmp_path):
    write(tmp_path / "x" / "probe.json", PROBE)
    write(tmp_path / "y" / "probe.json", PROBE | {"n": 5, "models": {"o/a/plain_seed2": NUMBERS}})
    with pytest.raises(ValueError, match="probes of 'a' are not alike: texts="):
        read_study([str(tmp_path)])


def test_runs_of_two_machines_are_one_arm_wherever_weights_and_rows_lay(tmp_path):
    def made(seed, home):
        return result(seed=seed, init_from=f"{home}/out/base_seed{seed}",
                      train=f"python train.py a.py --lr=1 --data_dir={home}/rows --seed={seed} "
                            f"--init_from={home}/out/base_seed{seed}",
                      command=f"python eval_gsm8k.py --init_from={home}/{seed} "
                              f"--data_dir={home}/rows --limit=9")
    path = write(tmp_path / "results.jsonl", made(1, "/mnt/a"), made(2, "/home/b"), made(3, "."))
    assert len(read_results([path])) == 3
    write(path, made(1, "/mnt/a"), made(2, "/home/b") | {"init_from": "/mnt/a/out/other"})
    with pytest.raises(ValueError, match="init_from='out/base_seed' in .*'out/other' in"):
        read_results([path])
    path.unlink()
    two_runs(tmp_path, init_from="/home/b/out/base_seed2")
    assert set(read_study([str(tmp_path)]).log["arm"]) == {"plain"}


@pytest.mark.parametrize("value", [-1.0, math.nan, "1"])
def test_a_number_that_may_be_zero_is_told_so(value):
    check_number("drift", 0.0, 0)
    with pytest.raises(ValueError, match="is not a number from 0 up"):
        check_number("drift", value, 0)


@pytest.mark.parametrize("more, words", [
    (dict(train="python train.py a.py --lr=2 --seed=2"), "--lr=1 in .*, --lr=2 in"),
    (dict(train="python train.py a.py --lr=1 --pool=all --seed=2"), "nothing in .*, --pool=all in"),
    (dict(t_ctx=0.3), "t_ctx=0.2 in .*, t_ctx=0.3 in"), (dict(task="gsm8k"), "task='toy'"),
    (dict(init_from="other"), "init_from='base'"),
    (dict(command="python eval_gsm8k.py --init_from=o/plain_2 --limit=8"), "--limit=9 in"),
    (dict(arm="jepa", command="python eval_gsm8k.py --gen_length=4"), "scores of 'a'")])
def test_results_that_were_made_in_two_ways_are_refused(more, words, tmp_path):
    path = write(tmp_path / "results.jsonl", result(), result(seed=2))
    assert len(read_results([path])) == 2
    write(path, result(), result(**{"seed": 2, **more}))
    with pytest.raises(ValueError, match=words) as error:
        read_results([path])
    assert "line 1" in str(error.value) and "line 2" in str(error.value)


def test_of_two_summaries_a_model_counts_once_and_has_one_number(tmp_path):
    paths = [write(tmp_path / name / "summary.json", SUMMARY) for name in "xy"]
    assert "+0.5000 (n = 1)" in render([], read_summaries(paths))
    write(paths[1], with_value(SUMMARY, ("models", "m", "mmlu", "accuracy"), 0.25))
    with pytest.raises(ValueError, match="numbers of 'm' are not alike"):
        read_summaries(paths)


def test_options_are_compared_as_they_hold():
    assert options_of("python x.py --a=1 --b --a=2", {"b"}) == {"--a=2"}
    assert options_of("x 'unended --a=1", set()) == {"--a=1"}
    check_alike([("g", {"a": 1}, "x"), ("g", {"b": 2}, "y"), ("h", {"a": 3}, "z")])


def test_no_name_commands_a_terminal_or_breaks_a_table():
    text = render([result("a|b\n\x1b[2J")])
    assert "\x1b" not in text and "a\\|b \\x1b[2J" in text


# ---- the study on file ----


def test_the_results_on_file_are_read_and_are_alike():
    each = [read_results([path]) for path in sorted((ROOT / "results").rglob("results.jsonl"))]
    assert sum(map(len, each)) > 450
    study = read_study([str(STUDY)])
    assert study.log["run"].nunique() >= 60 and len(study.probed) == 55
