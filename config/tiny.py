"""The default: a model of 0.9 M parameters learns word problems from scratch, with JEPA.

Two CPU cores, about three minutes, no download. The problems have GSM8K's format (tasks/toy.py).
Masking rates, EMA, predictor and lambda are the paper's. Two things are not: the context rate is
drawn from U(0, 1), and every masked token weighs the same. Trained at t = 0.2 alone, a model this
small does not learn to start from masks only.
"""

out_dir = "out/tiny"
preset = "tiny"
tokenizer = "toy"
task = "toy"
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
test_questions = 1000
