"""Quality of a recipe's networks, and the effect of sharpness-aware minimisation (SAM).

Networks differ in start and data order; the first of them are trained again with SAM, from the same starts in the same
order. Sharpness is the largest eigenvalue of the Hessian of the training loss at the last step.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raywgen.config import SHIPPED, load_config
from raywgen.corpus import Corpus
from raywgen.progress import Reporter
from raywgen.tasks import SAMConfig, build_network, build_task
from raywgen.tasks.sharpness import largest_eigenvalue
from raywgen.training.session import ray_session
from raywgen.zoo import ZooConfig, train_zoo
from raywgen.zoo.config import ZooOptimizer

_RECIPES = SHIPPED / "zoo"


@dataclass(kw_only=True)
class ZooQualityConfig:
    """The recipe to train, and how sharpness is measured.

    Attributes:
        recipe: A shipped recipe of `configs/zoo`.
        data: Training images, in place of the recipe's.
        test_data: Test images, likewise.
        num_networks: Number of networks, with different seeds.
        num_sam: Number of those that are also trained with SAM.
        rho: SAM's radius.
        num_steps: Optimiser steps; 0 for the recipe's.
        num_sharpness_samples: Training samples of the Hessian.
        num_iterations: Hessian-vector products.
        folder: Folder of the zoos, which are reused if they exist; a temporary one by default.
    """

    recipe: str = "tiny-mnist"
    data: str = ""
    test_data: str = ""
    num_networks: int = 100
    num_sam: int = 40
    rho: float = 0.05
    num_steps: int = 0
    num_sharpness_samples: int = 500
    num_iterations: int = 30
    folder: str = ""


def measure(config: ZooQualityConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains both zoos, then measures their last checkpoints."""
    folder = Path(config.folder or tempfile.mkdtemp(prefix="raywgen-zoo-"))
    base = _zoo(config)
    plain_zoo = replace(base, seeds_per_task=config.num_networks)
    sam = ZooOptimizer(learning_rate=base.learning_rate, sam=SAMConfig(rho=config.rho))
    sam_zoo = replace(base, seeds_per_task=config.num_sam, optimizers=[sam])
    executions: list[str] = []
    with ray_session():
        corpora = {}
        for name, zoo in (("plain", plain_zoo), ("sam", sam_zoo)):
            with Reporter().step(name, f"{zoo.seeds_per_task} networks by {config.recipe}") as bar:
                corpora[name] = train_zoo(zoo, str(folder / name), bar.update, executions.append)
        accuracy = {name: _accuracies(corpus) for name, corpus in corpora.items()}
        pairs = _sharpness(corpora, config)
    num_values = max(network.layout.num_values for network in corpora["plain"].networks.values())
    if not config.folder:
        shutil.rmtree(folder)
    paired = accuracy["plain"][: config.num_sam]
    gain = 100 * (accuracy["sam"] - paired)
    sharp = {name: np.array([pair[index] for pair in pairs]) for index, name in enumerate(("plain", "sam"))}
    figures = {
        "accuracy_mean": 100 * accuracy["plain"].mean(),
        "accuracy_std": 100 * accuracy["plain"].std(),
        "accuracy_plain_paired": 100 * paired.mean(),
        "accuracy_sam": 100 * accuracy["sam"].mean(),
        "accuracy_sam_gain": gain.mean(),
        "accuracy_sam_gain_standard_error": gain.std(ddof=1) / len(gain) ** 0.5,
        "eigenvalue_plain": sharp["plain"].mean(),
        "eigenvalue_sam": sharp["sam"].mean(),
        "eigenvalue_ratio": float(np.median(sharp["sam"] / sharp["plain"])),
    }
    conditions = {
        "recipe": config.recipe,
        "networks": len(accuracy["plain"]),
        "sam_networks": len(accuracy["sam"]),
        "diverged": {name: corpus.manifest["recipe"]["num_diverged"] for name, corpus in corpora.items()},
        "values": num_values,
        "num_steps": base.num_steps,
        "limit": base.tasks.limit,
        "rho": config.rho,
        "executions": executions,
        "eigenvalue_std": {name: round(float(values.std()), 3) for name, values in sharp.items()},
        "cores": os.cpu_count(),
    }
    return {name: round(float(value), 4) for name, value in figures.items()}, conditions


def _zoo(config: ZooQualityConfig) -> ZooConfig:
    given = {"tasks.path": config.data, "tasks.test_path": config.test_data}
    overrides = [f"{key}={value}" for key, value in given.items() if value]
    if config.num_steps:
        overrides += [f"num_steps={config.num_steps}", f"checkpoint_steps=[{config.num_steps}]"]
    zoo = load_config(ZooConfig, _RECIPES / f"{config.recipe}.yaml", overrides)
    # Only the last checkpoint of each network is kept, whatever the recipe keeps.
    return replace(zoo, checkpoint_steps=[zoo.num_steps], optimizers=[])


def _accuracies(corpus: Corpus) -> np.ndarray:
    """Returns the accuracy of every network, in the order of their numbers."""
    rows = [row for row in corpus.facts.to_pylist() if row["split"] != "base"]
    rows.sort(key=lambda row: int(row["trajectory_id"].rpartition("/")[2]))
    return np.array([row["test_accuracy"] for row in rows])


def _sharpness(corpora: dict[str, Corpus], config: ZooQualityConfig) -> list[tuple[float, float]]:
    """Returns the eigenvalues of each network trained plainly and with SAM, computed by Ray tasks."""
    import ray

    remote: Any = ray.remote(num_cpus=1)(_eigenvalues)
    work = {}
    for name, corpus in corpora.items():
        facts = corpus.facts.to_pylist()
        rows = [row for row in facts if int(row["trajectory_id"].rpartition("/")[2]) < config.num_sam]
        rows.sort(key=lambda row: int(row["trajectory_id"].rpartition("/")[2]))
        ids = [row["checkpoint_id"] for row in rows]
        halves = [ids[: len(ids) // 2], ids[len(ids) // 2 :]]
        work[name] = [remote.remote(corpus.storage.root, half, config) for half in halves]
    values = {name: [value for part in ray.get(parts) for value in part] for name, parts in work.items()}
    return list(zip(values["plain"], values["sam"], strict=True))


def _eigenvalues(location: str, checkpoint_ids: list[str], config: ZooQualityConfig) -> list[float]:
    torch.set_num_threads(1)
    corpus = Corpus.open(location)
    values = []
    for checkpoint_id in checkpoint_ids:
        row = corpus.select(checkpoint_id=checkpoint_id).to_pylist()[0]
        module = build_network(corpus.networks[row["layout_id"]].recipe).eval()
        module.load_state_dict(corpus.state_dict(checkpoint_id))
        task = build_task(corpus.tasks[row["task_id"]].recipe)
        chosen = slice(0, config.num_sharpness_samples)
        inputs, labels = task.train_inputs[chosen], task.train_y_S[chosen]
        values.append(largest_eigenvalue(module, inputs, labels, num_iterations=config.num_iterations))
    return values
