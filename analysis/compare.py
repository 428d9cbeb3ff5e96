"""One base, two arms: fine-tune the same model with and without JEPA, score all three, print a table.

    python train.py                                  does this for config/tiny.py
    python analysis/compare.py config/tiny.py --seed=123 --lambda_jepa=0.5

Each run is its own `train.py` process. The arms share base, batches and masks, and differ in lambda alone. On
a CPU they run side by side with half of the cores each, so both meet the same machine and their step
times can be compared. The numbers of the table are also in out_dir/summary.json.
"""
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))           # a script in a folder: the modules lie one above

from configurator import run
from model import pick_device
from train import TrainConfig


def main(cfg: TrainConfig):
    if not cfg.compare:
        raise ValueError("there is nothing to compare: the setting `compare` names the base's config file")
    began, out = time.perf_counter(), Path(cfg.out_dir)
    common = [f"--seed={cfg.seed}", f"--device={cfg.device}", "--compare=", "--overwrite"]
    start([[sys.executable, "train.py", cfg.compare, *common, f"--out_dir={out}/base"]])

    arm = [sys.executable, "train.py", *sys.argv[1:], *common, f"--init_from={out}/base"]
    start([[*arm, "--lambda_jepa=0", f"--out_dir={out}/plain"],
           [*arm, f"--lambda_jepa={cfg.lambda_jepa}", f"--out_dir={out}/jepa"]],
          side_by_side=pick_device(cfg.device).type == "cpu")

    for old in out.glob("*/eval_*"):
        old.unlink()
    start([[sys.executable, "evaluate.py", f"--init_from={out}/{name}", f"--task={cfg.task}",
            f"--data_dir={cfg.data_dir}", f"--device={cfg.device}"] for name in ("base", "plain", "jepa")],
          side_by_side=pick_device(cfg.device).type == "cpu")

    summary = summarize(out, cfg)
    summary["seconds"] = round(time.perf_counter() - began, 1)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    print_table(summary, cfg)


def start(commands: list[list[str]], side_by_side: bool = False):
    """Runs them, two at a time if side_by_side. Stops everything at the first that fails."""
    at_a_time = 2 if side_by_side else 1
    threads = str(max(1, (os.cpu_count() or 1) // at_a_time))
    for i in range(0, len(commands), at_a_time):
        running = [subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": threads,
                                                            "TQDM_POSITION": str(k)})
                   for k, command in enumerate(commands[i:i + at_a_time])]
        try:
            while any(process.poll() is None for process in running):
                failed = [process for process in running if process.poll()]
                if failed:
                    raise ValueError(f"`{' '.join(failed[0].args[1:])}` stopped with exit code "
                                     f"{failed[0].returncode}")
                time.sleep(0.1)
            for process in running:
                if process.returncode:
                    raise ValueError(f"`{' '.join(process.args[1:])}` stopped with exit code {process.returncode}")
        finally:
            for process in running:
                process.terminate()


def summarize(out: Path, cfg: TrainConfig) -> dict:
    """What the runs wrote: the last held-out losses of the arms, and for the base those of step 0."""
    logs = {name: [json.loads(line) for line in open(out / name / "log.jsonl")] for name in ("plain", "jepa")}
    arms = {}
    for name in ("base", "plain", "jepa"):
        scores = json.loads((out / name / f"eval_{cfg.task}_0shot.json").read_text())
        losses = [line["held_out"] for line in logs.get(name, logs["plain"]) if "held_out" in line]
        losses = losses[0] if name == "base" else losses[-1]
        log = [json.loads(line) for line in open(out / name / "log.jsonl")]
        arms[name] = {"accuracy": scores["accuracy"], "stderr": scores["stderr"], "n": scores["n"],
                      "held_out_loss": losses[cfg.task], "base_corpus_loss": losses.get(cfg.forget_task),
                      "seconds": max(line.get("seconds", 0) for line in log),
                      "ms_per_step": statistics.median(line["ms"] for line in log if "ms" in line)}
    return {"arms": arms, "step_time_ratio": arms["jepa"]["ms_per_step"] / arms["plain"]["ms_per_step"],
            "seed": cfg.seed, "lambda_jepa": cfg.lambda_jepa, "diffusion_t": cfg.diffusion_t}


def print_table(summary: dict, cfg: TrainConfig):
    arms = summary["arms"]
    mean = lambda losses: statistics.mean(losses.values())
    print(f"\n{'':6} {'accuracy %':>14} {'held-out loss at t = ' + ', '.join(arms['base']['held_out_loss']):>40} "
          f"{'base corpus':>12} {'seconds':>8} {'ms/step':>8}")
    for name, arm in arms.items():
        losses = "  ".join(f"{loss:.3f}" for loss in arm["held_out_loss"].values())
        print(f"{name:6} {100 * arm['accuracy']:8.1f} +- {100 * arm['stderr']:.1f} {losses:>40} "
              f"{mean(arm['base_corpus_loss']):12.3f} {arm['seconds']:8.0f} {arm['ms_per_step']:8.1f}")
    difference = arms["jepa"]["accuracy"] - arms["plain"]["accuracy"]
    print(f"\nn = {arms['jepa']['n']} held-out questions; one seed ({summary['seed']}); JEPA - plain = "
          f"{100 * difference:+.1f} points; step time JEPA / plain = {summary['step_time_ratio']:.2f}; "
          f"{summary['seconds']:.0f} s in all")


if __name__ == "__main__":
    run(main, TrainConfig, default="config/tiny.py")
