"""LLaDA-8B on NL-RX-SYNTH, the paper's aggressive configuration: 47.50 -> 58.20 func match, 4-shot
in its main table. As llada8b_gsm8k.py but for the task. Predicted for 8 x A100 80 GB: 28 GB in the
largest pass, 242 steps of 0.25 s (1 min) at 61 tokens a row, checkpoints of 130 GB.
    torchrun --nproc_per_node=8 train.py config/llada8b_nl_rx.py
"""

out_dir = "out/llada8b_nl_rx"
init_from = "GSAI-ML/LLaDA-8B-Base"
task = "nl_rx"
max_length = 128
shard = True
save_every = 100    # two checkpoints must fit on the disk: the next is written beside the last
