"""One base, two arms: tune the same model with and without JEPA, score all three, print a table.

    python train.py                                  does this for config/tiny.py
    python analysis/compare.py config/tiny.py --seed=123 --lambda_jepa=0.5

Each run is its own `train.py` process. The arms share base, batches and masks, and differ in lambda
alone. On a CPU they run side by side with half of the cores each, so that both meet the same
machine and their step times can be compared. The table's numbers are also in out_dir/summary.json.
"""
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))           # a script in a folder: the modules lie one above

from configurator import run
from pretrained.device import pick_device
from tasks.answers import read_common
from tasks.stats import paired_difference
from train import TrainConfig

ARMS = ("base", "plain", "jepa")


def main(cfg: TrainConfig):
    if not cfg.compare:
        raise ValueError("there is nothing to compare: the setting `compare` names the config file "
                         "of a base, e.g. --compare=config/tiny_base.py")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # so that `start` ends what it began
    began, out = time.perf_counter(), Path(cfg.out_dir)
    side_by_side = pick_device(cfg.device).type == "cpu"
    common = [f"--seed={cfg.seed}", f"--device={cfg.device}", "--compare=", "--revision=",
              "--overwrite"]
    train = [sys.executable, str(ROOT / "train.py")]
    start([[*train, cfg.compare, *common, f"--out_dir={out}/base"]])

    arm = [*train, *sys.argv[1:], *common, f"--init_from={out}/base"]
    start([[*arm, "--lambda_jepa=0", f"--out_dir={out}/plain", "--export_dir="],
           [*arm, f"--lambda_jepa={cfg.lambda_jepa}", f"--out_dir={out}/jepa"]], side_by_side)

    for old in out.glob("*/eval_*"):
        old.unlink()
    evaluate = [sys.executable, str(ROOT / "evaluate.py"), f"--task={cfg.task}",
                f"--data_dir={cfg.data_dir}", f"--device={cfg.device}"]
    start([[*evaluate, f"--init_from={out}/{name}"] for name in ARMS], side_by_side)

    summary = summarize(out, cfg)
    summary["seconds"] = round(time.perf_counter() - began, 1)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    print_table(summary, cfg)


def start(commands: list[list[str]], side_by_side: bool = False):
    """Runs them, two at a time if side_by_side. Stops everything at the first that fails."""
    at_a_time = 2 if side_by_side else 1
    threads = str(max(1, (os.cpu_count() or 1) // at_a_time))
    for i in range(0, len(commands), at_a_time):
        running = []
        for position, command in enumerate(commands[i:i + at_a_time]):      # of the progress bar
            env = {**os.environ, "OMP_NUM_THREADS": threads, "TQDM_POSITION": str(position)}
            running.append(subprocess.Popen(command, env=env))
        try:
            codes = [None]
            while None in codes:
                time.sleep(0.1)
                codes = [process.poll() for process in running]
                for process, code in zip(running, codes):
                    if code:
                        raise ValueError(f"`{' '.join(process.args[1:])}` stopped with exit code "
                                         f"{code}")
        finally:
            for process in running:
                process.terminate()


def summarize(out: Path, cfg: TrainConfig) -> dict:
    """What the runs wrote: the arms' last held-out losses; the base's are an arm's at step 0."""
    logs = {name: [json.loads(line) for line in open(out / name / "log.jsonl")] for name in ARMS}
    arms = {}
    for name in ARMS:
        scores = json.loads((out / name / f"eval_{cfg.task}_0shot.json").read_text())
        steps = [line for line in logs[name] if "ms" in line]
        tuned = logs["plain" if name == "base" else name]
        losses = [line["held_out"] for line in tuned if "held_out" in line]
        losses = losses[0 if name == "base" else -1]
        arms[name] = {"accuracy": scores["accuracy"], "stderr": scores["stderr"], "n": scores["n"],
                      "held_out_loss": losses[cfg.task],
                      "base_corpus_loss": losses.get(cfg.forget_task),
                      "seconds": steps[-1]["seconds"],
                      "ms_per_step": statistics.median(line["ms"] for line in steps)}
    verdicts, _ = read_common([str(out / name / f"eval_{cfg.task}_0shot.jsonl")
                               for name in ("plain", "jepa")])
    ratio = arms["jepa"]["ms_per_step"] / arms["plain"]["ms_per_step"]
    return {"arms": arms, "jepa_minus_plain": paired_difference(*verdicts),
            "step_time_ratio": ratio, "seed": cfg.seed, "lambda_jepa": cfg.lambda_jepa,
            "diffusion_t": cfg.diffusion_t}


def print_table(summary: dict, cfg: TrainConfig):
    arms = summary["arms"]
    rates = "held-out loss at t = " + ", ".join(arms["base"]["held_out_loss"])
    print(f"\n{'':6} {'accuracy %':>12}   {rates:36}   base corpus  seconds  ms/step")
    for name, arm in arms.items():
        losses = "  ".join(f"{loss:.3f}" for loss in arm["held_out_loss"].values())
        base_corpus = arm["base_corpus_loss"] or {"none": float("nan")}
        accuracy = f"{100 * arm['accuracy']:.1f} +- {100 * arm['stderr']:.1f}"
        print(f"{name:6} {accuracy:>12}   {losses:36}   "
              f"{statistics.mean(base_corpus.values()):11.3f} {arm['seconds']:8.0f} "
              f"{arm['ms_per_step']:8.1f}")
    difference = summary["jepa_minus_plain"]
    points = f"{100 * difference['mean']:+.1f} +- {100 * difference['stderr']:.1f} points (paired)"
    print(f"\nn = {arms['jepa']['n']} unseen questions, seed {summary['seed']}: JEPA - plain = "
          f"{points}; step time {summary['step_time_ratio']:.2f} x;\n{summary['seconds']:.0f} s in "
          f"all. Base corpus: mean loss over t. On a CPU each arm has half of the cores, the base "
          f"all of them.")


if __name__ == "__main__":
    run(main, TrainConfig, default="config/tiny.py")
