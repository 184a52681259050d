"""Settings of commands and methods as `--help` shows them, read from a file, since their classes import torch.

`python -m raywgen.cli.write_settings` writes the file anew; a test compares it with the classes.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from raywgen.config_help import Setting

PATH = Path(__file__).with_name("known_settings.json")
SCHEMAS = {
    "export": "raywgen.training.export_run:ExportConfig",
    "demo": "raywgen.benchmarks.demo:DemoConfig",
    "zoo train": "raywgen.zoo:ZooConfig",
    "corpus encode": "raywgen.training.encode_corpus:EncodeConfig",
    "encoder train": "raywgen.tasks.encoder_training:EncoderConfig",
    "train": "raywgen.training:TrainConfig",
    "plan": "raywgen.training.plan:PlanConfig",
    "generate": "raywgen.generation:GenerateConfig",
    "adapt": "raywgen.generation:AdaptConfig",
    "statistics": "raywgen.generation.file_statistics:StatisticsConfig",
    "evaluate": "raywgen.evaluation.config:EvaluateConfig",
    "retrieve": "raywgen.evaluation.retrieve:RetrieveConfig",
    "select": "raywgen.evaluation.select:SelectConfig",
    "finetune": "raywgen.evaluation.finetune:FinetuneConfig",
    "cluster render": "raywgen.cluster.settings:RenderConfig",
    "tune": "raywgen.tuning:TuneConfig",
}
"""The class of each command's settings."""


def settings_of_command(path: str) -> list[Setting]:
    """Returns the settings of a command, such as `zoo train`; those of a method come in addition."""
    return [Setting(*row) for row in _stored()["commands"][path]]


def settings_of_method(name: str) -> list[Setting]:
    """Returns the settings of a shipped method, under `generator.`."""
    return [Setting(*row) for row in _stored()["methods"][name]]


@cache
def _stored() -> dict[str, dict[str, list[list[str]]]]:
    return json.loads(PATH.read_text("utf-8"))
