from __future__ import annotations

import fnmatch
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from raywgen.corpus import Corpus, CorpusError
from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.corpus.source_tree import glob_regex
from raywgen.corpus.sources import find_checkpoints
from raywgen.weights import StateDict
from tests.corpus.builders import assert_same_bits, network

REAL = Path(__file__).parents[2] / "../shared/data/pretrained"


def save(path: Path, seed: int = 0) -> StateDict:
    state = network(3, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return state


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def names(*sources: Path | str) -> list[str]:
    return [checkpoint.name for checkpoint in find_checkpoints([str(source) for source in sources]).checkpoints]


def build(tmp_path: Path, *sources: Path | str) -> Corpus:
    listed = [str(source) for source in sources]
    return build_corpus(BuildConfig(out=str(tmp_path / "corpus"), sources=listed, distributed=False))


def same(left: StateDict, right: StateDict) -> None:
    assert_same_bits(dict(sorted(left.items())), dict(sorted(right.items())))


def test_a_folder_gives_every_weights_file_below_it_by_its_path(tmp_path: Path) -> None:
    root = tmp_path / "nets"
    files = ["a.pt", "deep/er/b.safetensors", "deep/c.v1.pth", "deep/d.bin", "deep/e.th"]
    states = {name.rpartition(".")[0]: save(root / name, seed) for seed, name in enumerate(files)}
    save(root / ".cache/hidden.pt")
    (root / "deep/notes.txt").write_text("no weights")
    corpus = build(tmp_path, root)
    assert corpus.facts.column("checkpoint_id").to_pylist() == sorted(states)
    for name, state in states.items():
        same(corpus.state_dict(name), state)
    found = {c.name: c for c in find_checkpoints([str(root)]).checkpoints}
    assert found["a"].files == (str(root / "a.pt"),)
    assert found["a"].num_bytes == (root / "a.pt").stat().st_size


def test_a_glob_names_by_what_follows_its_fixed_part(tmp_path: Path) -> None:
    for name in ("x/one.pt", "x/sub/two.pt", "y/three.safetensors", "y/four.txt"):
        save(tmp_path / "nets" / name)
    assert names(tmp_path / "nets/*/*.pt") == ["x/one"]
    assert names(f"{tmp_path}/nets/**/*.pt") == ["x/one", "x/sub/two"]
    assert names(tmp_path / "nets/y/*") == ["three"]


def test_a_single_file_is_called_by_its_stem(tmp_path: Path) -> None:
    save(tmp_path / "my.net.pt")
    assert names(tmp_path / "my.net.pt") == ["my.net"]


def test_two_suffixes_tell_files_of_one_stem_apart(tmp_path: Path) -> None:
    states = {name: save(tmp_path / "nets" / name, seed) for seed, name in enumerate(["a.pt", "a.safetensors"])}
    save(tmp_path / "nets/b.pt", 5)
    corpus = build(tmp_path, tmp_path / "nets")
    assert sorted(corpus.facts.column("checkpoint_id").to_pylist()) == ["a.pt", "a.safetensors", "b"]
    for name, state in states.items():
        same(corpus.state_dict(name), state)


def shard_up(folder: Path) -> StateDict:
    parts = {
        "model-00001-of-00002.safetensors": {"emb.weight": torch.randn(7, 3), "count": torch.tensor(4)},
        "model-00002-of-00002.safetensors": {"head.weight": torch.randn(2, 3).bfloat16()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        save_file(part, folder / name)
    weight_map = {key: name for name, part in parts.items() for key in part}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return {key: tensor for part in parts.values() for key, tensor in part.items()}


def test_a_sharded_checkpoint_is_one_checkpoint(tmp_path: Path) -> None:
    whole = shard_up(tmp_path / "hub/big")
    (checkpoint,) = find_checkpoints([str(tmp_path / "hub")]).checkpoints
    assert (checkpoint.name, len(checkpoint.files)) == ("big/model", 2)
    assert checkpoint.num_bytes == sum(Path(file).stat().st_size for file in checkpoint.files)
    same(build(tmp_path, tmp_path / "hub").state_dict("big/model"), whole)


def test_a_missing_shard_of_an_index_is_named(tmp_path: Path) -> None:
    shard_up(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    (row,) = find_checkpoints([str(tmp_path)]).aside
    assert row.checkpoint_id == "model"
    assert re.search(r"model-00002-of-00002\.safetensors is missing.*index\.json.*fetch it again", row.reason)


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"weight_map": {}},
        {"weight_map": 3},
        {"weight_map": {"a": "../a.safetensors"}},
        {"weight_map": {"a": 1}},
    ],
)
def test_an_index_that_is_none_is_named(tmp_path: Path, content: object) -> None:
    write_json(tmp_path / "model.safetensors.index.json", content)
    (row,) = find_checkpoints([str(tmp_path)]).aside
    assert re.search(r"model\.safetensors\.index\.json is no index.*fetch it again", row.reason)


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        ({"architectures": ["BertModel"], "model_type": "bert"}, "BertModel"),
        ({"model_type": "bert"}, "bert"),
        ({"architectures": "BertModel", "model_type": "bert"}, "bert"),
        ({"hidden_size": 3}, None),
        (["no", "object"], None),
    ],
)
def test_a_model_folder_tells_its_architecture(tmp_path: Path, config: object, architecture: str | None) -> None:
    save(tmp_path / "bert/model.safetensors")
    write_json(tmp_path / "bert/config.json", config)
    (checkpoint,) = find_checkpoints([str(tmp_path / "bert")]).checkpoints
    assert checkpoint.name == "model"
    assert checkpoint.facts.get("architecture") == architecture


