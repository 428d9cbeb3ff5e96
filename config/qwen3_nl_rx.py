"""JEPA on Qwen3-0.6B and NL-RX-SYNTH, one GPU of 24 GB. Not run.

As config/smollm2_nl_rx.py, from the base of config/qwen3_base.py, in the paper's form. 20 bytes a
parameter with the EMA are 12 GB. Plain arm: --lambda_jepa=0 --out_dir=out/qwen3_plain.
    python train.py config/qwen3_nl_rx.py
"""

out_dir = "out/qwen3_nl_rx"
init_from = "out/qwen3_base"
task = "nl_rx"
max_length = 64
batch_size = 32
max_steps = 400
lambda_jepa = 1.0
t_ctx = 0.2
t_tgt = 0.7
n_pred_layer = 2
lr = 2e-5
warmup_ratio = 0.05
eval_every = 200
