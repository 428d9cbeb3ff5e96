"""config/tiny_tune.py with the paper's single pass: the diffusion loss is taken at t = 0.2 only.

    python analysis/compare.py --tune=config/tiny_paper.py

One pass with gradient on the context view serves both terms, as in the paper. The price is that no
gradient ever comes from nearly empty answers, where sampling starts; compare the accuracies.
"""

init_from = "out/tiny_base"
out_dir = "out/tiny_paper"
task = "toy"
forget_task = "toy_base"
max_length = 64
batch_size = 32
max_steps = 1200
diffusion_t = "context"
loss_form = "masked_mean"
lr = 2e-3
min_lr_ratio = 0.02
warmup_ratio = 0.1
beta2 = 0.95
weight_decay = 0.01
eval_every = 400
