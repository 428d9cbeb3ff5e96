"""LLaDA-8B on GSM8K with LoRA and JEPA on one GPU of 24 GB.

The base is in bf16, and activations are recomputed. Predicted for 1 x 4090 24 GB: 23 GB in the
largest pass, 217 steps of 15.91 s (58 min) at 253 tokens a row, checkpoints of 19 GB. Measured on
an H200 with random weights and 64 rows of 256 tokens: peak 22.6 GB, 2.4 s a step; with micro-
batches of 2 rows 21.0 GB and 14.1 s. A card of 24 GB has 25.8e9 bytes; none has run it. The paper
trains all weights; rank 32, alpha 64 and the targets are those of its public reproduction. The
learning rate is ours.
    python train.py config/llada8b_gsm8k_lora.py
"""

out_dir = "out/llada8b_gsm8k_lora"
init_from = "GSAI-ML/LLaDA-8B-Base"
task = "gsm8k"
max_length = 256
batch_size = 64
micro_batch_size = 16
checkpoint_activations = "full"
epochs = 2.0
lora_rank = 32
lora_alpha = 64.0
lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
lr = 2e-4
t_ctx = 0.2
t_tgt = 0.7
lambda_jepa = 1.0
n_pred_layer = 1
diffusion_t = "context"
save_every = 100    # two checkpoints must fit on the disk: the next is written beside the last
