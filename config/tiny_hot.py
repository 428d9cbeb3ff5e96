"""The paper's situation, small: a practised base is tuned on its own task at t = 0.2, and loses.

    python train.py config/tiny_hot_base.py
    python train.py config/tiny_hot.py

The rates, EMA and loss form are the paper's. There is something to keep: the base answers about
90 %. config/tiny_warm.py and config/tiny_hotter.py have other learning rates: a config each,
because results go by its name.
"""

init_from = "out/tiny_hot_base_seed1"
out_dir = "out/tiny_hot"
task = "toy"
max_length = 64
batch_size = 32
max_steps = 150
diffusion_t = "context"
loss_form = "masked_mean"
active_block = 8
lr = 2e-3
min_lr_ratio = 0.02
warmup_ratio = 0.1
beta2 = 0.95
weight_decay = 0.01
eval_every = 150
log_every = 50
