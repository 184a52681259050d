"""Two real processes of a gloo group, one of which may see something else."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raywgen.corpus import Corpus
from raywgen.training.rows import RunRows, data_digest, layout_rows

_RANK = """
import sys
from datetime import timedelta
import torch
from torch import distributed
from raywgen.corpus import Corpus
from raywgen.training.agreement import WorkersDisagreeError, check_agreement
from raywgen.training.rows import RunRows, data_digest

rank, place, location, is_shuffled = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "shuffled"
distributed.init_process_group(
    "gloo", init_method=f"file://{place}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
)
corpus = Corpus.open(location)
if is_shuffled and rank == 1:
    # As if another corpus lay there, which holds the same checkpoints the other way round.
    import pyarrow as pa
    facts = corpus.facts
    rows = pa.array([-row for row in facts.column("row").to_pylist()])
    corpus.__dict__["facts"] = facts.set_column(facts.schema.get_field_index("row"), "row", rows)
parts = {"corpus": data_digest(corpus), "order of checkpoints": RunRows.of(corpus).digest(), "config": "seed: 0"}
try:
    check_agreement(parts, torch.device("cpu"))
    print("agreed")
except WorkersDisagreeError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["equal", "shuffled"])
def test_a_rank_that_reads_another_order_is_named_on_all_ranks(kind: str, zoo_corpus: Corpus, tmp_path: Path) -> None:
    arguments = [str(tmp_path / "group"), zoo_corpus.location, kind]
    ranks = [
        subprocess.Popen([sys.executable, "-c", _RANK, str(rank), *arguments], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0].strip() for rank in ranks]
    if kind == "equal":
        assert outputs == ["agreed", "agreed"]
    else:
        assert outputs[0] == outputs[1]
        assert outputs[0].startswith("rank 1 has another order of checkpoints than rank 0, so their batches")
        assert "\n" not in outputs[0]


def test_rows_have_one_order_whatever_order_the_facts_are_in(zoo_corpus: Corpus) -> None:
    wanted = layout_rows(zoo_corpus, ["train"])
    places = {name: place for place, name in enumerate(zoo_corpus.facts.column("checkpoint_id").to_pylist())}
    for rows in wanted:
        assert [places[name] for name in rows.ids] == sorted(places[name] for name in rows.ids)
    for seed in range(4):
        shuffled = Corpus.open(zoo_corpus.location)
        order = list(range(shuffled.facts.num_rows))
        random.Random(seed).shuffle(order)
        shuffled.__dict__["facts"] = shuffled.facts.take(order)
        found = layout_rows(shuffled, ["train"])
        assert [rows.digest() for rows in found] == [rows.digest() for rows in wanted]
        for one, other in zip(found, wanted, strict=True):
            every_N = torch.arange(len(one))
            assert torch.equal(one.values(every_N), other.values(every_N))
            assert [task.id for task in one.tasks] == [task.id for task in other.tasks]


def test_the_digest_sees_order_and_facts_and_the_data_digest_sees_values(zoo_corpus: Corpus) -> None:
    (rows, *others), held = RunRows.of(zoo_corpus).train, RunRows.of(zoo_corpus).held
    whole = RunRows(train=[rows, *others], held=held).digest()
    swapped = [rows.ids[1], rows.ids[0], *rows.ids[2:]]
    changed = {"ids": swapped, "steps": [9, *rows.steps[1:]], "policies": ["sgd", *rows.policies[1:]]}
    for name, value in changed.items():
        assert RunRows(train=[replace(rows, **{name: value}), *others], held=held).digest() != whole
    assert RunRows(train=[*others, rows], held=held).digest() != whole
    before = data_digest(zoo_corpus)
    assert data_digest(Corpus.open(zoo_corpus.location)) == before
    other = Corpus.open(zoo_corpus.location)
    place = other.shards.index(other.shards_of(["validation"])[0])
    other.shards[place] = replace(other.shards[place], sha256="0" * 64)
    assert data_digest(other) != before
