"""What goes into a corpus comes out, bit for bit and in the order asked for."""

from __future__ import annotations

import math
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raywgen.corpus import Corpus, packed_tensor, verify_corpus, write_shard
from raywgen.corpus.shards import read_shard
from raywgen.weights import Layout, StateDict
from tests.corpus import builders

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)
SHAPES = ((), (0,), (1,), (3,), (2, 0), (2, 3), (1, 2, 2))


@st.composite
def stacks(draw: st.DrawFn) -> list[StateDict]:
    """One to four networks of one random layout."""
    names = draw(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5, unique=True))
    specs = [(name, draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SHAPES))) for name in names]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num = draw(st.integers(1, 4))
    return [{name: random_tensor(dtype, shape, rng) for name, dtype, shape in specs} for _ in range(num)]


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], rng: np.random.Generator) -> torch.Tensor:
    """Random bits, and so negative zeros, subnormals and extremes; not-finite ones become -0.0."""
    if dtype == torch.bool:
        return torch.from_numpy(rng.integers(0, 2, shape, dtype=np.uint8).astype(bool).reshape(shape))
    raw = torch.from_numpy(rng.integers(0, 256, math.prod(shape) * dtype.itemsize, dtype=np.uint8))
    tensor = raw.view(dtype).reshape(shape) if len(raw) else torch.empty(shape, dtype=dtype)
    return torch.where(tensor.isfinite(), tensor, -torch.zeros_like(tensor)) if dtype.is_floating_point else tensor


@settings(max_examples=60)
@given(stacks())
def test_any_state_dict_comes_back_bit_for_bit(stack: list[StateDict]) -> None:
    with tempfile.TemporaryDirectory() as root:
        named = {f"net{i}": state for i, state in enumerate(stack)}
        layout = Layout.from_state_dict(stack[0])
        builders.commit(root, [builders.shard(root, "only", named)], [layout])
        corpus = Corpus.open(root)
        for checkpoint_id, state in named.items():
            builders.assert_same_bits(corpus.state_dict(checkpoint_id), state)
        values_ND = corpus.values(corpus.facts)
        assert values_ND.dtype == torch.float32
        assert torch.equal(values_ND, torch.stack([layout.flatten(state) for state in stack]))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, dict[str, StateDict]]:
    return builders.small_corpus(tmp_path_factory.mktemp("corpus"))


def test_values_follow_the_order_of_the_table_across_shards_and_batches(
    opened: tuple[Corpus, dict[str, StateDict]],
) -> None:
    corpus, states = opened
    table = corpus.select(layout_id=Layout.from_state_dict(states["narrow0"]).id)
    order = np.random.default_rng(0).permutation(table.num_rows)
    shuffled = table.take(pa.array(order))
    layout = Layout.from_state_dict(states["narrow0"])
    wanted_ND = torch.stack([layout.flatten(states[name]) for name in shuffled["checkpoint_id"].to_pylist()])
    assert table.num_rows == 605
    assert torch.equal(corpus.values(shuffled), wanted_ND)


def test_results_are_the_callers_own_memory(opened: tuple[Corpus, dict[str, StateDict]]) -> None:
    corpus, states = opened
    corpus.values(corpus.select(split="heldout")).zero_()
    corpus.state_dict("held1")["0.weight"].zero_()
    builders.assert_same_bits(corpus.state_dict("held1"), states["held1"])


def test_every_checkpoint_comes_whole_with_its_facts_in_memory_of_its_own(
    opened: tuple[Corpus, dict[str, StateDict]],
) -> None:
    corpus, states = opened
    found = list(corpus.checkpoints(["layout_id=" + Layout.from_state_dict(states["narrow0"]).id]))
    assert len(found) == 605
    for row, state in found:
        assert row["layout_id"] == Layout.from_state_dict(state).id
        builders.assert_same_bits(state, states[row["checkpoint_id"]])
    for _, state in found:
        # One storage per checkpoint: whoever keeps or saves one does not keep its neighbours.
        assert {tensor.untyped_storage().nbytes() for tensor in state.values()} == {
            Layout.from_state_dict(state).num_bytes
        }
        state["0.weight"].zero_()
    builders.assert_same_bits(corpus.state_dict("narrow0"), states["narrow0"])


