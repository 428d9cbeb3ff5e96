"""DLLM-JEPA on a model for small machines: Qwen3-0.6B made a masked-diffusion LM, on GSM8K.

dllm-hub's open weights (596 M parameters). Fine-tuned in full: 20 bytes a parameter for weights,
gradients, Adam and EMA are 12 GB, so one 24 GB GPU holds it; a CPU with that much memory does too,
slowly. Rates and epochs are the paper's, which has not tried this model; nor have we so far.
    python train.py config/qwen0.6b_gsm8k.py
"""

out_dir = "out/qwen0.6b_gsm8k"
init_from = "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1"
chat = True
task = "gsm8k"
max_length = 256
batch_size = 64
micro_batch_size = 8
epochs = 2.0
lr = 1e-5
t_ctx = 0.2
t_tgt = 0.7
