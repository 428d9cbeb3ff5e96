"""LLaDA-8B on Django, the paper's aggressive configuration: 74.40 -> 75.40 ws-prefix match,
4-shot in its main table. As llada8b_gsm8k.py but for the task.
    torchrun --nproc_per_node=8 train.py config/llada8b_django.py
"""

out_dir = "out/llada8b_django"
init_from = "GSAI-ML/LLaDA-8B-Base"
task = "django"
max_length = 512
shard = True
