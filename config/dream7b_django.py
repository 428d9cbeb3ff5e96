"""Dream-7B on Django, the paper's aggressive configuration: 69.58 -> 72.35 ws-prefix match,
4-shot in its main table. As dream7b_gsm8k.py but for the task. Lengths vary, so rows are packed: a
sixth fewer tokens. Of 80 GB a GPU needs at most 49 (predicted).
    torchrun --nproc_per_node=8 train.py config/dream7b_django.py
"""

out_dir = "out/dream7b_django"
init_from = "Dream-org/Dream-v0-Base-7B"
task = "django"
max_length = 512
shard = True
pack = True
save_every = 100    # of about 500 steps; a checkpoint has 123 GB, and the next is written beside it
