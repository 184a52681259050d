"""The whole path on real data: digits -> zoo -> corpus -> generators -> new networks -> score -> report."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from raywgen.config import ConfigError, save_config, to_yaml
from raywgen.evaluation.config import EvaluateConfig
from raywgen.evaluation.evaluate import evaluate
from raywgen.evaluation.report import write_report
from raywgen.evaluation.results import EVALUATION, Evaluation
from raywgen.files import write_text
from raywgen.generation import GenerateConfig, generate
from raywgen.generators.hypernetwork import HypernetworkConfig
from raywgen.generators.igpg import IGPGConfig
from raywgen.out_folder import local_out
from raywgen.progress import Reporter
from raywgen.stops import keeping
from raywgen.training import TrainConfig, launch
from raywgen.training.session import ray_session
from raywgen.zoo import ZooConfig, train_zoo

RUN = "run.json"
_SECONDS_PER_MINUTE = 60.0


@dataclass(kw_only=True)
class DemoConfig:
    """All settings of the demo.

    Attributes:
        out: Run folder.
        zoo: Tasks and networks.
        igpg: The generator; `igpg.task_loss.num_steps=0` switches its last stage off.
        hypernetwork: The baseline trained beside it.
        num_workers: Ray Train workers; 0 trains in this process.
        zero_stage: DeepSpeed ZeRO stage.
        best_of: Candidates per network, for the generator and every baseline.
        temperature: Sampling temperature of generation.
        seed: Seed of everything.
    """

    out: str = "runs/demo"
    zoo: ZooConfig = field(default_factory=ZooConfig)
    igpg: IGPGConfig = field(default_factory=IGPGConfig)
    hypernetwork: HypernetworkConfig = field(default_factory=HypernetworkConfig)
    num_workers: int = 2
    zero_stage: int = 1
    best_of: int = 8
    temperature: float = 0.5
    seed: int = 0


def run_demo(config: DemoConfig, reporter: Reporter) -> Evaluation:
    """Runs every step that is not done yet and returns the evaluation.

    Raises:
        OutError: `out` is empty, a URI, or a folder that nobody meant.
        ConfigError: The folder holds a demo with another config.
    """
    out = Path(local_out(config.out, DemoConfig.out, "raywgen demo"))
    with keeping(f"{out} keeps all steps that are done; the same command goes on with the others"):
        return _run(config, reporter, out)


def _run(config: DemoConfig, reporter: Reporter, out: Path) -> Evaluation:
    begin = time.monotonic()
    paths = _paths(out)
    _claim(out, config)
    config.zoo.seed = config.seed
    with ray_session():
        with reporter.step("zoo", "train networks on real digits") as bar:
            train_zoo(config.zoo, paths["corpus"], bar.update)
        with reporter.step("train", "tokeniser, prior, task-loss stage, hypernetwork") as bar:
            launch(_trainings(config, paths), bar.training)
    with reporter.step("generate", "write networks for unseen tasks") as bar:
        generate(
            GenerateConfig(
                generator=paths["igpg"],
                corpus=paths["corpus"],
                out=paths["networks"],
                best_of=config.best_of,
                temperature=config.temperature,
                seed=config.seed,
            ),
            bar.update,
        )
    with reporter.step("evaluate", "ladder, baselines, novelty") as bar:
        result = evaluate(
            EvaluateConfig(
                generator=paths["igpg"],
                hypernetwork=paths["hypernetwork"],
                corpus=paths["corpus"],
                out=paths["evaluation"],
                best_of=config.best_of,
                temperature=config.temperature,
                seed=config.seed,
            ),
            bar.named,
        )
    result = replace(
        result,
        minutes=round((time.monotonic() - begin) / _SECONDS_PER_MINUTE, 2),
        paths={name: str(Path(path).relative_to(out)) for name, path in paths.items()},
    )
    write_text(Path(paths["evaluation"]) / EVALUATION, json.dumps(result.to_json(), indent=1))
    with reporter.step("report", "draw the report"):
        write_report(out)
    write_text(out / RUN, json.dumps(result.paths, indent=1))
    return result


def _paths(out: Path) -> dict[str, str]:
    names = ("corpus", "igpg", "hypernetwork", "networks", "evaluation")
    return {name: str(out / name) for name in names} | {"report": str(out / "report.html")}


def _claim(out: Path, config: DemoConfig) -> None:
    kept = out / "config.yaml"
    if kept.is_file() and kept.read_text() != to_yaml(config):
        raise ConfigError(
            f"{out} holds a demo with another config ({kept}); give another out=..., or delete the folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    save_config(config, kept)


def _trainings(config: DemoConfig, paths: dict[str, str]) -> list[TrainConfig]:
    generators = {"igpg": config.igpg, "hypernetwork": config.hypernetwork}
    return [
        TrainConfig(
            method=name,
            generator=generator,
            corpus=paths["corpus"],
            out=paths[name],
            num_workers=config.num_workers,
            zero_stage=config.zero_stage,
            seed=config.seed,
        )
        for name, generator in generators.items()
    ]
