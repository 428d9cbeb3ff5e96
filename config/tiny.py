"""x"""

out_dir = "out/tiny/jepa"
init_from = "out/tiny/base"
overwrite = True
max_length = 64
task = "toy"
forget_task = "toy_base"
batch_size = 32
max_steps = 30
diffusion_t = "uniform"
lr = 2e-3
min_lr_ratio = 0.02
warmup_ratio = 0.1
beta2 = 0.95
weight_decay = 0.01
