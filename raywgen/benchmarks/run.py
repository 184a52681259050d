"""Benchmarks by name: a table for people, and as the last line one JSON object for machines."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any, get_type_hints

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raywgen.benchmarks import record
from raywgen.config import given_once, load_config
from raywgen.config_help import describe
from raywgen.names import nearest
from raywgen.trust import named_in, trusting

BENCHMARKS = {
    "demo": "raywgen.benchmarks.demo_figures",
    "corpus-ingest": "raywgen.benchmarks.corpus_ingest",
    "corpus-stream": "raywgen.benchmarks.corpus_stream",
    "zoo-fit": "raywgen.benchmarks.zoo_fit",
    "zoo-quality": "raywgen.benchmarks.zoo_quality",
    "few-shot": "raywgen.benchmarks.few_shot",
    "transfer": "raywgen.benchmarks.transfer",
    "domains": "raywgen.benchmarks.domains",
    "whole-network": "raywgen.benchmarks.whole_network",
    "mcdi-ablation": "raywgen.benchmarks.mcdi_ablation",
    "lohp-ablation": "raywgen.benchmarks.lohp_ablation",
    "lohp-horizon": "raywgen.benchmarks.lohp_horizon",
    "igpg-tasks": "raywgen.benchmarks.igpg_tasks",
    "igpg-zoo": "raywgen.benchmarks.igpg_zoo",
    "igpg-windows": "raywgen.benchmarks.igpg_windows",
    "igpg-depths": "raywgen.benchmarks.igpg_depths",
    "igpg-pretrained": "raywgen.benchmarks.igpg_pretrained",
    "unseen-architectures": "raywgen.benchmarks.unseen_architectures",
    "ambiguous-tasks": "raywgen.benchmarks.ambiguous_tasks",
    "quality": "raywgen.benchmarks.quality",
    "batch-statistics": "raywgen.benchmarks.batch_statistics",
    "sentence-encoder": "raywgen.benchmarks.sentence_encoder",
    "lora": "raywgen.benchmarks.lora",
    "lora-causal": "raywgen.benchmarks.lora_causal",
    "strategy-parity": "raywgen.benchmarks.strategy_parity",
    "train-memory": "raywgen.benchmarks.train_memory",
    "train-overhead": "raywgen.benchmarks.train_overhead",
    "checkpoint-costs": "raywgen.benchmarks.checkpoint_costs",
    "decode": "raywgen.benchmarks.decode",
    "tokenizer": "raywgen.benchmarks.tokenizer",
    "scale": "raywgen.benchmarks.scale",
    "chaos": "raywgen.benchmarks.chaos",
    "cuda-check": "raywgen.benchmarks.cuda_check",
    "plan": "raywgen.benchmarks.plan",
    "tune": "raywgen.benchmarks.tune",
    "first-hour": "raywgen.benchmarks.first_hour",
}


Measure = Callable[[Any], tuple[dict[str, float], dict[str, Any]]]
"""`measure(config)` of a benchmark's module: figures by name, and the conditions under which they were taken.

The annotation of `config` names the benchmark's own dataclass of settings.
"""


class UnknownBenchmarkError(ValueError):
    """No benchmark has that name."""


def run(arguments: list[str]) -> dict[str, Any]:
    """Measures and returns what the last line holds.

    Raises:
        UnknownBenchmarkError: There is no such benchmark; the nearest is named.
        ConfigError: A setting is unknown or wrong.
        OutError: `out` is a URI, or a folder that nobody meant.
    """
    name = arguments[0] if arguments else ""
    measure = _measure(name)
    config = load_config(get_type_hints(measure)["config"], None, arguments[1:])
    if out := getattr(config, "out", ""):
        # Imported late: some benchmarks run where little is installed.
        from raywgen.out_folder import local_out

        local_out(out, f"runs/benchmarks/{name}", f"benchmark {name}")
    with trusting(*named_in(config)):
        figures, conditions = measure(config)
    return {"benchmark": name, "figures": figures, "conditions": conditions}


def _measure(name: str) -> Measure:
    if name not in BENCHMARKS:
        near = nearest(name, BENCHMARKS)
        raise UnknownBenchmarkError(
            f"unknown benchmark '{name}'; did you mean '{near}'? (known: {', '.join(BENCHMARKS)})"
        )
    return importlib.import_module(BENCHMARKS[name]).measure


def settings_table(name: str) -> Table:
    """Lists the settings of a benchmark, with their defaults.

    Raises:
        UnknownBenchmarkError: There is no such benchmark; the nearest is named.
    """
    table = Table("setting", "default", "meaning", title=f"benchmark {name}")
    for setting in describe(get_type_hints(_measure(name))["config"]):
        table.add_row(*(escape(text) for text in (setting.key, setting.default, setting.help)))
    table.add_row(record.SETTING, "", record.HELP)
    return table


def main() -> None:
    """Entry point of `jobs/benchmark.py`."""
    arguments = sys.argv[1:]
    try:
        if "--help" in arguments[:1]:
            print(f"python jobs/benchmark.py NAME [--help] [key=value ...]; NAME is one of {', '.join(BENCHMARKS)}")
            return
        if "--help" in arguments:
            Console().print(settings_table(arguments[0]))
            return
        settings, path = record.split_record(given_once(arguments))
        file = record.record_file(path, settings[0]) if path and settings else None
        code = "" if file is None else record.commit(file.parent)
        result = run(settings)
        if file is not None:
            record.write_record(result, settings, file, code)
    except (ValueError, KeyError) as error:
        Console(stderr=True, emoji=False).print(
            f"[bold red]error:[/bold red] {escape(str(error.args[0]))}", highlight=False, soft_wrap=True
        )
        sys.exit(1)
    table = Table("figure", "value", title=f"benchmark {result['benchmark']}")
    for name, value in result["figures"].items():
        table.add_row(name, f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}")
    Console().print(table)
    print(json.dumps(result))
