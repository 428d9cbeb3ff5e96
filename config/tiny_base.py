"""A base to tune: plain diffusion on short stories and sums, from scratch, in a minute.

    python train.py config/tiny_base.py
"""

out_dir = "out/tiny_base"
preset = "tiny"
tokenizer = "toy"
task = "toy_base"
max_length = 64
batch_size = 32
max_steps = 800
lambda_jepa = 0.0
diffusion_t = "uniform"
loss_form = "unweighted"
lr = 2e-3
min_lr_ratio = 0.02
warmup_ratio = 0.1
beta2 = 0.95
weight_decay = 0.01
eval_every = 800
