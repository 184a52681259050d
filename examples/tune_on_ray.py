"""Shows how settings are searched by Ray Tune: which learning rate and which width suit a generator.

The generator is a hypernetwork on a small zoo of scikit-learn's digits. Trials are judged on validation tasks, weak
ones are stopped early, and the best is trained to the end afterwards. It uses the Ray cluster that `RAY_ADDRESS` names,
or starts one on this machine. It needs no download. It takes minutes on two cores.

    python examples/tune_on_ray.py
"""

from __future__ import annotations

from typing import Any

import raywgen
from raywgen.tuning import TuneResult

SPACE: dict[str, Any] = {
    "train.generator.task_loss.optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "train.generator.width": {"choice": [32, 64, 128]},
}
FIXED: dict[str, Any] = {
    "zoo.networks": [[64, 14, 2]],
    "zoo.num_seen_tasks": 60,
    "zoo.num_validation_tasks": 8,
    "zoo.num_unseen_tasks": 2,
    "zoo.seeds_per_task": 1,
    "zoo.num_steps": 240,
    "zoo.checkpoint_steps": [240],
    "train.num_workers": 0,  # A trial trains in one process; Ray Tune runs several trials at once.
    "train.generator.task_loss.num_steps": 200,
}


def main(out: str = "runs/tune-on-ray", num_trials: int = 8, fixed: dict[str, Any] | None = None) -> TuneResult:
    """Searches, trains the best to its end, and returns the table of trials."""
    fixed = FIXED | (fixed or {})
    result = raywgen.tune(zoo="digits", train="hypernetwork", fixed=fixed, space=SPACE, num_trials=num_trials, out=out)
    print(f"best: trial {result.best.trial}, {result.best.knobs}; all trials: {out}/report.html")
    raywgen.train(f"{out}/best.yaml")
    print(f"{out}/best/generator holds the generator of the best trial")
    return result


if __name__ == "__main__":
    main()
