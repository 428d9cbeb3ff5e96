"""config/tiny_hot.py at three times its learning rate."""

init_from = "out/tiny_hot_base_seed1"
out_dir = "out/tiny_hotter"
task = "toy"
max_length = 64
batch_size = 32
max_steps = 150
diffusion_t = "context"
loss_form = "masked_mean"
active_block = 8
lr = 6e-3
min_lr_ratio = 0.02
warmup_ratio = 0.1
beta2 = 0.95
weight_decay = 0.01
eval_every = 150
log_every = 50
