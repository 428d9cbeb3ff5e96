"""The paper's other baseline: no JEPA but an L2 pull to the base, on LLaDA-8B, GSM8K, Wide-t.

Its Table 3 has 65.18 +- 0.87 for it (plain: 65.23 +- 0.93), 0-shot, three seeds: 42, 123, 777. The
strength 1e-4 is the paper's; that it multiplies the summed square of theta - base is our guess, and
`anchor_ratio` in the log says how much of the gradient it is. The base's copy is another 4 bytes a
parameter, 20 in all as with JEPA's EMA. Predicted for 8 x A100 80 GB: 35 GB in the largest pass,
217 steps of 0.78 s (3 min) at 249 tokens a row, checkpoints of 96 GB.
    torchrun --nproc_per_node=8 train.py config/llada8b_gsm8k_anchor.py --seed=123
"""

out_dir = "out/llada8b_gsm8k_anchor"
init_from = "GSAI-ML/LLaDA-8B-Base"
task = "gsm8k"
max_length = 256
batch_size = 64
epochs = 2.0
lr = 1.4e-6
t_ctx = 0.1
t_tgt = 0.9
lambda_jepa = 0.0
anchor = 1e-4
shard = True
diffusion_t = "context"
save_every = 100    # two checkpoints must fit on the disk: the next is written beside the last
