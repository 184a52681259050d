"""Steps of one run are one trajectory, and networks of different runs are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from raywgen.cli import app
from raywgen.corpus import Corpus
from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.corpus.derive import split
from raywgen.corpus.runs import join_runs
from raywgen.corpus.sources import SourceCheckpoint

PDIFF = [f"checkpoint/{step:04d}_acc0.9{step}40_seed{run:04d}_cifar10" for run in range(2) for step in range(3)]


def build(tmp_path: Path, names: list[str], facts: str = "") -> Corpus:
    for index, name in enumerate(names):
        path = tmp_path / "nets" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"w": torch.full((2, 2), float(index))}, path)
    (tmp_path / "facts.csv").write_text(facts)
    return build_corpus(
        BuildConfig(
            out=str(tmp_path / "c"),
            sources=[str(tmp_path / "nets")],
            facts=str(tmp_path / "facts.csv") if facts else "",
            distributed=False,
        )
    )


def runs(corpus: Corpus) -> dict[str, tuple[str, int]]:
    return {row["checkpoint_id"]: (row["trajectory_id"], row["step"]) for row in corpus.facts.to_pylist()}


@pytest.mark.parametrize(
    ("expected"),
    [
        {name: (f"checkpoint/{name[-16:]}", int(name[11:15])) for name in PDIFF},
        {
            "a/checkpoint-500/model": ("a", 500),
            "a/checkpoint-1000/model": ("a", 1000),
            "a/model": ("a", -1),
            "b/checkpoint-500/model": ("b", 500),
            "b/checkpoint-900/model": ("b", 900),
            "b/checkpoint-best/model": ("b", -1),
        },
        {
            "version_0/checkpoints/epoch=3-step=900": ("version_0/checkpoints", 900),
            "version_0/checkpoints/epoch=4-step=1200": ("version_0/checkpoints", 1200),
            "version_0/checkpoints/epoch=4-step=1200-v1": ("version_0/checkpoints", 1200),
            "version_0/checkpoints/epoch=9-val_loss=0.25": ("version_0/checkpoints", 9),
            "version_0/checkpoints/last": ("version_0/checkpoints", -1),
        },
        {"v0/epoch=3-step=900": ("v0", 900), "v0/last": ("v0", -1), "v1/resnet-epoch9": ("v1/resnet-epoch9", 0)},
        {"timm/checkpoint-9": ("timm", 9), "timm/model_best": ("timm", -1), "other_best": ("other_best", 0)},
        {"vgg_epoch9": ("vgg_epoch9", 0), "resnet_best": ("resnet_best", 0)},
        {"step_1000": ("nets", 1000), "step_2000": ("nets", 2000), "model_final": ("nets", -1), "best": ("nets", -1)},
        {
            "run1/epoch_0": ("run1", 0),
            "run1/epoch_1": ("run1", 1),
            "run2/epoch_0": ("run2", 0),
            "run2/ep1": ("run2", 1),
        },
        {
            "resnet_seed0_epoch1": ("resnet_seed0", 1),
            "resnet_seed0_epoch2": ("resnet_seed0", 2),
            "resnet_seed1_epoch1": ("resnet_seed1", 1),
            "resnet_seed1_epoch2": ("resnet_seed1", 2),
            "resnet_seed1_best": ("resnet_seed1", -1),
            "best": ("best", 0),
        },
        {"G_epoch_1": ("G", 1), "G_epoch_2": ("G", 2), "D_epoch_1": ("D", 1), "D_epoch_2": ("D", 2)},
        {
            "lm/step100k-unsharded/model": ("lm/unsharded", 100_000),
            "lm/step200k-unsharded/model": ("lm/unsharded", 200_000),
        },
        {"checkpoint_1_500": ("nets", 500), "checkpoint_2_1000": ("nets", 1000), "checkpoint_best": ("nets", -1)},
        {"epoch_3_0.91": ("nets", 3), "epoch_4_0.93": ("nets", 4)},
        {"seed0/0000": ("seed0", 0), "seed0/0001": ("seed0", 1), "seed1/0000": ("seed1/0000", 0)},
    ],
)
def test_steps_of_a_run_are_one_trajectory(tmp_path: Path, expected: dict[str, tuple[str, int]]) -> None:
    assert runs(build(tmp_path, list(expected))) == expected


@pytest.mark.parametrize(
    "names",
    [
        [f"seed{seed}" for seed in range(4)],
        [f"net{index}" for index in range(5)],
        [f"{index}" for index in range(5)],
        [f"fold1/{index}" for index in range(3)],
        ["a_seed0_epoch90", "a_seed1_epoch90"],
        ["epoch_90_acc0.93", "epoch_90_acc0.95"],
        ["mlp_max_steps=10", "mlp_max_steps=20"],
        ["v1/model", "v2/model", "resnet18", "resnet34", "lr0.1", "lr0.01", "width64", "width128"],
        ["best", "last", "a/best", "b/best"],
        ["20240101_seed1", "20240102_seed1", "2024-01-01_seed1", "2025-01-02_seed1"],
    ],
)
def test_networks_that_are_no_steps_stay_apart(tmp_path: Path, names: list[str]) -> None:
    assert runs(build(tmp_path, names)) == {name: (name, 0) for name in names}


def test_one_name_in_two_sources_is_two_runs(tmp_path: Path) -> None:
    for source in ("a", "b"):
        for step in (1, 2):
            path = tmp_path / source / f"{source}{step}" / f"epoch_{step}.safetensors"
            path.parent.mkdir(parents=True)
            save_file({"w": torch.randn(2, 2)}, path)
    sources = [str(path) for path in sorted(tmp_path.glob("*/*/*"))]
    corpus = build_corpus(BuildConfig(out=str(tmp_path / "c"), sources=sources[:1] + sources[3:], distributed=False))
    assert sorted(name for name, _ in runs(corpus).values()) == ["epoch_1", "epoch_2"]


def test_the_users_facts_overrule_names(tmp_path: Path) -> None:
    names = ["epoch_1", "epoch_2", "epoch_3", "net0", "net1"]
    facts = "path,trajectory_id,step\nepoch_2,mine,20\nnet0,nets,1\nnet1,nets,\n"
    assert runs(build(tmp_path, names, facts)) == {
        "epoch_1": ("mine", 1),
        "epoch_2": ("mine", 20),
        "epoch_3": ("mine", 3),
        "net0": ("nets", 1),
        "net1": ("nets", 0),
    }


def test_a_split_never_parts_a_run_and_info_shows_runs(tmp_path: Path) -> None:
    names = [f"run{run}/{name}" for run in range(6) for name in ("step_10", "step_20", "step_30", "model_best")]
    corpus = build(tmp_path, names)
    assert corpus.info()["steps_of_trajectories"] == {f"run{run}": 4 for run in range(6)}
    rows = split(str(tmp_path / "s"), corpus, heldout=0.5).facts.to_pylist()
    sides = {(row["checkpoint_id"].split("/")[0], row["split"]) for row in rows}
    assert len(sides) == 6
    assert {side for _, side in sides} == {"train", "heldout"}


def test_windows_leave_out_what_has_no_known_step(tmp_path: Path) -> None:
    corpus = build(tmp_path, ["step_0", "step_10", "step_20", "best"])
    assert next(iter(corpus.windows(batch_size=1))).step_BA.tolist() == [[0, 10, 20]]


def test_a_split_of_single_checkpoints_says_so(tmp_path: Path) -> None:
    corpus = build(tmp_path, ["net0", "net1", "net2"])
    command = ["corpus", "split", corpus.location, str(tmp_path / "s"), "--heldout", "0.4"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert "each checkpoint counts as a run of its own" in result.stdout


def test_steps_in_an_object_store_with_an_endpoint_are_one_run() -> None:
    query = "endpoint_override=http://127.0.0.1:9000"
    steps = [
        SourceCheckpoint(name=f"run/step={step}", files=(f"s3://b/nets/run/step={step}.pt?{query}",), num_bytes=1)
        for step in (1, 2)
    ]
    found = [(one.facts.get("trajectory_id"), one.facts.get("step")) for one in join_runs(steps)]
    assert found == [("run", 1), ("run", 2)]
