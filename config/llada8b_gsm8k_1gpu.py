"""The paper's aggressive configuration on one GPU of 141 GB: LLaDA-8B, GSM8K, all weights trained.

training/lean.py keeps exact fp32 weights and an fp32 EMA in 14 bytes a parameter instead of 20.
Predicted for 1 x H200 141 GB: 129 GB in the largest pass, 217 steps of 2.61 s (9 min) at 249 tokens
a row, checkpoints of 98 GB. Measured on an H200 with random weights and 64 rows of 256 tokens: peak
130.2 GB of 150.1, 2.8 s a step. A checkpoint passes through 80 GB of host memory. All else is as in
llada8b_gsm8k.py.
    python train.py config/llada8b_gsm8k_1gpu.py
"""

out_dir = "out/llada8b_gsm8k_1gpu"
init_from = "GSAI-ML/LLaDA-8B-Base"
task = "gsm8k"
max_length = 256
batch_size = 64
micro_batch_size = 8
epochs = 2.0
optimizer = "lean"
lr = 1e-5
t_ctx = 0.2
t_tgt = 0.7
lambda_jepa = 1.0
n_pred_layer = 2
diffusion_t = "context"
save_every = 100    # two checkpoints must fit on the disk: the next is written beside the last
