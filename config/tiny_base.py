"""The base model of the tiny default: plain diffusion on arithmetic, from scratch. Under a minute on two cores."""

out_dir = "out/tiny/base"
overwrite = True
preset = "tiny"
tokenizer = "toy"
max_length = 64
task = "toy_base"
batch_size = 32
max_steps = 30
lambda_jepa = 0.0
diffusion_t = "uniform"
lr = 2e-3
min_lr_ratio = 0.02
warmup_ratio = 0.1
beta2 = 0.95
weight_decay = 0.01
