"""`raywgen corpus encode`: tokens of a corpus by the tokeniser of a run, over Ray actors or in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from raywgen.actor_pool import ActorPool, OnNews, OnShare, PoolConfig, paced
from raywgen.corpus import Corpus
from raywgen.corpus.tokens import TokenCorpus, TokensError
from raywgen.corpus.writing import writing
from raywgen.generators.bundle import BundleError, load_bundle
from raywgen.generators.bundle_copies import is_bundle
from raywgen.generators.token_encoder import TokenEncoder
from raywgen.locations import absolute, joined
from raywgen.nn.devices import Device, resolved_device
from raywgen.out_folder import check_room, checked_out
from raywgen.stops import keeping
from raywgen.storage import Storage
from raywgen.training.devices import num_gpus
from raywgen.training.encode import EncodeItem, EncodePlan
from raywgen.training.run_folder import BUNDLE, STAGES
from raywgen.training.stages_file import read_stages
from raywgen.trust import entry_point

OnProgress = Callable[[int, int], None]
"""Called with the values that are encoded so far and in all."""


@dataclass(kw_only=True)
class EncodeConfig:
    """Settings of the encoding of a corpus.

    Attributes:
        corpus: Path or URI of a corpus of weights, which all nodes reach.
        tokenizer: A trained tokeniser: a run folder, of which its stage is done, or a bundle. All nodes reach it.
        out: Path or URI of the corpus of tokens.
        where: `ray` encodes over actors on all nodes, `here` in this process.
        num_actors: Most actors; 0 for as many as the cluster has room for.
        num_cpus: CPUs of an actor.
        device: `cpu`, `cuda` (one GPU per actor, or that of this process) or `auto`: GPUs where there are some.
    """

    corpus: str = ""
    tokenizer: str = ""
    out: str = "runs/tokens"
    where: Literal["ray", "here"] = "ray"
    num_actors: int = 0
    num_cpus: int = 1
    device: Device = "auto"

    def __post_init__(self) -> None:
        for name in ("corpus", "tokenizer", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give corpus, tokenizer (a run folder) and out")
        if self.num_actors < 0 or self.num_cpus < 1:
            raise ValueError(f"num_actors={self.num_actors} must be at least 0, num_cpus={self.num_cpus} at least 1")


@entry_point
def encode_corpus(
    config: EncodeConfig,
    on_progress: OnProgress | None = None,
    on_news: OnNews | None = None,
    *,
    session: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> TokenCorpus:
    """Encodes a corpus, or goes on with an encoding that was interrupted; tokens that are there are reused.

    Args:
        config: Corpus, tokeniser, and where the work is done.
        on_progress: Called every few seconds and after each shard.
        on_news: Called with a sentence when a worker is lost, and when there is no room for any.
        session: Starts Ray, where `config.where` is `ray`; it is entered once corpus and tokeniser are read.

    Raises:
        OutError: Nothing can or should be written to `out`, or its disk has no room for the tokens.
        BundleError: There is no trained tokeniser.
        TokensError: `out` holds another corpus, or the tokeniser does not fit the corpus.
        CorpusError: The corpus cannot be read, or tokens cannot be written.
        InUseError: Another process works on `out`.
        ActorsLostError: Workers die again and again; the same command continues with the rest.
    """
    config = replace(config, out=checked_out(config.out, EncodeConfig.out))
    corpus = Corpus.open(config.corpus)
    # Over Ray this process only plans.
    device = resolved_device(config.device if config.where == "here" else "cpu")
    plan = EncodePlan(corpus, load_encoder(config.tokenizer, corpus, device), config.out)
    if (found := plan.existing()) is not None:
        return found
    kept = keeping(f"{config.out} keeps the shards that are encoded; the same command goes on with the others")
    with kept, writing(config.out):
        if (found := plan.existing()) is not None:  # Another process that held the folder may have finished.
            return found
        check_room(config.out, sum(item.num_bytes for item in plan.items))
        with session() if config.where == "ray" else nullcontext():
            _encode_remaining(config, plan, on_progress, on_news)
        return plan.commit()


def load_encoder(folder: str | Path, corpus: Corpus, device: torch.device) -> TokenEncoder:
    """Loads a trained tokeniser, and arranges the flat vectors of a corpus as it knows them.

    Raises:
        BundleError: There is none, or it is damaged.
        TokensError: The generator has no tokens.
    """
    bundle = tokenizer_folder(folder)
    generator = load_bundle(bundle).to(device)
    encoder = generator.token_encoder()
    if encoder is None:
        raise TokensError(f"{bundle} is a generator of method '{generator.method}', which has no tokens; give another")
    corpus.arrange(generator.layouts)
    return encoder


def tokenizer_folder(path: str | Path) -> str:
    """Returns the folder of a bundle: the path itself, or of a run its generator, else that of its last stage.

    Raises:
        BundleError: There is no bundle.
    """
    candidates = [joined(path, BUNDLE), str(path)]
    if Storage.at(path).exists(STAGES):
        candidates += [joined(path, f"{STAGES}/{record.name}") for record in reversed(read_stages(path))]
    for candidate in candidates:
        if is_bundle(candidate):
            return candidate
    raise BundleError(
        f"{path} holds no trained tokeniser; give the folder of a run whose first stage is done, or of a generator"
    )


class ShardEncoder:
    """Encodes shards in a process of its own; corpus and tokeniser are loaded by the first one."""

    def __init__(self, config: EncodeConfig, snapshot: str) -> None:
        self._config, self._snapshot = config, snapshot
        self._plan: EncodePlan | None = None

    def __call__(self, item: EncodeItem, on_share: OnShare) -> None:
        """Encodes a shard; raises as `EncodePlan.encode` does."""
        config = self._config
        torch.set_num_threads(config.num_cpus)
        if self._plan is None:
            corpus = Corpus.open(config.corpus, self._snapshot)
            encoder = load_encoder(config.tokenizer, corpus, resolved_device(config.device))
            self._plan = EncodePlan(corpus, encoder, config.out)
        self._plan.encode(item, on_share)


def _encode_remaining(
    config: EncodeConfig, plan: EncodePlan, on_progress: OnProgress | None, on_news: OnNews | None
) -> None:
    remaining = plan.remaining()
    total = sum(item.num_values for item in plan.items)
    done = total - sum(item.num_values for item in remaining)
    shares = [0.0] * len(remaining)

    def report(index: int, share: float) -> None:
        shares[index] = share
        if on_progress is not None:
            now = sum(item.num_values * part for item, part in zip(remaining, shares, strict=True))
            on_progress(done + round(now), total)

    if on_progress is not None and remaining:
        on_progress(done, total)  # The rate counts from here.
    if config.where == "ray":
        results = _over_ray(config, plan, remaining, on_news, report)
    else:
        results = _in_process(plan, remaining, report)
    for index in results:
        report(index, 1.0)


def _in_process(plan: EncodePlan, items: list[EncodeItem], on_share: Callable[[int, float], None]) -> Iterator[int]:
    for index, item in enumerate(items):
        plan.encode(item, paced(lambda share, index=index: on_share(index, share)))
        yield index


def _over_ray(
    config: EncodeConfig,
    plan: EncodePlan,
    items: list[EncodeItem],
    on_news: OnNews | None,
    on_share: Callable[[int, float], None],
) -> Iterator[int]:
    if not items:
        return
    device: Device = "cuda" if config.device == "cuda" or (config.device == "auto" and num_gpus()) else "cpu"
    paths = {name: absolute(getattr(config, name)) for name in ("corpus", "tokenizer", "out")}
    pool_config = PoolConfig(
        num_cpus=config.num_cpus,
        num_gpus=int(device == "cuda"),
        max_actors=config.num_actors or None,
        death_remedy="lower num_actors, so that fewer run at once, and run the same command again, which keeps what is "
        "done",
        room_remedy="free some CPUs, or lower num_cpus, and run the same command again, which keeps what is done",
    )
    work = ShardEncoder(replace(config, device=device, **paths), plan.corpus.snapshot)
    pool = ActorPool(work, pool_config, lambda item: item.shard.path, on_news, on_share)
    try:
        for index, _ in pool.run(items):
            yield index
    finally:
        pool.shutdown()
