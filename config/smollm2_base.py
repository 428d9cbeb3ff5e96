"""A diffusion model out of SmolLM2-135M-Instruct, on two CPU cores: the base of smollm2_nl_rx.py.

An autoregressive model learns to fill masks: t ~ U(0, 1) on rows of NL-RX-SYNTH, Django and GSM8K,
of those that have at most 96 tokens. Plain diffusion, no JEPA. The mask is a token that text
cannot write and that these rows do not need.
    python pretrained/from_gguf.py --out_dir=models/smollm2
    python train.py config/smollm2_base.py --data_dir=data
data has the folders gsm8k, nl_rx and django. Who can reach the hub takes --init_from=HuggingFaceTB/
SmolLM2-135M-Instruct in place of the first command, and no data_dir. Without amx_bf16 in `lscpu`
add --dtype=float32, without a C++ compiler --compile=False.
"""

out_dir = "out/smollm2_base"
init_from = "models/smollm2"
mask_token = "<empty_output>"
task = "mixture"
max_length = 96
batch_size = 16
max_steps = 520
lambda_jepa = 0.0
diffusion_t = "uniform"
lr = 3e-4
warmup_ratio = 0.05
beta2 = 0.95
weight_decay = 0.01
dtype = "bfloat16"
compile = True
eval_every = 100
eval_rows = 96
save_every = 50
