"""NL-RX-SYNTH from scratch with JEPA: real rows that a model of 0.9 M parameters learns on a CPU.

A vocabulary of words from the training rows, the toy's recipe (config/tiny.py), 7,744 rows of
at most 64 tokens, 1,800 steps of 32. The rows are fetched once, unless data_dir
names a folder with train.jsonl.gz and test.jsonl.gz. Plain arm: --lambda_jepa=0.
"""

out_dir = "out/nl_rx_words"
preset = "tiny"
tokenizer = "words"
task = "nl_rx"
max_length = 64
batch_size = 32
max_steps = 1800
diffusion_t = "uniform"
loss_form = "unweighted"
lr = 2e-3
min_lr_ratio = 0.02
warmup_ratio = 0.1
beta2 = 0.95
weight_decay = 0.01
eval_every = 600
