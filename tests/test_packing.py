"""Laws of what saves work: packed rows, chunks, recomputed blocks, fewer JEPA steps, one graph."""
import inspect
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import model as model_module
from helpers import flops_of, seeded
from jepa import DLLMJEPA, ema_update, make_target
from model import DLLM, ModelConfig, Packed, row_generators
from tasks.common import Row, collate
from training.setup import compile_blocks

LLADA = ModelConfig(vocab_size=40, mask_id=39, eos_id=38, block_size=64, n_layer=3, n_head=4,
                    n_kv_head=4, n_embd=32, n_hidden=48)
DREAM = replace(LLADA, n_kv_head=2, qkv_bias=True, shift=True)
QWEN = replace(LLADA, n_kv_head=1, head_dim=16, qk_norm=True, tied_head=True)
every = pytest.mark.parametrize("config", [LLADA, DREAM, QWEN], ids=["llada", "dream", "qwen"])


def make_model(config):
    model, generator = DLLM(config), seeded()
    for p in model.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator) + (p.ndim == 1)
    return model


def rows_of_unequal_length(n=6):
    """Prompts of 3 to 8 and answers of 17 down to 2 tokens."""
    ids = torch.randint(38, (n, 30), generator=seeded(1)).tolist()
    return [Row(100 + b, ids[b][:3 + b], ids[b][10:10 + 3 * (n - b)]) for b in range(n)]


def step(objective, fill=0, generator=None):
    """One forward and backward -> loss, parts, gradients by name."""
    objective.zero_grad()
    rows = rows_of_unequal_length()
    batch = collate(rows, fill, 64, 38)
    generator = generator or row_generators(0, 0, [row.example_id for row in rows])
    loss, parts = objective(*batch, generator)
    loss.backward()
    return loss.detach(), parts, {name: p.grad.clone() for name, p in objective.named_parameters()
                                  if p.grad is not None}


def assert_same(one, two):
    """Loss, parts and all gradients agree to fp32 round-off."""
    torch.testing.assert_close(one[0], two[0])
    assert one[1].keys() == two[1].keys() and one[2].keys() == two[2].keys()
    for name in one[1]:
        torch.testing.assert_close(one[1][name], two[1][name])
    scale = max(grad.abs().max() for grad in one[2].values()).item()
    for name in one[2]:
        torch.testing.assert_close(one[2][name], two[2][name], atol=2e-6 * scale, rtol=1e-4,
                                   msg=lambda text: f"{name}: {text}")


# ---- packing ----