def test_a_damaged_config_is_as_none(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(b"\xff{")
    assert find_checkpoints([str(tmp_path)]).checkpoints[0].facts == {}


def test_an_adapter_folder_tells_its_base(tmp_path: Path) -> None:
    save(tmp_path / "lora/adapter_model.safetensors")
    write_json(tmp_path / "lora/adapter_config.json", {"base_model_name_or_path": "org/base", "r": 8})
    corpus = build(tmp_path, tmp_path / "lora")
    (row,) = corpus.facts.to_pylist()
    assert (row["checkpoint_id"], row["architecture"]) == ("adapter_model", "lora:org/base")


def make_run(run: Path, params: dict[str, object]) -> None:
    write_json(run / "params.json", params)
    for step in (0, 10):
        file = run / f"checkpoint_{step:06d}" / "checkpoints"
        file.parent.mkdir(parents=True)
        torch.save(network(3, step), file)
    rows = [{"training_iteration": 0, "test_acc": 0.1}, {"training_iteration": 10, "test_acc": 0.75, "train_loss": 0.5}]
    (run / "result.json").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"training_iteration": 11, "te')


PARAMS = {"model::type": "CNN", "optim::optimizer": "sgd", "optim::lr": "0.03", "seed": 7, "other": "x"}


def test_a_zoo_of_runs_has_trajectory_step_accuracy_and_hyperparameters(tmp_path: Path) -> None:
    make_run(tmp_path / "zoo/NN_tune_1_lr=0.1", PARAMS)
    zero, ten = sorted(find_checkpoints([str(tmp_path / "zoo")]).checkpoints, key=lambda checkpoint: checkpoint.name)
    expected = {"architecture": "CNN", "optimizer": "sgd", "learning_rate": 0.03, "start_seed": 7}
    expected |= {"trajectory_id": "NN_tune_1_lr=0.1"}
    assert zero.facts == expected | {"step": 0, "test_accuracy": 0.1}
    assert ten.facts == expected | {"step": 10, "test_accuracy": 0.75, "train_loss": 0.5}
    assert [zero.name, ten.name] == ["NN_tune_1_lr=0.1/step-0", "NN_tune_1_lr=0.1/step-10"]


def test_hyperparameters_of_another_type_are_left_out(tmp_path: Path) -> None:
    make_run(tmp_path / "zoo/run", {"optim::lr": "cosine", "seed": None, "model::type": "CNN"})
    for checkpoint in find_checkpoints([str(tmp_path / "zoo")]).checkpoints:
        assert checkpoint.facts["architecture"] == "CNN"
        assert not {"learning_rate", "start_seed"} & set(checkpoint.facts)


def test_a_zoo_of_runs_comes_back_bit_for_bit(tmp_path: Path) -> None:
    make_run(tmp_path / "zoo/run", PARAMS)
    corpus = build(tmp_path, tmp_path / "zoo")
    for step in (0, 10):
        assert_same_bits(corpus.state_dict(f"run/step-{step}"), network(3, step))
    (trajectory,) = corpus.trajectories()
    assert trajectory[0] == "run"
    assert trajectory[1].column("step").to_pylist() == [0, 10]


@pytest.mark.parametrize("pattern", ["", "/*.pt"])
def test_a_source_without_checkpoints_is_refused(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "README.md").write_text("empty")
    with pytest.raises(CorpusError, match=r"holds no checkpoint; .*give a folder, file or glob of \.safetensors"):
        find_checkpoints([f"{tmp_path}{pattern}"])


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "net.pt")
    with pytest.raises(CorpusError, match=r"nets/none does not exist; give a folder, file, glob or hub name"):
        find_checkpoints([str(tmp_path), str(tmp_path / "nets/none")])


