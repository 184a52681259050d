"""Checkpoints as transformers and timm write them, from their files to networks that these load again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import raywgen
from raywgen.corpus import Corpus
from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.generation import GenerateConfig, generate
from raywgen.generators.common.tokenizer import TokenizerConfig
from raywgen.generators.igpg import IGPGConfig, IGPGTaskLossConfig, PriorConfig
from raywgen.nn.quantisers import QuantiserConfig
from raywgen.tasks.networks.vit import VisionTransformer
from raywgen.training import TrainConfig, launch

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
HUB_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
HUB_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def modules() -> dict[str, nn.Module]:
    """Networks without a value that two of them share, by the names that a corpus gives them; the last has timm's."""
    vit = transformers.ViTConfig(**HUB_VIT, image_size=32, patch_size=8, num_labels=10)
    resnet = transformers.ResNetConfig(**HUB_RESNET, num_labels=10)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = {
            "ViTForImageClassification": transformers.ViTForImageClassification(vit),
            "ResNetForImageClassification": transformers.ResNetForImageClassification(resnet),
            "timm": VisionTransformer(32, 2, 2, 10, image_size=32, patch_size=8),
        }
        for module in made.values():
            for tensor in module.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(0.1 * torch.rand(tensor.shape))
        return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of each network as people find them, a corpus of them, and a generator that was trained on it."""
    folder = tmp_path_factory.mktemp("hub")
    made = modules()
    made["ViTForImageClassification"].save_pretrained(folder / "vit", max_shard_size="40KB")  # pyright: ignore[reportCallIssue]
    made["ResNetForImageClassification"].save_pretrained(folder / "resnet")  # pyright: ignore[reportCallIssue]
    wrapped = {f"module.{name}": tensor for name, tensor in made["timm"].state_dict().items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, folder / "timm.pth.tar")
    sources = [str(folder / name) for name in ("vit", "resnet", "timm.pth.tar")]
    build_corpus(BuildConfig(out=str(folder / "corpus"), sources=sources, distributed=False, strict=True))
    generator = IGPGConfig(
        tokenizer=TokenizerConfig(num_steps=2, batch_size=4, quantiser=QuantiserConfig(num_levels=2, num_codes=16)),
        prior=PriorConfig(num_steps=2, batch_size=2, width=16, num_layers=1, num_heads=2, window=256, tokens="auto"),
        task_loss=IGPGTaskLossConfig(num_steps=0),
    )
    run = TrainConfig(method="igpg", generator=generator, corpus=str(folder / "corpus"), out=str(folder / "run"))
    run.num_workers = 0
    launch([run])
    return folder


def generated(folder: Path, name: str, max_file_bytes: int = 0) -> Path:
    """Generates a network in pieces, and returns its file or the folder of its files."""
    config = GenerateConfig(
        generator=str(folder / "run"),
        corpus=str(folder / "corpus"),
        network=name,
        out=str(folder / f"generated-{name}"),
        piece_values=8192,
        max_file_bytes=max_file_bytes,
        sampling={"windows": "parallel"},
    )
    (row,) = generate(config)
    return Path(row.path)


def assert_like(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, shapes and dtypes, other values; counters of batches are kept."""
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert (tensor.shape, tensor.dtype) == (expected[name].shape, expected[name].dtype)
        if tensor.is_floating_point():
            assert tensor.isfinite().all()
            assert not torch.equal(tensor, expected[name])
        else:
            assert torch.equal(tensor, expected[name])


def test_a_corpus_keeps_the_names_of_each_library(folder: Path) -> None:
    corpus = Corpus.open(str(folder / "corpus"))
    expected = {name: set(module.state_dict()) for name, module in modules().items()}
    # transformers writes some names otherwise than its module has them.
    index = json.loads((folder / "vit" / "model.safetensors.index.json").read_text())
    expected["ViTForImageClassification"] = set(index["weight_map"])
    assert {facts.name for facts in corpus.networks.values()} == set(expected)
    for facts in corpus.networks.values():
        assert {spec.name for spec in facts.layout.tensors} == expected[facts.name]


@pytest.mark.parametrize("name", ["ResNetForImageClassification", "timm"])
def test_a_generated_network_loads_strictly(folder: Path, name: str) -> None:
    original = modules()[name]
    state = load_file(generated(folder, name))
    assert_like(state, original.state_dict())
    original.load_state_dict(state, strict=True)


def test_a_generated_network_in_several_files_loads_as_a_model_of_the_hub(folder: Path) -> None:
    original = modules()["ViTForImageClassification"]
    index = generated(folder, "ViTForImageClassification", max_file_bytes=50_000)
    home = index if index.is_dir() else index.parent
    assert len(set(json.loads((home / "model.safetensors.index.json").read_text())["weight_map"].values())) > 1
    loaded, said = transformers.ViTForImageClassification.from_pretrained(
        home, config=original.config, output_loading_info=True
    )
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert not said["mismatched_keys"]
    assert_like(loaded.state_dict(), original.state_dict())


@pytest.mark.parametrize("name", ["ViTForImageClassification", "ResNetForImageClassification", "timm"])
def test_a_live_module_is_filled_as_it_is(folder: Path, name: str) -> None:
    """The module of the library itself, with its own names, from a generator that was trained on its file."""
    module = modules()[name]
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    trained = raywgen.load(folder / "run", device="cpu")
    filled = trained.fill_with_report(module, instruction="" if name == "timm" else name, temperature=0.0)
    assert filled.module is module
    assert filled.is_known
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(after[key].shape == tensor.shape for key, tensor in before.items())
    assert any(not torch.equal(after[key], tensor) for key, tensor in before.items())
    output = module.eval()(torch.zeros(1, 3, 32, 32))
    assert torch.isfinite(getattr(output, "logits", output)).all()