@every
def test_packed_states_are_the_padded_ones_wherever_the_padding_stands(config):
    model = make_model(config)
    ids = torch.randint(38, (4, 12), generator=seeded(2))
    right = torch.arange(12) < torch.tensor([[12], [7], [1], [9]])
    for is_real in (right, right.flip(1), torch.ones_like(right)):
        padded = model.encode(ids, is_real)
        model.pack = True
        packed = model.encode(ids, is_real)
        model.pack = False
        assert not packed[~is_real].any()
        torch.testing.assert_close(packed[is_real], padded[is_real], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mask_scope", ["response", "all"])
@pytest.mark.parametrize("fill", [0, 12], ids=["one end-of-text", "filled"])
@every
def test_a_packed_step_has_the_masks_loss_and_gradients_of_the_padded_one(config, fill,
                                                                          mask_scope):
    results = []
    for pack in (False, True):
        model = make_model(config)
        model.pack = pack
        results.append(step(DLLMJEPA(model, 0.7, t_ctx=0.5, mask_scope=mask_scope), fill))
    assert_same(*results)


def test_a_packed_row_does_not_see_its_neighbours():
    """Not by attention and, under the shift, not by scoring the first token of the next row."""
    model = make_model(DREAM)
    model.pack = True
    ids = torch.randint(38, (3, 10), generator=seeded(2))
    is_real = torch.arange(10) < torch.tensor([[4], [10], [6]])
    other = ids.clone()
    other[[0, 2]] += 1
    assert torch.equal(model(ids, is_real)[1], model(other, is_real)[1])


def test_the_kernel_for_rows_of_any_length_is_called_as_it_wants(monkeypatch):
    """torch's varlen_attn has no CPU form; one written after its documentation stands in for it.
    On the meta device it has one, which takes and returns the same shapes."""
    from torch.nn.attention.varlen import varlen_attn as real

    def varlen_attn(*given):
        q, k, v, cu_q, cu_k, max_q, max_k = inspect.signature(real).bind(*given).args
        assert real(*(x.to("meta") if torch.is_tensor(x) else x for x in given)).shape == q.shape
        assert cu_q.dtype == cu_k.dtype == torch.int32 and q.shape == k.shape == v.shape
        assert max_q == max_k == cu_q.diff().max() and cu_q[0] == 0 and cu_q[-1] == len(q)
        y = torch.zeros_like(q)                                 # (N, H, D)
        for a, b in zip(cu_q[:-1], cu_q[1:]):
            weights = torch.einsum("ihd,jhd->hij", q[a:b], k[a:b]) * q.shape[-1] ** -0.5
            y[a:b] = torch.einsum("hij,jhd->ihd", weights.softmax(dim=-1), v[a:b])
        return y
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    is_real = torch.arange(9) < torch.tensor([[9], [2], [5]])
    rows = Packed(is_real, torch.device("cpu"))
    q, k, v = (torch.randn(1, H, 16, 8, generator=seeded(H)) for H in (4, 2, 2))
    for k, v in ((k, v), (q + 1, q - 1)):
        is_gqa = k.shape != q.shape
        torch.testing.assert_close(rows.varlen(q, k, v, is_gqa), rows.attention(q, k, v, is_gqa))


def test_padding_costs_a_packed_model_nothing():
    model, ids = make_model(LLADA), torch.randint(38, (4, 16), generator=seeded())
    is_real = torch.arange(16) < torch.tensor([[16], [2], [4], [10]])
    everything = flops_of(lambda: model.encode(ids, is_real))   # matmuls: a CPU's attention is not
    model.pack = True                                           # counted
    assert flops_of(lambda: model.encode(ids, is_real)) == everything * 32 // 64


@pytest.mark.parametrize("pack", [False, True])
@every
def test_a_step_reads_nothing_back_from_the_device(config, pack, monkeypatch):
    """On the meta device nothing can be read, so whatever would wait for a GPU raises here."""
    monkeypatch.setattr(model_module, "NLL_CHUNK", 4)            # chunks, too
    with torch.device("meta"):
        model = DLLM(config)
    model.pack = pack
    objective = DLLMJEPA(model, n_pred_layer=0, t_ctx=0.5)
    loss, _, grads = step(objective)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    objective.update_target()
    assert loss.is_meta and len(grads) == len(list(model.parameters()))
    with pytest.raises(RuntimeError):
        loss.item()


# ---- chunks, recomputed blocks ----


@every
def test_the_loss_in_chunks_is_the_loss_in_one(config, monkeypatch):
    whole = step(DLLMJEPA(make_model(config), t_ctx=0.5))
    shapes = []
    monkeypatch.setattr(model_module, "NLL_CHUNK", 4)
    monkeypatch.setattr(F, "cross_entropy", lambda logits, *rest, cross_entropy=F.cross_entropy,
                        **kw: shapes.append(len(logits)) or cross_entropy(logits, *rest, **kw))
    assert_same(whole, step(DLLMJEPA(make_model(config), t_ctx=0.5)))
    assert max(shapes) == 4 and len(shapes) > 8                 # forward, and again in backward


def kept_bytes(model, run):
    """What autograd keeps between forward and backward, besides the weights themselves."""
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()              # alive until the sum, so that no address comes twice
        return sum(n for address, n in kept.items() if address not in weights) + 0 * len(result)


def test_chunks_keep_no_logits_for_backward(monkeypatch):
    config = replace(LLADA, vocab_size=4000)
    model, h = make_model(config), torch.randn(4, 50, 32, generator=seeded(), requires_grad=True)
    x0, where = torch.zeros(4, 50, dtype=torch.long), torch.ones(4, 50, dtype=torch.bool)
    logits = 4 * 50 * 4000 * 4
    assert kept_bytes(model, lambda: model.nll(h, x0, where)) >= logits
    monkeypatch.setattr(model_module, "NLL_CHUNK", 20)
    assert kept_bytes(model, lambda: model.nll(h, x0, where)) < 0.02 * logits


@pytest.mark.parametrize("pack", [False, True])
def test_recomputed_blocks_change_no_gradient_and_keep_less(pack):
    results, kept = {}, {}
    config = replace(LLADA, n_layer=4)
    for setting in ("none", "selective", "full"):
        model = make_model(config)
        model.pack, model.checkpoint_activations = pack, setting
        results[setting] = step(DLLMJEPA(model, t_ctx=0.5))
        ids = torch.zeros(8, 32, dtype=torch.long)
        kept[setting] = kept_bytes(model, lambda: model.encode(ids))
    assert_same(results["none"], results["selective"])
    assert_same(results["none"], results["full"])
    assert kept["full"] < 0.3 * kept["none"]
    assert 0.4 * kept["none"] < kept["selective"] < 0.7 * kept["none"]


# ---- the EMA ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ema_is_the_loop_over_parameters(dtype):
    model, other = make_model(replace(LLADA, n_layer=5)), make_model(LLADA)
    target = make_target(model)
    for p in model.parameters():
        p.data = (2 * p.data + 0.1).to(dtype)
    expected = {name: 0.9 * p + 0.1 * model.get_parameter(name).float()
                for name, p in target.named_parameters()}
    ema_update(target, model, 0.9)
    assert len(expected) > 32 and target.head is None and other.head is not None
    for name, p in target.named_parameters():
        torch.testing.assert_close(p.data, expected[name].data)


# ---- compiled blocks ----


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_activations, pack, backend", [
    ("full", False, "aot_eager"), ("none", True, "inductor")])      # train.py uses inductor
