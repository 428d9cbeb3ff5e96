"""Laws of CUDA graphs: a block's passes read the same places, and their answers do not change.

No test here has a GPU. `Tape` stands in for a CUDA graph: it records each operator of the captured
function with its tensors, and a replay runs these operators again on the very same tensors. What
the host decided at the recording, it cannot decide anew.
"""
import contextlib
import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
from analysis import gpu_speed
from analysis.gpu_machine import Check
from helpers import answer, seeded, tiny_model
from model import DLLM
from sample import infill
from sampling import graph, reader
from sampling.graph import WARM_UPS, Graph
from sampling.reveal import Sampling

MASK = 39
CPU = torch.device("cpu")
PROMPTS = [[1], [2, 3, 4, 5, 6], [7] * 11, [8, 9]]


class Tape(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph on a CPU."""

    made = []                           # all tapes of a test

    def __init__(self):
        super().__init__()
        self.calls, self.n_replays = [], 0
        Tape.made.append(self)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "the host would wait"
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        self.n_replays += 1
        for function, args, kwargs, out in self.calls:
            for old, new in zip(tensors(out), tensors(function(*args, **kwargs))):
                if old.data_ptr() != new.data_ptr():        # neither a view nor in place
                    old.copy_(new)

    def outside(self) -> set:
        """The places in memory that it reads or writes and that were there before it."""
        made, found = set(), set()
        for _, args, kwargs, out in self.calls:
            found |= {place_of(x) for x in tensors((args, kwargs))} - made
            made |= {place_of(x) for x in tensors(out)} - found
        return found


def tensors(of) -> list:
    return [x for x in tree_leaves(of) if isinstance(x, torch.Tensor) and x.numel()]


def place_of(x) -> int:
    return x.untyped_storage().data_ptr()


class Watched(reader.Reader):
    """A Reader that checks, at every pass, that what a tape needs is still its own."""

    living = weakref.WeakSet()

    def __init__(self, *args):
        super().__init__(*args)
        self.living.add(self)

    def logits(self, x, columns, places):
        found = super().logits(x, columns, places)
        if getattr(self.graph, "inputs", ()):
            layers = getattr(self.layout, "layers", [])
            attend = getattr(self.layout, "padded", self.layout).attend
            kept = tensors([self.graph.inputs, layers, attend, list(self.model.parameters())])
            assert self.graph.graph.outside() <= {place_of(x) for x in kept}
        return found


@pytest.fixture(autouse=True)
def on_tape(monkeypatch):
    """Put the stand-ins in the place of torch.cuda's."""
    @contextlib.contextmanager
    def nothing(*_):
        yield

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass
    monkeypatch.setattr(Tape, "made", [])
    monkeypatch.setattr(graph, "has_graphs", lambda device: True)
    monkeypatch.setattr(sample, "Reader", Watched)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", lambda tape, stream: tape)     # records within `with`
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "device", nothing)
    monkeypatch.setattr(torch.cuda, "stream", nothing)


def both(model, prompts, **more):
    """Answer without graphs and with them -> two answers, two lists of p after every pass."""
    found = []
    for graphs in (False, True):
        ps, generator = [], [seeded(b) for b in range(len(prompts))]
        x = answer(model, prompts, **{**dict(gen_length=12, block_length=4, steps=12), **more},
                   graphs=graphs, generator=generator, on_step=lambda x, p: ps.append(p.clone()))
        found.append((x, torch.stack(ps)))
    (x, ps), (replayed, replayed_ps) = found
    return x, replayed, ps, replayed_ps


# ---- the stand-in ----


def test_a_tape_follows_its_inputs_and_not_what_the_host_decided():
    weight, total = torch.tensor([2.0, 3.0]), torch.zeros(2)

    def function(x):
        total[1] = x.sum()              # in place
        return (x * weight).view(2, 1) + 1
    replayed = Graph(CPU)
    for x in (torch.tensor([1.0, 1.0]), torch.tensor([5.0, -1.0])):
        assert torch.equal(replayed(function, x), (x * weight)[:, None] + 1) and total[1] == x.sum()
    [tape] = Tape.made
    assert tape.n_replays == 2
    assert tape.outside() == {place_of(x) for x in (weight, total, *replayed.inputs)}
    decided, added = Graph(CPU), [1]
    for _ in range(2):
        assert decided(lambda x: x + added[0], torch.ones(2)).tolist() == [2, 2]
        added[0] = 5
    with pytest.raises(AssertionError, match="would wait"):
        Graph(CPU)(lambda x: x if x.sum() > 0 else -x, torch.ones(2))


