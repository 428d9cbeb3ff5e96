"""A diffusion model out of Qwen3-0.6B on one GPU of 24 GB: the base of qwen3_nl_rx.py. Not run.

The same as config/smollm2_base.py: t ~ U(0, 1) on NL-RX-SYNTH, Django and GSM8K, without JEPA. The
mask is <|mask|>, a new token in a spare row of the embedding. 16 bytes a parameter for weights,
gradients and Adam are 10 GB. From the hub; data_dir for local rows.
    python train.py config/qwen3_base.py
"""

out_dir = "out/qwen3_base"
init_from = "Qwen/Qwen3-0.6B"
task = "mixture"
max_length = 256
batch_size = 64
micro_batch_size = 16
max_steps = 2000
lambda_jepa = 0.0
diffusion_t = "uniform"
lr = 1e-4
warmup_ratio = 0.05
weight_decay = 0.01
pack = True
eval_every = 500