def test_compiled_blocks_meet_new_lengths_without_compiling_again(checkpoint_activations, pack,
                                                                  backend):
    from torch._dynamo.utils import counters
    config = replace(DREAM, n_embd=36, n_hidden=52, head_dim=10)
    results = []
    for is_compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model = make_model(config)
        model.pack, model.checkpoint_activations = pack, checkpoint_activations
        objective = DLLMJEPA(model, 0.7)
        if is_compiled:
            compile_blocks(model, objective.target, backend=backend)
        graphs = []
        for i in range(12):
            ids = torch.randint(38, (40,), generator=seeded(i)).tolist()
            rows = [Row(b, ids[:3 + (5 * i + b) % 7], ids[:4 + (3 * i + 2 * b) % 11])
                    for b in range(8 if i < 8 else 5)]
            objective.zero_grad()
            loss, _ = objective(*collate(rows, 0, 64, 38), row_generators(0, i, range(len(rows))))
            loss.backward()
            if i == 1:                                          # as for the held-out loss
                with torch.no_grad():
                    model.encode(torch.tensor([ids[:9]] * 3), torch.ones(3, 9, dtype=torch.bool))
            graphs.append(counters["stats"].get("unique_graphs", 0))
        results.append((loss.detach(), {}, {name: p.grad for name, p in model.named_parameters()}))
    # with gradient, without, and another number of rows; packed, each in two: attention is apart
    assert 0 < graphs[-1] <= 8 and graphs[2] == graphs[7], graphs
    assert graphs[8] == graphs[-1], graphs
    assert_same(*results)