# ---- the answers ----


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("more", [
    dict(), dict(shift=True, qkv_bias=True), dict(cfg_scale=1.5, window=2), dict(threshold=0.3),
    dict(temperature=1.0, factor=1.0), dict(temperature=1.0, remasking="origin", steps=6),
    dict(shift=True, cfg_scale=0.5)], ids=str)
def test_graphs_change_no_answer(cache, more):
    config = {key: more[key] for key in ("shift", "qkv_bias") if key in more}
    settings = {key: value for key, value in more.items() if key not in config}
    model = tiny_model(peaked=5.0, **config)
    x, replayed, ps, replayed_ps = both(model, PROMPTS, cache=cache, **settings)
    assert torch.equal(x, replayed) and len(set(x.flatten().tolist())) > 3
    assert torch.allclose(ps, replayed_ps, atol=1e-5)
    assert sum(tape.n_replays for tape in Tape.made) >= 3


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_graphs_change_no_answer_when_rows_have_ended(cache):
    n_moved = 0
    for seed in range(4):
        Tape.made.clear()
        x, replayed, *_ = both(tiny_model(seed=seed, peaked=2.0), PROMPTS, temperature=1.0,
                               stop=True, ends=range(4), cache=cache)
        assert torch.equal(x, replayed)
        n_moved += len(Tape.made) > 1           # fewer rows: captured anew
    assert n_moved


def test_graphs_fill_gaps_though_the_last_block_has_fewer():
    texts = [[1, 2, MASK, 4, MASK, MASK, 7, 8, 9, MASK], [MASK, 5, MASK], [3, *[MASK] * 4]]
    filled = [infill(tiny_model(peaked=4.0), texts, Sampling(3, 3, 3, graphs=graphs))
              for graphs in (False, True)]
    assert filled[0] == filled[1] and len(Tape.made) == 1


# ---- what is captured, and how often ----


@pytest.mark.parametrize("more, n_captures", [
    (dict(), 1), (dict(cache="dual"), 1), (dict(cache="dual", shift=True), 1),
    (dict(cache="dual", cfg_scale=1.0), 1), (dict(cache="dual", threshold=0.9), 1),
    (dict(cache="prefix"), 3),                  # computes fewer tokens in each block
    (dict(cache="dual", window=4), 2)], ids=str)        # reads more in the second, all from there
def test_a_graph_serves_all_blocks_that_have_its_shapes(more, n_captures):
    model, passes, encode = tiny_model(shift=more.pop("shift", False)), [], DLLM.encode
    model.encode = lambda *args: passes.append(1) or encode(model, *args)
    answer(model, PROMPTS, 12, 4, 12, graphs=True, **more)
    assert len(Tape.made) == n_captures
    n_whole = 0 if more.get("cache", "none") == "none" else 3   # a block's first pass is no replay
    assert len(passes) == n_whole + n_captures * (WARM_UPS + 1)
    if "threshold" not in more:
        assert sum(tape.n_replays for tape in Tape.made) == 12 - n_whole


def test_keys_values_and_graphs_are_free_as_soon_as_an_answer_is_there():
    gc.collect()
    gc.disable()                        # a circle of references would wait for it
    try:
        answer(tiny_model(), PROMPTS, 12, 4, 12, cache="dual", graphs=True)
        assert not Watched.living
    finally:
        gc.enable()


def test_without_the_setting_nothing_is_captured():
    answer(tiny_model(), PROMPTS, 12, 4, 12, cache="dual")
    assert Tape.made == []


# ---- what is timed ----


def test_the_bench_and_the_check_of_a_gpu_time_graphs_where_there_are_some():
    check = Check(CPU, 1, dry=True)
    found = {figure.what: figure.value for figure in gpu_speed.sampler(check)}
    for way in ("dual", "dual, 2.67 a pass"):
        replayed = way.replace("dual", "dual, graphs")
        [same], [expected] = ([value for what, value in found.items() if what == f"{one}: as exact"]
                              for one in (replayed, way))
        assert same == expected
    assert "dual, graphs: the second block" in found and Tape.made
