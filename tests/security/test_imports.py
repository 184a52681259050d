"""A name that stands in data becomes an import only by the user's word, and a call only of an `nn.Module`."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import raywgen
from raywgen.corpus import Corpus
from raywgen.evaluation.config import EvaluateConfig
from raywgen.evaluation.evaluate import evaluate
from raywgen.evaluation.finetune import FinetuneConfig, finetune
from raywgen.evaluation.retrieve import RetrieveConfig, retrieve
from raywgen.evaluation.score import score_file
from raywgen.evaluation.select import SelectConfig, select
from raywgen.generation import AdaptConfig, GenerateConfig, adapt, generate
from raywgen.tasks import TaskError, build_network
from raywgen.tasks.encoders import EncoderCard, load_encoder, save_encoder
from raywgen.training import TrainConfig, launch
from raywgen.trust import UntrustedError, trusting
from raywgen.weights import save_state_dict
from raywgen.zoo.replay import replay
from tests.security.hostile import NETWORK, Payload, change_json, hostile_corpus

# Their author needs no checksums.
pytestmark = pytest.mark.filterwarnings("ignore:.*has no checksums")
Change = Callable[[Path, str], None]


def data_encoder(bundle: Path, name: str) -> None:
    change_json(bundle / "generator.json", lambda content: content["config"]["prior"].update(data_encoder=name))


def inputs_encoder(bundle: Path, name: str) -> None:
    inputs = {"size": 8, "channels": 1, "mean": [0.5], "std": [0.5], "encoder": name}
    change_json(bundle / "generator.json", lambda content: content["facts"].update(inputs=inputs))


def copied_data_encoder(bundle: Path, name: str) -> None:
    _encoder_folder(bundle / "data_encoder", name)
    change_json(bundle / "generator.json", lambda content: content.update(encoders=["prior.data_encoder"]))


def copied_inputs_encoder(bundle: Path, name: str) -> None:
    inputs_encoder(bundle, "somewhere/else")
    _encoder_folder(bundle / "encoder", name)


def wrapped_in_an_adapter(bundle: Path, name: str) -> None:
    inputs_encoder(bundle, "somewhere/else")
    _encoder_folder(bundle / "encoder", "lora", base={"name": name}, weights="", targets=[], rank=1)


def _encoder_folder(folder: Path, name: str, **arguments: Any) -> None:
    network = {"name": name, **arguments}
    card = EncoderCard(network=network, size=8, channels=1, mean=(0.5,), std=(0.5,))
    save_encoder({"weight": torch.zeros(1)}, card, str(folder))


IN_BUNDLES = [data_encoder, inputs_encoder, copied_data_encoder, copied_inputs_encoder, wrapped_in_an_adapter]


@pytest.mark.parametrize("change", IN_BUNDLES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("attribute", ["Net", "function"])
def test_a_bundle_imports_nothing(bundle: Path, payload: Payload, change: Change, attribute: str) -> None:
    change(bundle, f"{payload.name}:{attribute}")
    with pytest.raises(UntrustedError) as refused:
        raywgen.load(bundle)
    assert not payload.has_run
    assert payload.name not in sys.modules
    message = str(refused.value)
    assert f"'{payload.name}:{attribute}'" in message
    assert str(bundle) in message
    assert f"--trust {payload.name}" in message
    assert "\n" not in message


@pytest.mark.parametrize("change", IN_BUNDLES, ids=lambda change: change.__name__)
def test_no_function_of_a_trusted_package_is_called(bundle: Path, payload: Payload, change: Change) -> None:
    change(bundle, f"{payload.name}:function")
    with pytest.raises(ValueError, match=r"is no subclass of torch\.nn\.Module"):
        raywgen.load(bundle, trust=(payload.name,))
    assert payload.has_run == "imported "


@pytest.mark.parametrize("name", ["os:system", "builtins:exec", "subprocess:run", "builtins:type", "torch:load"])
def test_what_python_has_is_never_called(tmp_path: Path, name: str) -> None:
    recipe = {"name": name, "command": f"touch {tmp_path}/mark"}
    with pytest.raises(UntrustedError):
        build_network(recipe)
    with trusting(name.partition(":")[0]), pytest.raises(TaskError, match="is no subclass"):
        build_network(recipe)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["*", "", "my net", "mynets:Net", "s3://", "../here", "-x"])
def test_trust_names_packages(name: str) -> None:
    with pytest.raises(UntrustedError, match="name one package"), trusting(name):
        pass


def test_trust_ends_with_its_block_and_at_the_name(payload: Payload) -> None:
    recipe = {"name": f"{payload.name}:Net"}
    with trusting(payload.name[:-1], f"{payload.name}.inner"), pytest.raises(UntrustedError):
        build_network(recipe)
    with trusting(payload.name):
        build_network(recipe)
    with pytest.raises(UntrustedError):
        build_network(recipe)


def train_on(corpus: str, bundle: Path, out: Path) -> None:
    launch([TrainConfig(corpus=corpus, out=str(out), num_workers=0)])


def generate_for(corpus: str, bundle: Path, out: Path) -> None:
    generate(GenerateConfig(corpus=corpus, generator=str(bundle), out=str(out), limit=1, best_of=1))


def evaluate_on(corpus: str, bundle: Path, out: Path) -> None:
    evaluate(EvaluateConfig(corpus=corpus, generator=str(bundle.parent), out=str(out), num_tasks=1))


def finetune_on(corpus: str, bundle: Path, out: Path) -> None:
    finetune(FinetuneConfig(corpus=corpus, generator=str(bundle), out=str(out), limit=1, network=NETWORK))


def retrieve_from(corpus: str, bundle: Path, out: Path) -> None:
    found = retrieve(RetrieveConfig(corpus=corpus, data=str(examples(out))))
    raise UntrustedError(" ".join(found.left_out))


def select_from(corpus: str, bundle: Path, out: Path) -> None:
    select(SelectConfig(corpus=corpus, generator=str(bundle), instruction="?", data=str(examples(out))))


def score_on(corpus: str, bundle: Path, out: Path) -> None:
    opened = Corpus.open(corpus)
    layout_id = next(key for key, network in opened.networks.items() if network.name == NETWORK)
    name = opened.select(layout_id=layout_id, split="train").column("checkpoint_id")[0].as_py()
    save_state_dict(opened.state_dict(name), out.with_suffix(".safetensors"), {})
    score_file(out.with_suffix(".safetensors"), opened, next(iter(opened.tasks)))


def examples(out: Path) -> Path:
    path = out.with_suffix(".npz")
    np.savez(path, x=np.random.default_rng(0).random((8, 64), dtype=np.float32), y=np.arange(8) % 2)
    return path


COMMANDS = [train_on, generate_for, evaluate_on, finetune_on, retrieve_from, select_from, score_on]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_a_network_of_a_corpus_is_not_imported(
    zoo_corpus: Corpus, bundle: Path, payload: Payload, tmp_path: Path, command: Callable[[str, Path, Path], None]
) -> None:
    corpus = hostile_corpus(zoo_corpus, tmp_path / "corpus", network={"name": f"{payload.name}:function"})
    with pytest.raises(UntrustedError, match=f"{payload.name}:function") as refused:
        command(corpus.location, bundle, tmp_path / "out")
    assert not payload.has_run
    assert corpus.location in str(refused.value)
    assert f"--trust {payload.name}" in str(refused.value)


@pytest.mark.parametrize(
    "command",
    [train_on, generate_for, evaluate_on, finetune_on, score_on],
    ids=lambda command: command.__name__,
)
def test_a_task_of_a_corpus_imports_no_encoder(
    zoo_corpus: Corpus, bundle: Path, payload: Payload, tmp_path: Path, command: Callable[[str, Path, Path], None]
) -> None:
    inner = next(iter(zoo_corpus.tasks.values())).recipe
    task = {"name": "encoded", "encoder": f"{payload.name}:Net", "task": dict(inner)}
    corpus = hostile_corpus(zoo_corpus, tmp_path / "corpus", task=task)
    with pytest.raises(UntrustedError, match=f"{payload.name}:Net") as refused:
        command(corpus.location, bundle, tmp_path / "out")
    assert not payload.has_run
    assert corpus.location in str(refused.value)


def test_a_zoo_is_not_replayed_with_networks_of_its_author(
    zoo_corpus: Corpus, payload: Payload, tmp_path: Path
) -> None:
    shutil.copytree(zoo_corpus.location, tmp_path / "corpus")
    networks = [{"name": f"{payload.name}:function"}]
    change_json(
        tmp_path / "corpus" / "manifest.json", lambda content: content["recipe"]["zoo"].update(networks=networks)
    )
    corpus = Corpus.open(tmp_path / "corpus")
    trajectory = corpus.facts.column("trajectory_id").to_pylist()[-1]
    with pytest.raises(UntrustedError, match=f"{payload.name}:function"):
        replay(corpus, trajectory)
    assert not payload.has_run


def test_adapting_imports_no_encoder(bundle: Path, payload: Payload, tmp_path: Path) -> None:
    inputs_encoder(bundle, f"{payload.name}:Net")
    with pytest.raises(UntrustedError):
        adapt(AdaptConfig(generator=str(bundle), support=str(examples(tmp_path / "support"))))
    assert not payload.has_run


def test_the_users_word_lets_a_corpus_import(
    zoo_corpus: Corpus, bundle: Path, payload: Payload, tmp_path: Path
) -> None:
    corpus = hostile_corpus(zoo_corpus, tmp_path / "corpus", network={"name": f"{payload.name}:Net"})
    with trusting(payload.name):
        generate_for(corpus.location, bundle, tmp_path / "out")
    assert payload.has_run.startswith("imported built")
    assert json.loads((tmp_path / "out" / "networks.json").read_text())


def test_what_the_users_own_config_names_needs_no_more(
    zoo_corpus: Corpus, bundle: Path, payload: Payload, tmp_path: Path
) -> None:
    networks: list[Any] = [{"name": f"{payload.name}:Net"}]
    config = GenerateConfig(
        corpus=zoo_corpus.location, generator=str(bundle), out=str(tmp_path / "out"), limit=1, best_of=1
    )
    config.networks = networks
    generate(config)
    assert "built" in payload.has_run
    with pytest.raises(UntrustedError):
        build_network(networks[0])


def test_a_function_of_ones_own_is_no_class_either(payload: Payload) -> None:
    with trusting(payload.name), pytest.raises(TaskError, match="no subclass"):
        load_encoder(f"{payload.name}:function")
    assert "called" not in payload.has_run
