"""Laws of the diagnostics: on made-up embeddings they say what was made; in any split."""
import json
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from helpers import (IDS, ROOT, as_batch, eight_rows, loss_lines, make_model, run_ranks, seeded,
                     step)
from jepa import DLLMJEPA, cosine_distance
from model import row_generators
from train import main
from training import diagnostics
from training.diagnostics import (bucket_numbers, collapsed, constant_floor, cosines,
                                  effective_rank, embedding_numbers, movement_numbers, off_diagonal,
                                  same_rate_number, sample)
from training.log import Log
from training.ranks import gather_batch, scatter_batch

def seen_of(mean, z_hat, z_tgt):
    return {"mean": mean, "z_hat": z_hat, "z_tgt": z_tgt}


def random_z(B, C, seed=0):
    return F.layer_norm(torch.randn(B, C, generator=seeded(seed)), (C,))


def test_constant_floor_is_the_loss_of_the_best_constant_prediction():
    z_tgt = torch.randn(16, 8, generator=seeded()) + 0.7        # with a common direction
    z_tgt = z_tgt * torch.linspace(0.1, 3, 16)[:, None]         # of unequal lengths
    guess = torch.randn(8, generator=seeded(1), requires_grad=True)
    optimizer = torch.optim.Adam([guess], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss = cosine_distance(guess.expand(16, 8), z_tgt)
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(constant_floor(z_tgt), loss.detach(), atol=1e-4, rtol=0)
    torch.testing.assert_close(constant_floor(z_tgt[:1]), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_effective_rank_counts_equal_directions_and_weighs_unequal_ones():
    C = 16
    for n in (1, 2, 5):                     # +-e_1 .. +-e_n: centred, n equal singular values
        z = torch.cat([torch.eye(C)[:n], -torch.eye(C)[:n]])
        assert effective_rank(z + 3).item() == pytest.approx(n, rel=1e-5)
    z = torch.diag(torch.tensor([3.0, 1.0]))
    z = torch.cat([z, -z])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(z).item() == pytest.approx(math.exp(entropy), rel=1e-5)
    z = random_z(20, 64)
    torch.testing.assert_close(effective_rank(z), effective_rank(7 * z))
    assert 15 < effective_rank(z) <= 19
    assert effective_rank(z[:1].expand(5, -1)) == 0 and effective_rank(torch.zeros(4, 8)) == 0
    assert effective_rank(z[:1]) == 0
    assert effective_rank(z * torch.nan).isnan()


def test_diversity_is_0_for_equal_rows_1_for_orthogonal_and_a_mean_over_pairs():
    z = random_z(6, 16)
    pairs = [1 - F.cosine_similarity(z[i], z[j], dim=0) for i in range(6) for j in range(i)]
    torch.testing.assert_close(1 - off_diagonal(cosines(z, z)), sum(pairs) / 15)
    same = z[:1].expand(4, -1)
    assert 1 - off_diagonal(cosines(same, same)) == pytest.approx(0, abs=1e-6)
    assert 1 - off_diagonal(cosines(torch.eye(4), torch.eye(4))) == pytest.approx(1)
    assert off_diagonal(torch.eye(1)) == 1  # a row alone


def test_skill_is_1_for_a_perfect_prediction_0_for_the_best_constant_and_retrieval_is_chance():
    z = random_z(32, 16) + 0.5
    perfect = embedding_numbers([seen_of(z, z, z)])
    assert perfect["skill"] == pytest.approx(1) and perfect["retrieval"] == 1
    best = F.normalize(z, dim=-1).mean(dim=0).expand(32, -1)
    constant = embedding_numbers([seen_of(z, best, z)])
    assert constant["skill"] == pytest.approx(0, abs=1e-6)
    assert constant["retrieval"] == pytest.approx(1 / 32)
    shifted = embedding_numbers([seen_of(z, z.roll(1, dims=0), z)])
    assert shifted["retrieval"] == 0 and shifted["skill"] < 0.1
    assert shifted["jepa_floor"] == pytest.approx(constant_floor(z).item(), rel=1e-5)


def test_std_is_taken_before_and_behind_the_layer_norm_and_the_views_are_correlated():
    mean = 3 * torch.randn(200, 16, generator=seeded()) + 1
    z_tgt = F.layer_norm(mean + torch.randn(200, 16, generator=seeded(1)), (16,))
    numbers = embedding_numbers([seen_of(mean, z_tgt, z_tgt)])
    std = mean.std(dim=0, correction=0).mean().item()
    assert numbers["std_mean"].item() == pytest.approx(std, rel=1e-5)
    z = F.layer_norm(mean, (16,))
    std = z.std(dim=0, correction=0).mean().item()
    assert numbers["std_z"].item() == pytest.approx(std, rel=1e-5)
    own = [torch.corrcoef(torch.stack([z[i], z_tgt[i]]))[0, 1] for i in range(200)]
    assert numbers["corr_views"] == pytest.approx(sum(own).item() / 200, rel=1e-3)
    assert abs(numbers["corr_others"]) < 0.05 and numbers["corr_views"] > 0.8


def test_the_numbers_are_of_the_whole_batch_in_its_order_however_it_is_split():
    z, hat, tgt = (random_z(12, 16, seed) for seed in range(3))
    whole = embedding_numbers([seen_of(z, hat, tgt)])
    parts = [seen_of(z[i::4], hat[i::4], tgt[i::4]) for i in range(4)]      # as batch_at deals
    assert torch.equal(gather_batch([z[i::4] for i in range(4)]), z)
    assert all(torch.equal(a, z[i::4]) for i, a in enumerate(scatter_batch(z, 4)))
    for name, value in embedding_numbers(parts).items():
        torch.testing.assert_close(value, whole[name], msg=name)


def test_plain_diffusion_has_the_loss_by_t_alone():
    objective = DLLMJEPA(make_model(), lambda_jepa=0.0)
    step(objective, as_batch(eight_rows()))
    assert embedding_numbers([objective.trace]) == {}
    assert bucket_numbers([objective.trace]).keys() == {"nll_t0.25"}         # t_ctx = 0.2


def test_the_loss_by_t_is_that_of_the_rows_of_a_bucket():
    objective = DLLMJEPA(make_model(), diffusion_t="uniform")
    batch = as_batch(eight_rows())
    step(objective, batch)
    t, is_masked, nll = (objective.trace[name] for name in ("t", "is_masked", "nll"))
    numbers = bucket_numbers([objective.trace])
    assert len(numbers) > 2
    rows = is_masked.nonzero()[:, 0]
    for a, b in ((0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)):
        inside = (t[rows] > a) & (t[rows] <= b)
        if inside.any():
            assert numbers.pop(f"nll_t{b:g}") == pytest.approx(nll[inside].mean().item(), rel=1e-5)
    assert not numbers
    parts = [{"t": t[i:i + 4], "is_masked": is_masked[i:i + 4],
              "nll": nll[(rows >= i) & (rows < i + 4)]} for i in (0, 4)]
    assert bucket_numbers(parts) == pytest.approx(bucket_numbers([objective.trace]))


def test_the_same_rate_pair_is_two_masks_of_a_row_and_changes_nothing():
    objective = DLLMJEPA(make_model())
    batch = (*as_batch(eight_rows()), row_generators(0, 0, IDS))
    before = [g.get_state() for g in batch[3]]
    [number] = same_rate_number(objective, batch).values()
    assert 0.3 < number < 0.9999                # of a row with itself it would be 1
    assert all(torch.equal(a, g.get_state()) for a, g in zip(before, batch[3]))
    assert same_rate_number(objective, batch)["corr_same_rate"] == number
    assert same_rate_number(DLLMJEPA(make_model(), 0.0), batch) == {}


def test_movement_is_told_exactly_for_small_weights_and_within_a_few_percent_by_a_sample(
        monkeypatch):
    for most, tolerance in ((1 << 14, 1e-4), (300, 0.1)):
        monkeypatch.setattr(diagnostics, "SAMPLE", most)
        objective = DLLMJEPA(make_model())
        began = [{name: sample(p) for name, p in module.named_parameters()}
                 for module in (objective.model, objective.predictor)]
        before = [[p.detach().clone() for p in module.parameters()]
                  for module in (objective.model, objective.target, objective.predictor)]
        numbers = movement_numbers(objective, *began)
        assert numbers["online_moved"] == numbers["ema_moved"] == numbers["pred_moved"] == 0
        for i, module in enumerate((objective.model, objective.target, objective.predictor)):
            for p in module.parameters():
                p.data += 0.01 * (i + 1) * torch.randn(p.shape, generator=seeded(p.numel() + i))
        numbers = movement_numbers(objective, *began)

        def norm(params, start=None):
            start = start or [0.0 for _ in params]
            return torch.cat([(p - q).flatten() for p, q in zip(params, start)]).norm().item()
        now = [[p.detach() for p in module.parameters()]
               for module in (objective.model, objective.target, objective.predictor)]
        expected = {"online_moved": norm(now[0], before[0]) / norm(before[0]),
                    "pred_norm": norm(now[2]) / norm(before[2]),
                    "pred_moved": norm(now[2], before[2]) / norm(before[2]),
                    "ema_moved": norm(now[1], before[1])
                    / norm(now[0][:-1], before[0][:-1])}        # the target has no head
        assert numbers.keys() == expected.keys()
        for name, value in expected.items():
            assert numbers[name] == pytest.approx(value, rel=tolerance), name


def test_a_sample_takes_no_column_for_the_whole():
    p = torch.arange(64).repeat(4096, 1)        # each column has its number
    assert sample(p)[0].unique().numel() == 64


def test_a_collapse_in_the_last_quarter_is_named_once_below_half_of_the_first_line(cfg, capsys,
                                                                                  monkeypatch):
    first = {"rank": 10.0, "diversity": 0.4}
    assert collapsed(first, first) == "" == collapsed({"rank": 5.1, "diversity": 0.21}, first)
    assert "rank 4.9 of 10" in collapsed({"rank": 4.9, "diversity": 0.4}, first)
    assert "diversity 0.1 of 0.4" in collapsed({"rank": 10, "diversity": 0.1}, first)
    assert collapsed({"rank": None, "diversity": None}, first) == ""    # JSON's nan
    base = cfg.out_dir + "_base"
    main(replace(cfg, max_steps=1, out_dir=base))
    cfg = replace(cfg, init_from=base, tokenizer="")
    made_up = iter([9.0, 3.0, 2.0, 1.0, 9.0, 1.0])
    monkeypatch.setattr("training.study.embedding_numbers", lambda seen: {
        "rank": torch.tensor(next(made_up)), "diversity": torch.tensor(1.0)})
    main(replace(cfg, max_steps=4, save_every=2, keep=9))
    said = [line for line in capsys.readouterr().out.splitlines()
            if "embeddings collapse" in line]
    assert len(said) == 1 and said[0].startswith("step 3:") and "rank 2 of 9" in said[0]
    main(replace(cfg, max_steps=6, resume=True))        # the first line is still the measure
    found = capsys.readouterr().out
    assert "step 6:" in found and "rank 1 of 9" in found and "step 5:" not in found


def test_in_the_tiny_study_five_of_45_runs_collapse_and_only_they_are_named():
    """Early in training 41 fall below half of their first line, and 36 of those come back."""
    early, late = set(), set()
    for path in (ROOT / "results/tiny_study").glob("*/log.jsonl"):
        found = [line for line in map(json.loads, path.read_text().splitlines()) if "rank" in line]
        for line in found:
            if collapsed(line, found[0]):
                early.add(path.parent.name)
                if line["step"] >= 0.75 * found[-1]["step"]:
                    late.add(path.parent.name)
    assert len(early) == 41 and len(late) == 5
    assert all(name.startswith("shuffled_no_predictor") for name in late)


def test_the_first_line_is_of_the_base_and_the_rest_come_every_log_every_steps(cfg):
    main(replace(cfg, max_steps=9, log_every=4, save_every=100))
    found = loss_lines(cfg.out_dir)
    assert [line["step"] for line in found] == [1, 4, 8, 9]
    for line in found:
        assert line["skill"] == pytest.approx(1 - line["jepa"] / line["jepa_floor"], rel=1e-3)
        assert 0 < line["rank"] <= 7 and 0 <= line["retrieval"] <= 1
    assert found[0]["ema_moved"] == pytest.approx(1 - cfg.ema_decay, rel=0.01)
    assert found[0]["online_moved"] < found[-1]["online_moved"]


def test_no_diagnostic_is_computed_between_two_lines(cfg, monkeypatch):
    calls = []
    for name in ("embedding_numbers", "bucket_numbers", "movement_numbers", "same_rate_number"):
        real = getattr(diagnostics, name)
        monkeypatch.setattr(f"training.study.{name}",
                            lambda *a, real=real, name=name: calls.append(name) or real(*a))
    main(replace(cfg, max_steps=7, log_every=5, save_every=100))
    assert len(calls) == 4 * 3                  # steps 1, 5 and 7


def test_plain_diffusion_is_told_without_a_word_on_embeddings(cfg):
    main(replace(cfg, lambda_jepa=0.0))
    for line in loss_lines(cfg.out_dir):
        assert {"nll_t0.25", "online_moved"} <= line.keys()
        assert not {"rank", "skill", "ema_moved", "pred_norm", "corr_views"} & line.keys()


@pytest.mark.slow
def test_two_processes_tell_the_numbers_of_one(cfg, tmp_path):
    cfg = replace(cfg, max_steps=2, diffusion_t="uniform")
    main(cfg)
    for shard in (False, True):
        two = replace(cfg, shard=shard, out_dir=str(tmp_path / f"two{shard}"))
        run_ranks(two)
        one, other = (loss_lines(c.out_dir) for c in (cfg, two))
        for name in one[0].keys() - {"ms", "seconds", "corr_same_rate"}:
            sampled = name in ("online_moved", "ema_moved", "pred_norm", "pred_moved")
            rel = 0.05 if sampled else 1e-3
            assert one[0][name] == pytest.approx(other[0][name], rel=rel, abs=1e-5), name
        assert all(a.keys() == b.keys() for a, b in zip(one, other))


def test_a_line_has_the_time_of_a_step_since_the_line_before(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("training.log.time.perf_counter", lambda: clock[0])
    settings = {"log_every": 2, "save_every": 99, "track": "none"}
    log = Log(str(tmp_path), settings, 0, 5, warns=False)
    for step, seconds in enumerate((1.0, 3.0, 5.0, 9.0, 2.0), 1):
        began = clock[0]
        clock[0] += seconds
        log.step(step, {"loss": torch.tensor(1.0)}, began)
        clock[0] += 50                                  # a checkpoint: no time of a step
    log.close()
    found = [(line["step"], line["ms"], line["seconds"]) for line in loss_lines(tmp_path)]
    assert found == [(1, 1000, 1), (2, 3000, 54), (4, 7000, 168), (5, 2000, 220)]


def test_the_bar_counts_the_whole_run_and_says_what_is_left_and_tokens_per_second(
        tmp_path, monkeypatch, capfd):
    """Two rows of 5 tokens, of which 3 are padding, in 2 s: 3.5 tokens/s."""
    clock = [100.0]
    monkeypatch.setattr("training.log.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    settings = {"log_every": 1, "save_every": 99, "track": "none"}
    is_real = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    log = Log(str(tmp_path), settings, 4, 10, warns=False)          # resumed after step 4
    for step in (5, 6):
        began = clock[0]
        clock[0] += 2
        log.step(step, {"loss": torch.tensor(1.0)}, began, [(None, None, is_real)])
        clock[0] += 3                                               # a checkpoint
    log.close()
    shown = re.split("[\r\n]", capfd.readouterr().err)
    assert any("4/10 [00:00<?" in line for line in shown)
    assert any("6/10 [00:07<00:14" in line and "tokens/s=4" in line for line in shown)


def test_a_rate_at_the_edge_of_a_bucket_is_in_the_lower_one():
    nll, is_masked = torch.tensor([1.0, 2.0, 4.0]), torch.ones(3, 1, dtype=torch.bool)
    trace = {"t": torch.tensor([0.25, 0.5, 1.0]), "is_masked": is_masked, "nll": nll}
    assert bucket_numbers([trace]) == {"nll_t0.25": 1.0, "nll_t0.5": 2.0, "nll_t1": 4.0}


def test_a_sample_weighs_each_parameter_by_its_size(monkeypatch):
    """A large matrix that has moved counts by all its entries, not by the few that are taken."""
    monkeypatch.setattr(diagnostics, "SAMPLE", 64)
    objective = DLLMJEPA(make_model(), 0.0)
    before = {name: sample(p) for name, p in objective.model.named_parameters()}
    start = {name: p.detach().clone() for name, p in objective.model.named_parameters()}
    objective.model.embed.weight.data += 1.0
    moved = torch.cat([(p - start[name]).flatten()
                       for name, p in objective.model.named_parameters()]).norm()
    whole = torch.cat([p.flatten() for p in start.values()]).norm()
    numbers = movement_numbers(objective, before, {})
    assert numbers["online_moved"].item() == pytest.approx((moved / whole).item(), rel=0.1)
