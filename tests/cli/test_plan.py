"""The command `raywgen plan`: a table for people, JSON for programs, and a status that says whether the run fits."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from raywgen.cli import app
from raywgen.training.strategy import DoesNotFitError

RUN = ["plan", "direct", "layout=[64, 20, 2]", "num_features=64", "num_networks=100", "num_workers=2", "device=cpu"]
RUN += ["generator.network={kind: chunks, window: 4, width: 32}", "generator.task_loss.num_steps=0"]
NODES = ["nodes=2", "cpus=4", "memory=8GiB"]

pytestmark = pytest.mark.usefixtures("one_thread")


def said(*arguments: str) -> tuple[str, Any]:
    done = CliRunner().invoke(app, [*RUN, *arguments], terminal_width=200)
    return done.output, done.exception


def test_people_see_what_the_run_takes_and_what_is_assumed() -> None:
    output, error = said(
        *NODES, "seconds_per_step=3.6", "price_per_node_hour=10", "generator.regression.num_steps=1000"
    )
    assert error is None
    for text in (
        "regression",
        "optimiser state, GiB",
        "zero_stage=1",
        "100 networks",
        "nodes: 2 nodes of 4 CPU, 8 GiB each given by hand",
        "time: 1 hours, 1 node hours, price 10.00, from steps as given",
        "assumed: Samples of tasks have 64 values",
    ):
        assert text in output, text


def test_networks_that_are_written_as_tokens_have_a_table_of_what_each_number_of_levels_keeps() -> None:
    sizes = ["generator.prior={width: 16, num_layers: 1, num_heads: 2}", "generator.task_loss.num_steps=0"]
    run = ["plan", "igpg", "layout=[64, 20, 2]", "num_features=64", "num_workers=0", "device=cpu", *sizes, *NODES]
    done = CliRunner().invoke(app, run, terminal_width=200)
    assert done.exception is None
    assert "8, as set" in done.output
    assert "as tokens: what published ones keep" in done.output
    assert "Memory to write it, by pieces on a CPU: about 0." in done.output
    assert "as tokens" not in said(*NODES)[0]


def test_programs_get_one_object_with_every_figure() -> None:
    output, error = said(*NODES, "--json")
    assert error is None
    found = json.loads(output)
    assert found["fits"]
    (stage,) = found["stages"]
    assert stage["bytes"]["host"] > stage["bytes"]["process"] > 0
    assert stage["strategy"]["zero_stage"] == 1
    assert found["corpus"]["bytes"] == 100 * 4 * found["corpus"]["values_of_largest"]


def test_what_cannot_be_trained_is_an_error_after_the_table() -> None:
    output, error = said("nodes=1", "cpus=4", "memory=600MiB")
    assert "fits" in output
    assert isinstance(error, DoesNotFitError)
    assert str(error).startswith("stage 'regression' takes ")
    output, error = said("nodes=1", "cpus=2", "memory=8GiB", "--json")
    assert json.loads(output)["refusals"] == [str(error)]
    assert "num_workers=2 is more than the CPUs" in str(error)


def test_help_teaches_what_a_plan_is_made_from() -> None:
    short, whole = (CliRunner().invoke(app, ["plan", flag], terminal_width=200) for flag in ("--help", "--help-all"))
    for text in ("gpu_memory", "price_per_node_hour", "measure=true", "layout=vit-l"):
        assert text in short.output, text
        assert text in whole.output, text
    assert "nearest settings that fit" in whole.output
