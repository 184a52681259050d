"""What goes out can be used: by transformers, under the metadata it came with, and checked before it is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from raywgen.corpus import Corpus, CorpusError
from raywgen.corpus.build import BuildConfig, build_corpus
from raywgen.corpus.export import _check_clashes, _file, export
from raywgen.corpus.merge import merge
from raywgen.weights import save_state_dict
from tests.corpus import builders


def build(root: Path, out: str = "corpus") -> Corpus:
    return build_corpus(BuildConfig(out=str(root / out), sources=[str(root / "in")], distributed=False))


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("given", [None, {"format": "pt", "modelspec.title": "tiny", "checkpoint_id": "mine"}])
def test_metadata_come_back_beside_facts_of_other_names(tmp_path: Path, given: dict[str, str] | None) -> None:
    (tmp_path / "in").mkdir()
    save_file({"w": torch.ones(2, 2)}, tmp_path / "in/model.safetensors", given)
    (path,) = export(build(tmp_path), tmp_path / "out")
    found = metadata(path)
    assert found["raywgen.checkpoint_id"] == "model"
    assert {name: text for name, text in found.items() if not name.startswith("raywgen.")} == {"format": "pt"} | (
        given or {}
    )
    assert not {"raywgen.file_metadata", "raywgen.config_files"} & found.keys()


def test_metadata_survive_a_merge_and_a_second_round(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_file({"w": torch.ones(2, 2)}, tmp_path / "in/a.safetensors", {"format": "mlx", "title": "tiny"})
    merged = merge(str(tmp_path / "merged"), [build(tmp_path)])
    export(merged, tmp_path / "out")
    again = build_corpus(BuildConfig(out=str(tmp_path / "c2"), sources=[str(tmp_path / "out")], distributed=False))
    (path,) = export(again, tmp_path / "out2")
    assert (metadata(path)["format"], metadata(path)["title"]) == ("mlx", "tiny")


def test_every_file_that_is_written_says_its_format(tmp_path: Path) -> None:
    save_state_dict({"w": torch.ones(2)}, tmp_path / "net.safetensors", {"task": "digits"})
    assert metadata(tmp_path / "net.safetensors") == {"format": "pt", "task": "digits"}


def bert(folder: Path) -> torch.Tensor:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = BertModel(config).eval()
    model.save_pretrained(folder)
    return _output(model)


def gpt2(folder: Path) -> torch.Tensor:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)).eval()
    model.save_pretrained(folder, max_shard_size="1KB")
    return _output(model)


def _output(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 2, 3]]))[0]


@pytest.mark.parametrize(("make", "loader"), [(bert, "AutoModel"), (gpt2, "AutoModelForCausalLM")])
def test_transformers_loads_an_exported_folder(
    tmp_path: Path, make: Callable[[Path], torch.Tensor], loader: str
) -> None:
    transformers = pytest.importorskip("transformers")
    wanted = make(tmp_path / "in" / "tiny")
    written = export(build(tmp_path), tmp_path / "out")
    assert written == [tmp_path / "out/tiny/model.safetensors"]
    model, loading_info = getattr(transformers, loader).from_pretrained(
        tmp_path / "out" / "tiny", local_files_only=True, output_loading_info=True
    )
    assert not loading_info["missing_keys"]
    assert not loading_info["unexpected_keys"]
    assert torch.equal(_output(model.eval()), wanted)


def test_a_pickled_model_is_exported_under_the_name_that_loaders_look_for(tmp_path: Path) -> None:
    (tmp_path / "in/m").mkdir(parents=True)
    torch.save({"w": torch.ones(2, 2)}, tmp_path / "in/m/pytorch_model.bin")
    (tmp_path / "in/m/config.json").write_text('{"model_type": "tiny"}')
    assert export(build(tmp_path), tmp_path / "out") == [tmp_path / "out/m/model.safetensors"]
    assert (tmp_path / "out/m/config.json").read_text() == '{"model_type": "tiny"}'


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("LORA", "lora:lab"),
        ("IA3", "ia3:lab"),
        ("PROMPT_TUNING", "prompt_tuning:lab"),
        (None, "lora:lab"),
    ],
)
def test_adapters_are_distinguished_and_keep_their_config(tmp_path: Path, kind: str | None, expected: str) -> None:
    (tmp_path / "in/a").mkdir(parents=True)
    save_file({"layers.0.x": torch.ones(2, 2)}, tmp_path / "in/a/adapter_model.safetensors")
    config = {"base_model_name_or_path": "lab"} | ({"peft_type": kind} if kind else {})
    (tmp_path / "in/a/adapter_config.json").write_text(json.dumps(config))
    corpus = build(tmp_path)
    assert corpus.facts.column("architecture").to_pylist() == [expected]
    export(corpus, tmp_path / "out")
    assert (tmp_path / "out/a/adapter_config.json").exists() == (kind is not None)


def corpus_of(root: Path, *names: str) -> Corpus:
    shard = builders.shard(root / "c", "s", {name: builders.network(2, n) for n, name in enumerate(names)})
    return builders.commit(root / "c", [shard], [builders.Layout.from_state_dict(builders.network(2, 0))])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a", "./a"), r"checkpoints 'a' and './a' would both be written to .*a\.safetensors"),
        (("a/b", "a//b"), "would both be written"),
        (("a", "a.safetensors/b"), r"'a' would be written to .*a\.safetensors, a folder of 'a\.safetensors/b'"),
        (("good", "x" * 250), "is too long for a file name"),
        (("good", "/"), "outside of"),
        (("good", "bad\0"), "outside of"),
    ],
)
def test_names_that_clash_are_refused_before_anything_is_written(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        export(corpus_of(tmp_path, *names), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_large_and_small_letters_clash_where_the_file_system_folds_them(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, "A/net", "a/net")
    files = {row["checkpoint_id"]: _file(row, tmp_path / "out") for row in corpus.facts.to_pylist()}
    _check_clashes(files, fold_case=False)
    with pytest.raises(
        CorpusError, match=r"'A/net' and 'a/net' would both be written .*distinguish upper from lower case"
    ):
        _check_clashes(files, fold_case=True)


def test_other_files_are_not_replaced_without_the_users_word(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, "a", "b")
    export(corpus, tmp_path / "out", ["checkpoint_id=a"])
    export(corpus, tmp_path / "out")  # as after a kill
    save_file({"mine": torch.ones(1)}, tmp_path / "out/b.safetensors")
    (tmp_path / "out/a.safetensors").unlink()
    with pytest.raises(CorpusError, match=r"b\.safetensors exists and is something else.*--overwrite"):
        export(corpus, tmp_path / "out")
    assert not (tmp_path / "out/a.safetensors").exists()
    export(corpus, tmp_path / "out", overwrite=True)
    assert "mine" not in load_file(tmp_path / "out/b.safetensors")


def test_values_that_safetensors_cannot_hold_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    states = {"a": builders.network(2, 0)}, {"z": {"w": torch.ones(2, dtype=torch.complex128)}}
    layouts = [builders.Layout.from_state_dict(next(iter(part.values()))) for part in states]
    shards = [builders.shard(tmp_path / "c", f"s{n}", part) for n, part in enumerate(states)]
    corpus = builders.commit(tmp_path / "c", shards, layouts)
    with pytest.raises(CorpusError, match=r"tensor 'w' of .* is complex128.*'dtype!=complex128'"):
        export(corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export(corpus, tmp_path / "out", ["dtype!=complex128"]) == [tmp_path / "out/a.safetensors"]
