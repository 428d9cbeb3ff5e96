"""Laws of the whole path on published weights: generated folders, real tokenizer pipelines."""
import json
import shutil

import pytest
import torch

pytest.importorskip(
    "tokenizers", reason="the library to compare with: pip install -r tests/requirements.txt")

import eval_gsm8k
import train
from configurator import configure
from helpers import script
from pretrained.tokenizer import load_tokenizer
from pretrained.weights import read_config
from published import LLADA, generate
from sample import load_model

FAMILY = {"llada": "llada", "base": "llada", "dream": "Dream", "qwen": "a2d-qwen3"}
every_model = pytest.mark.parametrize("kind", list(FAMILY))


@pytest.fixture(scope="module")
def models(folders, tmp_path_factory):
    """{kind: a folder with weights and tokenizer}, tiny, in several parts, as on the hub."""
    root = tmp_path_factory.mktemp("models")
    for kind, family in FAMILY.items():
        tok = load_tokenizer(str(folders / kind))
        ids = {"mask_token_id": tok.mask_id, "eos_token_id": tok.eos_id,
               "pad_token_id": tok.eos_id, "vocab_size": tok.n_vocab + 9}
        if family == "llada":
            ids |= {"embedding_size": tok.n_vocab + 9, "max_sequence_length": 512}
        else:
            ids |= {"max_position_embeddings": 512}
        generate(root / kind, family, parts=3, **ids)
        for path in (folders / kind).iterdir():         # over the stand-in that `generate` wrote
            shutil.copy(path, root / kind)
        if kind == "qwen":
            (root / kind / "tokenizer_config.json").unlink()
    return root


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gsm8k")
    row = {"question": "Ann has 3 pens and buys 4. How many?", "answer": "3+4=7\n#### 7"}
    for split, n in (("train", 272), ("test", 3)):
        rows = [{**row, "question": f"{i}. {row['question']}"} for i in range(n)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@every_model
def test_sample_generates_from_a_published_folder(kind, models):
    done = script("sample.py", f"--init_from={models / kind}", "--prompt=Wie geht es dir, \u4e16?",
                  "--temperature=1", "--steps=8")
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first == "\u2591" * 16 and "\u2591" not in last and len(done.stdout.splitlines()) == 9


@pytest.mark.parametrize("kind", ["llada", "base", "dream", "qwen"])
def test_sample_asks_in_a_chat(kind, models):
    done = script("sample.py", f"--init_from={models / kind}", "--chat", "--prompt=Hi",
                  "--gen_length=16", "--block_length=16", "--steps=4")
    assert done.returncode == 0, done.stderr
    for token in ("<|mdm_mask|>", "<|reserved", "<|im_start|>", "<|beginoftext|>"):
        assert token not in done.stdout                 # nothing that no answer is made of


@every_model
@pytest.mark.parametrize("chat", [False, True])
def test_a_published_model_is_tuned_scored_and_exported_as_it_came(kind, chat, models, data_dir,
                                                                   tmp_path):
    """Two steps with JEPA; the checkpoint is itself a published folder, and so is the export."""
    common = ["--task=gsm8k", f"--data_dir={data_dir}", f"--chat={chat}", "--device=cpu"]
    train.main(configure(train.TrainConfig, [
        "config/qwen0.6b_gsm8k.py", f"--init_from={models / kind}", *common,
        f"--out_dir={tmp_path}/run", f"--export_dir={tmp_path}/export", "--max_steps=2",
        "--batch_size=4", "--micro_batch_size=2", "--eval_rows=4"]))
    scores, _ = eval_gsm8k.evaluate(configure(eval_gsm8k.EvalConfig, [
        f"--init_from={tmp_path}/run", *common, "--n_shot=1", "--gen_length=16",
        "--block_length=16", "--steps=16"]))
    assert scores["n"] == 3
    for folder in (tmp_path / "run" / "step_0000002", tmp_path / "export"):
        same = read_config(folder)
        assert same.pop("torch_dtype", None) or same.pop("dtype")
        theirs = read_config(models / kind)
        assert same == {key: theirs[key] for key in same}
        for path in models.joinpath(kind).iterdir():
            if not path.name.startswith(("model", "config")):
                assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    tuned, tok = load_model(str(tmp_path / "export"), "cpu", chat=chat)
    before, other = load_model(str(models / kind), "cpu", chat=chat)
    assert tok == other
    assert not torch.equal(tuned.embed.weight, before.embed.weight)     # it has been trained
    trained, _ = load_model(str(tmp_path / "run"), "cpu", chat=chat)
    for (name, p), q in zip(trained.named_parameters(), tuned.parameters()):
        torch.testing.assert_close(p.bfloat16().float(), q.float(), rtol=0, atol=0, msg=name)


def test_a_chat_with_a_model_that_knows_none_is_one_sentence(tmp_path):
    done = script("train.py", "config/tiny_base.py", "--chat", f"--out_dir={tmp_path}")
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "chat" in done.stderr


def test_a_tokenizer_of_another_model_is_one_sentence(models, folders, tmp_path):
    shutil.copytree(models / "llada", tmp_path / "mixed")
    config = read_config(tmp_path / "mixed")
    config["mask_token_id"] = LLADA["mask_token_id"] % config["embedding_size"]
    (tmp_path / "mixed" / "config.json").write_text(json.dumps(config))
    done = script("sample.py", f"--init_from={tmp_path / 'mixed'}")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "tokenizer" in done.stderr
