"""Dream-7B on Django, the paper's aggressive configuration: 69.58 -> 72.35 ws-prefix match,
4-shot in its main table. As dream7b_gsm8k.py but for the task.
    torchrun --nproc_per_node=8 train.py config/dream7b_django.py
"""

out_dir = "out/dream7b_django"
init_from = "Dream-org/Dream-v0-Base-7B"
task = "django"
max_length = 512
shard = True
