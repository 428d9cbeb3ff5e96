"""JEPA on a real language model and two CPU cores: SmolLM2-135M on NL-RX-SYNTH.

The base of config/smollm2_base.py is tuned in the paper's form: the loss at t = 0.2 alone, a target
view at 0.7, lambda 1, two layers in the predictor, EMA 0.996. Batch, steps and lr are ours, chosen
on validation rows. Plain arm: --lambda_jepa=0 --out_dir=out/smollm2_plain. One seed of each takes
minutes; docs/LOG.md has what came out.
    python train.py config/smollm2_nl_rx.py --data_dir=data/nl_rx
Without amx_bf16 in `lscpu` add --dtype=float32, without a C++ compiler --compile=False.
"""

out_dir = "out/smollm2_nl_rx"
init_from = "out/smollm2_base"
task = "nl_rx"
max_length = 64
batch_size = 16
max_steps = 150
lambda_jepa = 1.0
t_ctx = 0.2
t_tgt = 0.7
n_pred_layer = 2
ema_decay = 0.996
lr = 1e-5
warmup_ratio = 0.05
dtype = "bfloat16"
compile = True
eval_every = 150
eval_rows = 64
save_every = 75
