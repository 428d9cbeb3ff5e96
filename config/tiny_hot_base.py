"""A practised base: plain diffusion at all rates, from scratch, on the task that is tuned next.

    python train.py config/tiny_hot_base.py
    python train.py config/tiny_hot_base.py --seed=2 --out_dir=out/tiny_hot_base_seed2

That is config/tiny.py without JEPA. The base answers about 90 % of the questions, so that
config/tiny_hot.py has something to lose.
"""

out_dir = "out/tiny_hot_base_seed1"
seed = 1
preset = "tiny"
tokenizer = "toy"
task = "toy"
max_length = 64
batch_size = 32
max_steps = 1200
lambda_jepa = 0.0
diffusion_t = "uniform"
loss_form = "unweighted"
lr = 2e-3
min_lr_ratio = 0.02
warmup_ratio = 0.1
beta2 = 0.95
weight_decay = 0.01
eval_every = 1200
log_every = 50
test_questions = 1000
