"""Settings of generation: the networks that are wanted, how and where they are generated, and how they are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from raywgen.nn.devices import Device

Where = Literal["here", "ray"]
Into = Literal["files", "adapters", "corpus"]
AFTERWARDS = "estimate the statistics of each file afterwards, by `raywgen statistics FILE network=... data=IMAGES`"
"""What does for a network that is only written what `num_unlabelled` does for one that is run."""


@dataclass(kw_only=True)
class GenerateConfig:
    """The networks that are wanted, and how to generate and keep them.

    Attributes:
        generator: Run folder or bundle of the generator.
        corpus: Corpus that the names of tasks and architectures refer to.
        tasks: A task id, or a split: `seen`, `validation`, `unseen`. A corpus of weights alone has no tasks: each
            network's name is the generator's condition, and nothing is judged.
        network: Architecture by name, as `raywgen corpus info` lists them; empty for all.
        networks: Architectures of your own in their place, each the widths of a ReLU perceptron, a registry name, or a
            mapping with `name` (of the registry or `package.module:Class`) and arguments. One that the generator was
            never trained on is filled all the same, with a warning; it is run once on the samples first.
        instruction: A task of your own in words, in place of `tasks`; needs `data`.
        data: Labelled samples of that task: an `.npz` file with arrays `x` (samples first) and `y`, a Parquet file of
            labelled images or with columns of numbers and `y`, or a folder of class folders with images.
        out: Folder for the `.safetensors` files, or with `into=corpus` for the corpus: a local path, or a URI of an
            object store.
        into: `files`; `adapters`: folders as the PEFT library loads them, for adapters of a text encoder; or `corpus`:
            Arrow shards with the facts of each network.
        num: Networks kept for each task and architecture.
        best_of: Candidates of each network; the one with the lowest loss on the labelled samples is kept. By default 8,
            or 1 where there are no samples to try networks on.
        temperature: 0 generates the same network every time.
        limit: Maximum number of tasks.
        seed: Keys the noise.
        where: `here`, in this process, or `ray`, over actors. Networks are the same to the last bit
            on processors of one kind.
        device: `cpu`, `cuda` (one GPU for each actor, with `where=ray`) or `auto`: GPUs where there are some. Networks
            of a GPU differ from those of a CPU in rounding.
        batch_size: Candidates generated and scored at once; bounds the memory. An architecture of millions of values
            has smaller batches.
        piece_values: Networks of more values than this are generated in pieces of about so many values, each written to
            its place in the file as soon as it is done, over any number of actors; memory then does not grow with the
            network, and an interrupted run goes on after the last piece. Holds for `into=files` where networks are not
            tried on samples (`try_on_samples=false`, or no task is known) and a method and its sampling can be cut.
        max_file_bytes: Networks of more bytes are kept as a folder of files of at most so many (a larger tensor has its
            own), with `model.safetensors.index.json`, as on the Hugging Face hub. 0 keeps each in one file.
        try_on_samples: Whether networks are run on the samples of their task: to choose the best of several, and to
            report accuracy. `false` needs no memory for whole networks.
        threads: Threads of a process that generates, and CPUs of an actor. More threads speed up large networks;
            results then differ in rounding.
        num_actors: Actors of `ray`; 0 for one for each free core.
        start_timeout: Seconds to wait for a first actor where the cluster is full.
        num_unlabelled: Training samples of each task from which statistics of batch normalisation are estimated anew,
            for every candidate before the choice; 0 leaves them as they were generated. For networks that are not
            tried, such as those in pieces, `raywgen statistics` does that afterwards.
        sampling: Settings of sampling: any of those under `sampling` in the generator's config, which holds for the
            others.

    Examples:
        >>> raywgen.GenerateConfig(generator="runs/mine", tasks="unseen", num=3, out="networks").into
        'files'
    """

    generator: str = "runs/igpg"
    corpus: str = "runs/zoo/corpus"
    tasks: str = "unseen"
    network: str = ""
    networks: list[Any] = field(default_factory=list)
    instruction: str = ""
    data: str = ""
    out: str = "runs/igpg/networks"
    into: Into = "files"
    num: int = 1
    best_of: int | None = None
    temperature: float = 0.5
    limit: int = 24
    seed: int = 0
    where: Where = "here"
    device: Device = "auto"
    batch_size: int = 256
    piece_values: int = 1 << 22
    max_file_bytes: int = 0
    try_on_samples: bool = True
    threads: int = 1
    num_actors: int = 0
    start_timeout: float = 120.0
    num_unlabelled: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(1 if self.best_of is None else self.best_of, self.limit) < 1 or self.temperature < 0:
            raise ValueError("best_of and limit must be at least 1, temperature at least 0")
        if min(self.num, self.batch_size, self.threads) < 1 or self.num_actors < 0 or self.start_timeout <= 0:
            raise ValueError(
                f"num={self.num}, batch_size={self.batch_size} and threads={self.threads} must be at least 1, "
                f"num_actors={self.num_actors} at least 0, start_timeout={self.start_timeout} above 0"
            )
        if self.piece_values < 1 or self.max_file_bytes < 0:
            raise ValueError(
                f"piece_values={self.piece_values} must be at least 1, max_file_bytes={self.max_file_bytes} at least 0"
            )
        if not self.try_on_samples and (self.best_of or 1) > 1:
            raise ValueError(
                f"try_on_samples=false leaves nothing to choose networks by: leave out best_of={self.best_of}"
            )
        if not self.try_on_samples and self.num_unlabelled:
            raise ValueError(
                f"num_unlabelled={self.num_unlabelled}: try_on_samples=false runs no network; leave it out, and "
                f"{AFTERWARDS}"
            )
        if self.max_file_bytes and self.into != "files":
            raise ValueError(f"max_file_bytes={self.max_file_bytes} is of files: leave it out with into={self.into}")
        if self.num_unlabelled < 0 or self.num_unlabelled == 1:
            raise ValueError(
                f"num_unlabelled={self.num_unlabelled}: statistics need at least 2 samples; 0 estimates none"
            )
        if self.num > 1 and self.temperature == 0:
            raise ValueError(f"num={self.num} at temperature=0: all would be one; give a temperature above 0, or num=1")
        if bool(self.instruction) != bool(self.data):
            raise ValueError("instruction and data belong together: give both, or neither")
        if self.network and self.networks:
            raise ValueError("network names one of the corpus, networks are your own: give one of them")