def test_no_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="give at least one source"):
        build(tmp_path)


def test_two_checkpoints_of_one_name_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a/net.pt")
    save(tmp_path / "b/net.pt")
    with pytest.raises(CorpusError, match=r"called 'net\.pt' .*a/net\.pt and .*b/net\.pt.*one folder that holds both"):
        find_checkpoints([str(tmp_path / "a"), str(tmp_path / "b")])
    assert names(tmp_path) == ["a/net", "b/net"]


@pytest.mark.skipif(importlib.util.find_spec("huggingface_hub") is not None, reason="huggingface_hub is installed")
def test_a_hub_name_without_its_client_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CorpusError, match=r"org/model is no file or folder.*huggingface_hub; install it by `pip install 'raywgen\[hub"
    ):
        find_checkpoints(["org/model"])


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data/pretrained holds the real networks, and is not here")
def test_real_pretrained_networks_come_back_bit_for_bit(tmp_path: Path) -> None:
    corpus = build(tmp_path, REAL)
    assert corpus.facts.num_rows == len(list(REAL.glob("*.safetensors"))) >= 3
    for facts, state in corpus.checkpoints():
        same(state, load_file(REAL / f"{facts['checkpoint_id']}.safetensors"))


def test_a_corpus_is_a_source(tmp_path: Path, zoo_corpus: Corpus) -> None:
    (tmp_path / "nets").mkdir()
    save_file({"module.w": torch.ones(3)}, tmp_path / "nets" / "own.safetensors")
    one = build_corpus(BuildConfig(out=str(tmp_path / "one"), sources=[str(tmp_path / "nets")], distributed=False))
    both = build_corpus(
        BuildConfig(out=str(tmp_path / "both"), sources=[zoo_corpus.location, one.location], distributed=False)
    )
    assert both.facts.num_rows == zoo_corpus.facts.num_rows + 1
    assert both.tasks.keys() == zoo_corpus.tasks.keys()
    assert both.state_dict("own")["w"].tolist() == [1, 1, 1]
    assert both.query(["checkpoint_id=own"]).column("key_prefix").to_pylist() == ["module."]
    known = {layout_id: network.recipe for layout_id, network in zoo_corpus.networks.items()}
    assert {key: both.networks[key].recipe for key in known} == known
    for name in ("split", "test_accuracy", "sha256", "order_seed", "base_id"):
        column = dict(
            zip(both.facts.column("checkpoint_id").to_pylist(), both.facts.column(name).to_pylist(), strict=True)
        )
        for row in zoo_corpus.facts.select(["checkpoint_id", name]).to_pylist():
            assert column[row["checkpoint_id"]] == row[name] or row[name] != row[name]


@settings(max_examples=200)
@given(
    pattern=st.text(alphabet="ab*?[]!/.", max_size=8).filter(lambda text: "**" not in text),
    name=st.text(alphabet="ab.", max_size=6),
)
def test_patterns_within_a_folder_are_those_of_fnmatch(pattern: str, name: str) -> None:
    if "/" not in pattern and "[" not in pattern:
        assert bool(re.fullmatch(glob_regex(pattern), name)) == fnmatch.fnmatchcase(name, pattern)


def test_two_stars_cross_folders_and_one_does_not() -> None:
    assert re.fullmatch(glob_regex("**/x[!b].pt"), "deep/er/xa.pt")
    assert re.fullmatch(glob_regex("**/x[!b].pt"), "xa.pt")
    assert not re.fullmatch(glob_regex("*/xa.pt"), "deep/er/xa.pt")