def test_base_values_are_those_of_the_shared_start(opened: tuple[Corpus, dict[str, StateDict]]) -> None:
    corpus, states = opened
    layout = Layout.from_state_dict(states["base0"])
    base_D = corpus.base_values(layout.id)
    assert base_D is not None
    assert torch.equal(base_D, layout.flatten(states["base0"]))
    assert corpus.base_values(Layout.from_state_dict(states["wide0"]).id) is None


def test_select_by_one_value_several_values_and_null(opened: tuple[Corpus, dict[str, StateDict]]) -> None:
    corpus, states = opened
    assert corpus.select().num_rows == len(states) == 608
    assert corpus.select(split="heldout")["checkpoint_id"].to_pylist() == ["held0", "held1", "held2", "held3"]
    assert corpus.select(split=["heldout", "base"], step=[0, 2]).num_rows == 3
    assert corpus.select(task_id=None)["checkpoint_id"].to_pylist() == ["base0"]
    assert corpus.select(split="unseen").num_rows == 0


def test_facts_tell_where_each_checkpoint_lies(opened: tuple[Corpus, dict[str, StateDict]]) -> None:
    corpus, _ = opened
    (row,) = corpus.select(checkpoint_id="wide2").to_pylist()
    assert (row["shard"], row["row"], row["num_values"], row["split"]) == ("weights/b-wide.arrow", 2, 20, "train")
    assert math.isnan(corpus.select(split="base")["test_accuracy"][0].as_py())


def test_tasks_and_networks_come_back(opened: tuple[Corpus, dict[str, StateDict]]) -> None:
    corpus, states = opened
    written, read = builders.task(), corpus.tasks["task/1"]
    assert (read.instruction, read.split, read.recipe) == (written.instruction, written.split, written.recipe)
    assert torch.equal(read.samples_SF, written.samples_SF)
    assert torch.equal(read.labels_S, written.labels_S)
    layout = Layout.from_state_dict(states["wide0"])
    assert corpus.networks[layout.id].layout == layout
    assert corpus.networks[layout.id].name == "net1"


def test_info_counts(opened: tuple[Corpus, dict[str, StateDict]]) -> None:
    info = opened[0].info()
    assert (info["checkpoints"], info["shards"]) == (608, 4)
    assert info["splits"] == {"train": 603, "heldout": 4, "base": 1}


def test_packed_tensor_shares_the_shards_memory_and_warns_of_nothing(
    opened: tuple[Corpus, dict[str, StateDict]],
) -> None:
    corpus, states = opened
    layout = Layout.from_state_dict(states["wide0"])
    allocated = pa.total_allocated_bytes()
    table = read_shard(corpus.storage, "weights/b-wide.arrow")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed_NP = packed_tensor(table, layout)
    data = table["packed"].chunk(0).buffers()[2]
    assert packed_NP.data_ptr() == data.address
    assert pa.total_allocated_bytes() == allocated
    assert torch.equal(packed_NP[1], layout.pack(states["wide1"]))


def test_record_batches_hold_at_most_512_rows(opened: tuple[Corpus, dict[str, StateDict]]) -> None:
    table = read_shard(opened[0].storage, "weights/a-narrow.arrow")
    assert [batch.num_rows for batch in table.to_batches()] == [512, 88]


def test_a_shard_may_be_empty(tmp_path: Path) -> None:
    """As when every network of a stack diverged."""
    states = builders.states("net", 2, 2, 0)
    layout = Layout.from_state_dict(states["net0"])
    empty = write_shard(str(tmp_path), "a", layout, [], torch.empty(0, layout.num_bytes, dtype=torch.uint8))
    corpus = builders.commit(tmp_path, [empty, builders.shard(tmp_path, "b", states)], [layout])
    assert corpus.facts["checkpoint_id"].to_pylist() == ["net0", "net1"]
    assert [block.num_rows for block in corpus.blocks(["train"])] == [2]
    assert verify_corpus(tmp_path) == []


def test_a_corpus_behind_a_uri_reads_the_same(tmp_path: Path) -> None:
    _, states = builders.small_corpus(tmp_path / "local")
    corpus, _ = builders.small_corpus("fsspec+memory:///bucket/corpus")
    local = Corpus.open(tmp_path / "local")
    assert corpus.facts["sha256"].to_pylist() == local.facts["sha256"].to_pylist()
    builders.assert_same_bits(corpus.state_dict("wide1"), states["wide1"])
    held = corpus.select(split="heldout")
    assert torch.equal(corpus.values(held), local.values(local.select(split="heldout")))
