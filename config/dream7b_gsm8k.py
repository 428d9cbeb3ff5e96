"""Dream-7B on GSM8K, the paper's aggressive configuration: 34.87 -> 46.25,
4-shot in its main table. Rates (0.2, 0.7), lr 1e-5 and two
epochs are the defaults; 19 GB of states on each of 8 GPUs, 35 GB with activations (predicted).
    torchrun --nproc_per_node=8 train.py config/dream7b_gsm8k.py
"""

out_dir = "out/dream7b_gsm8k"
init_from = "Dream-org/Dream-v0-Base-7B"
task = "gsm8k"
shard = True
save_every = 100    # of about 220 steps; a checkpoint has 123 GB, and the next is written beside it
