"""The paper's Wide-t configuration: LLaDA-8B on GSM8K, rates (0.1, 0.9), lr 1.4e-6, two epochs.

Its Table 3 has 65.23 +- 0.93 (plain) against 67.07 +- 0.41 (JEPA), 0-shot, three seeds: 42, 123,
777. What the paper leaves open is as in llada8b_gsm8k.py. Predicted for 8 x A100 80 GB: 36 GB in
the largest pass, 217 steps of 1.03 s (4 min) at 249 tokens a row, checkpoints of 130 GB.
    torchrun --nproc_per_node=8 train.py config/llada8b_gsm8k_wide_t.py --seed=123
"""

out_dir = "out/llada8b_gsm8k_wide_t"
init_from = "GSAI-ML/LLaDA-8B-Base"
task = "gsm8k"
max_length = 256
batch_size = 64
epochs = 2.0
lr = 1.4e-6
t_ctx = 0.1
t_tgt = 0.9
lambda_jepa = 1.0
n_pred_layer = 2
shard = True
diffusion_t = "context"
save_every = 100    # two checkpoints must fit on the disk: the next is written beside the last
