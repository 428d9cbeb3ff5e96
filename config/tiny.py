"""The embedded default: a 0.9 M parameter base, then plain and JEPA tuning from it, side by side.

Two CPU cores, about five minutes, no downloads; ends with a table and out/tiny/summary.json. Word
problems in GSM8K's format (tasks/toy.py). Rates, EMA, predictor and lambda are the paper's. Two
things are not: the context rate is drawn from U(0, 1), and every masked token weighs the same.
Trained at t = 0.2 alone, a model this small does not learn to start from masks only;
config/tiny_paper.py shows the faithful form and its price.
"""

compare = "config/tiny_base.py"
out_dir = "out/tiny"
overwrite = True
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
