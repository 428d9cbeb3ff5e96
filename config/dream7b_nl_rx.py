"""Dream-7B on NL-RX-SYNTH, the paper's aggressive configuration: 42.00 -> 46.80 func match, 4-shot
in its main table. As dream7b_gsm8k.py but for the task. Predicted for 8 x A100 80 GB: 27 GB in the
largest pass, 242 steps of 0.24 s (1 min) at 61 tokens a row, checkpoints of 123 GB.
    torchrun --nproc_per_node=8 train.py config/dream7b_nl_rx.py
"""

out_dir = "out/dream7b_nl_rx"
init_from = "Dream-org/Dream-v0-Base-7B"
task = "nl_rx"
max_length = 128
shard = True
save_every = 100    # two checkpoints must fit on the disk: the next is written beside the last
