"""A tiny base (config/tiny_base.py) is tuned on word problems: an arm of analysis/compare.py.

    python train.py config/tiny_base.py && python train.py config/tiny_tune.py

The recipe is config/tiny.py's, from a base that can read a story and do sums.
"""

init_from = "out/tiny_base"
out_dir = "out/tiny_tune"
task = "toy"
forget_task = "toy_base"
max_length = 64
batch_size = 32
max_steps = 1200
diffusion_t = "uniform"
loss_form = "unweighted"
lr = 2e-3
min_lr_ratio = 0.02
warmup_ratio = 0.1
beta2 = 0.95
weight_decay = 0.01
eval_every = 400
