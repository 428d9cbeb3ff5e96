"""The arms of a study: what each one changes of its config, and its name in tables and figures.

An arm of your own is one more line of ARMS; analysis/grid.py trains it by its key, as in
--arms=plain,my_arm. The settings are explained in training/controls.py.
"""
from typing import NamedTuple


class Arm(NamedTuple):
    label: str                          # in tables, figures and docs
    options: str                        # of train.py; {name} is that setting of the config


ARMS = {
    "plain": Arm("plain", "--lambda_jepa=0 --anchor=0"),
    "jepa": Arm("JEPA", ""),
    "symmetric": Arm("symmetric rates", "--t_tgt={t_ctx}"),     # figure 3; its rate is not stated
    "no_predictor": Arm("no predictor", "--n_pred_layer=0"),
    # controls: what does the work?
    "equal_flop": Arm("plain, 4/3 of the steps", "--lambda_jepa=0 --anchor=0 "
                      "--max_steps={a_third_more_steps} --epochs={a_third_more_epochs}"),
    "shuffled": Arm("shuffled target", "--target=shuffled"),
    "frozen": Arm("frozen target", "--target=frozen"),
    "l2": Arm("L2 to the base", "--lambda_jepa=0 --anchor=0.0001"),
    "online": Arm("online target", "--target=online"),
    "consistency": Arm("consistency", "--objective=consistency"),
    "plain_uniform": Arm("plain, t ~ U(0, 1)", "--lambda_jepa=0 --anchor=0 --diffusion_t=uniform"),
    "jepa_uniform": Arm("JEPA, t ~ U(0, 1)", "--diffusion_t=uniform"),
    "two_gradients": Arm("LLM-JEPA", "--objective=two_gradients"),
    "infonce": Arm("InfoNCE", "--objective=infonce"),   # minus the next: a positive control
    "infonce_shuffled": Arm("InfoNCE, shuffled", "--objective=infonce --target=shuffled"),
    "blockwise": Arm("plain, blockwise", "--lambda_jepa=0 --anchor=0 --objective=blockwise "
                     "--diffusion_t=uniform"),                  # Blockwise SFT
    "same_mask": Arm("one mask for both views", "--masks=nested --t_tgt={t_ctx}"),
    "nested": Arm("nested masks", "--masks=nested"),
    "shuffled_no_predictor": Arm("shuffled, no predictor",      # a predictor could ignore z_ctx
                                 "--target=shuffled --n_pred_layer=0"),
    "mean": Arm("mean target", "--target=mean"),
    "random": Arm("random target", "--target=random"),
    "frozen_predictor": Arm("frozen predictor", "--pred_lr=0"),
    "reversed": Arm("reversed rates", "--t_ctx={t_tgt} --t_tgt={t_ctx}"),
    # the appendix's rates, beside (0.2, 0.7)
    "rates_0.1_0.5": Arm("rates 0.1, 0.5", "--t_ctx=0.1 --t_tgt=0.5"),
    "rates_0.2_0.5": Arm("rates 0.2, 0.5", "--t_ctx=0.2 --t_tgt=0.5"),
    "rates_0.3_0.9": Arm("rates 0.3, 0.9", "--t_ctx=0.3 --t_tgt=0.9"),
}
AT_RATES = [arm for arm in ARMS if arm.startswith("rates_")]


def label(arm: str) -> str:
    """Return the name of an arm for readers; an arm that ARMS lacks keeps its own."""
    return ARMS[arm].label if arm in ARMS else str(arm).replace("_", " ")


def rank_of(arm: str) -> tuple:
    """Return a sort key: the order of ARMS, then all other arms by name."""
    return (list(ARMS).index(arm) if arm in ARMS else len(ARMS), str(arm))


def plain_of(arm: str) -> str:
    """Return the arm that an arm is compared with: plain tuning at its own diffusion rate."""
    is_uniform = arm in ARMS and "--diffusion_t=uniform" in ARMS[arm].options
    return "plain_uniform" if is_uniform else "plain"
