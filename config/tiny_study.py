"""The study of the controls, small: the paper's single pass from a base of 0.9 M parameters.

    python train.py config/tiny_base.py
    python analysis/grid.py --configs=config/tiny_study.py --arms=plain,jepa --seeds=42 --n_shots=0

That is config/tiny_paper.py with half of its steps, from one base for all arms and seeds.
"""

init_from = "out/tiny_base"
out_dir = "out/tiny_study"
task = "toy"
forget_task = "toy_base"
max_length = 64
batch_size = 32
max_steps = 600
diffusion_t = "context"
loss_form = "masked_mean"
lr = 2e-3
min_lr_ratio = 0.02
warmup_ratio = 0.1
beta2 = 0.95
weight_decay = 0.01
eval_every = 600
log_every = 50
