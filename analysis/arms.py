"""The arms of a study: what each one changes of its config, and what tables and figures call it.

An arm of your own is one more line of ARMS: analysis/grid.py trains it by its key, as in
--arms=plain,my_arm, and analysis/tables.py and analysis/plot.py show its label. The settings are
explained in training/controls.py.
"""
from typing import NamedTuple


class Arm(NamedTuple):
    label: str                          # in tables, figures and docs
    options: str                        # of train.py; in braces: that setting of the config


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
DEFAULTS = {"objective": "jepa", "target": "ema", "masks": "independent", "pool": "visible",
            "pool_layer": 0, "pred_width": 0, "pred_lr": 1.0, "ema_dtype": "float32",
            "diffusion_t": "context", "anchor": 0.0}     # of train.py's controls
NO_CHANGE = ("lambda_jepa", "0"), ("anchor", "0")       # what makes an arm plain
RATES = (0.2, 0.7), (0.1, 0.9)          # (t_ctx, t_tgt) of the paper's two configurations


def label(arm: str) -> str:
    """Return the name of an arm for readers; an arm that ARMS lacks keeps its own."""
    return ARMS[arm].label if arm in ARMS else str(arm).replace("_", " ")


def rank_of(arm: str) -> tuple:
    """Return a sort key: the arms in the order of ARMS, then all others by name."""
    return (list(ARMS).index(arm) if arm in ARMS else len(ARMS), str(arm))


def plain_of(arm: str) -> str:
    """Return the arm that an arm is compared with: the same without its JEPA term."""
    return "plain_uniform" if arm in ("jepa_uniform", "plain_uniform") else "plain"


def arm_of(settings: dict) -> str:
    """Return the arm that trained with these settings of train.py, "" if there are none.

    It is the arm of ARMS with exactly these changes, or else a name that lists the changes.
    """
    if settings.get("lambda_jepa") is None:
        return ""
    if settings["lambda_jepa"]:
        arm, names = "jepa", DEFAULTS
        changed = changed_rates(settings.get("t_ctx"), settings.get("t_tgt"))
        if settings.get("n_pred_layer") == 0:
            changed["n_pred_layer"] = "0"
    else:                               # the other controls do nothing without the JEPA term
        arm, names = "plain", ("diffusion_t",)
        changed = {"lambda_jepa": "0", "anchor": f"{settings.get('anchor', 0.0):g}"}
    for name in names:
        value = settings.get(name, DEFAULTS[name])
        if value != DEFAULTS[name]:
            changed[name] = f"{value:g}" if isinstance(value, float) else str(value)
    for known, (_, options) in ARMS.items():
        if changed == dict(option[2:].split("=") for option in options.split()):
            return known
    return " ".join([arm, *(f"{name}={value}" for name, value in changed.items()
                            if (name, value) not in NO_CHANGE)])


def changed_rates(t_ctx, t_tgt) -> dict:
    """Return what ARMS would have as options for these two masking rates."""
    if t_ctx == t_tgt:
        return {"t_tgt": "{t_ctx}"} if t_ctx is not None else {}
    if (t_tgt, t_ctx) in RATES:
        return {"t_ctx": "{t_tgt}", "t_tgt": "{t_ctx}"}
    return {} if (t_ctx, t_tgt) in RATES else {"t_ctx": f"{t_ctx}", "t_tgt": f"{t_tgt}"}
