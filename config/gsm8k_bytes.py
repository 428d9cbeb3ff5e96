"""The real GSM8K rows, byte by byte, from scratch with JEPA: a small run that takes the whole path.

Learns to write what looks like GSM8K and solves none of it: a model of this size and bytes for
tokens are no match for the task. Rows over 512 bytes are left out. The rows come from the hub
(openai/gsm8k), or with --data_dir= from a folder with train.jsonl.gz and test.jsonl.gz.
"""

out_dir = "out/gsm8k_bytes"
preset = "tiny"
tokenizer = "bytes"
task = "gsm8k"
max_length = 512
batch_size = 16
max_steps = 600
diffusion_t = "uniform"
lr = 2e-3
min_lr_ratio = 0.02
warmup_ratio = 0.1
beta2 = 0.95
weight_decay = 0.01
log_every = 20
eval_every = 150
eval_rows = 64
save_every = 300
