"""Several networks in one file: each that is selected enters under its own id, and parts do not enter at all."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from raywgen.corpus import CorpusError
from raywgen.weights import WeightsError, load_state_dict
from tests.field.builders import build, ids, net, reasons, same, save

SEVERAL: dict[str, tuple[Any, list[str]]] = {
    "list": ([net(0), net(1), net(2)], ["0", "1", "2"]),
    "by-epoch": ({0: net(0), 10: net(1)}, ["0", "10"]),
    "by-name": ({"encoder": net(0), "decoder": net(1)}, ["encoder", "decoder"]),
    "nested": ({"state_dict": {"encoder": net(0), "decoder": net(1)}}, ["state_dict.encoder", "state_dict.decoder"]),
    "pairs": ([(3, net(0)), (4, net(1))], ["0.1", "1.1"]),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_networks_are_named_and_enter_where_they_are_selected(tmp_path: Path, name: str) -> None:
    content, keys = SEVERAL[name]
    save(tmp_path / f"in/{name}.pt", content)
    save(tmp_path / "in/one.pt", net(9))
    corpus = build(tmp_path, tmp_path / "in")
    assert ids(corpus) == ["one"]
    assert f"holds {len(keys)} networks: " + ", ".join(f"'{key}'" for key in keys) in reasons(corpus, "refused")[name]
    with pytest.raises(WeightsError, match="--select KEY"):
        load_state_dict(tmp_path / f"in/{name}.pt")
    every = build(tmp_path, tmp_path / "in", out="every", select=["*"], strict=True)
    assert ids(every) == sorted(["one", *(f"{name}:{key}" for key in keys)])
    for seed, key in enumerate(keys):
        same(every, f"{name}:{key}", net(seed))
    first = build(tmp_path, tmp_path / "in", out="first", select=[keys[1]], strict=True)
    assert ids(first) == sorted(["one", name])
    same(first, name, net(1))
    with pytest.raises(CorpusError, match=r"choose by `--select KEY`"):
        build(tmp_path, tmp_path / "in", out="none", select=["nobody"], strict=True)


def test_averaged_weights_beside_a_model_are_listed_and_can_be_selected(tmp_path: Path) -> None:
    save(
        tmp_path / "in/net.pth.tar", {"state_dict": net(0), "state_dict_ema": net(1), "optimizer": {"param_groups": []}}
    )
    corpus = build(tmp_path, tmp_path / "in", strict=True)
    same(corpus, "net", net(0))
    assert reasons(corpus, "passed over") == {"net": "also holds 'state_dict_ema'; `--select KEY` takes them instead"}
    same(build(tmp_path, tmp_path / "in", out="ema", select=["*_ema"]), "net", net(1))


@pytest.mark.parametrize(
    "keys", [["model", "state_dict", "net"], ["checkpoint", "model"], ["ema"], ["a", "b", "c", "d"]]
)
def test_a_single_network_is_taken_from_whatever_depth(tmp_path: Path, keys: list[str]) -> None:
    content: Any = net(4)
    for key in reversed(keys):
        content = {key: content}
    save(tmp_path / "in/net.pt", content)
    same(build(tmp_path, tmp_path / "in", strict=True), "net", net(4))


def placeholders(share: int) -> OrderedDict[str, torch.Tensor]:
    state = OrderedDict(net(1))
    floating = [name for name, tensor in state.items() if tensor.is_floating_point()]
    return state | {name: torch.empty(0) for name in floating[:share]}


@pytest.mark.parametrize(
    "content",
    [
        {"module": placeholders(5), "param_shapes": [{}]},
        {"module": placeholders(1), "param_shapes": [{}]},
        placeholders(5),
        placeholders(1),
        {"module": net(0), "mp_world_size": 2},
        {"_fsdp_wrapped_module.flat_param": torch.ones(60, 2)},
    ],
    ids=["zero-3", "zero-3 partly", "placeholders alone", "one placeholder", "tensor parallel", "flat shard"],
)
def test_parts_of_a_network_are_refused(tmp_path: Path, content: Any) -> None:
    save(tmp_path / "in/global_step10/zero_pp_rank_0_mp_rank_00_model_states.pt", content)
    save(tmp_path / "in/whole.pt", {"module": net(2), "mp_world_size": 1})
    corpus = build(tmp_path, tmp_path / "in")
    assert ids(corpus) == ["whole"]
    (reason,) = reasons(corpus, "refused").values()
    assert any(
        words in reason for words in ("placeholders of ZeRO stage 3", "parts of a network", "flat shard of FSDP")
    )


def test_empty_tensors_of_a_network_that_has_values_stay(tmp_path: Path) -> None:
    state = net(1) | {"anchors": torch.empty(0), "none": torch.empty(0, 4), "ids": torch.empty(0, dtype=torch.int32)}
    save(tmp_path / "in/net.pt", state)
    same(build(tmp_path, tmp_path / "in", strict=True), "net", state)
