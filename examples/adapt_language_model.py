"""Shows how a language model is adapted to a new question about sentences by an adapter that is written, not trained.

It trains LoRA adapters of a text encoder for many questions ("Is it about rain, or about a dog?"), a hypernetwork on
them, and writes a PEFT folder for a question that none of them was trained for, from its labelled sentences. Name an
encoder that transformers can load as the first argument, and a Parquet file with the columns `sentence`, `label` and
`split` as the second. Without them it makes a tiny transformer of random values and sentences of a few words, which
shows the way and no worth. It needs `transformers`, and no download. It takes about 15 seconds of
one core.

    python examples/adapt_language_model.py [ENCODER SENTENCES]
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import BertConfig, BertModel, BertTokenizer

import raywgen
from raywgen.corpus import Corpus
from raywgen.zoo import ZooConfig, train_zoo
from raywgen.zoo.config import ZooTasks

SIGNS, FILLERS = ("rain", "dog", "song", "bread", "train"), ("the", "old", "new", "very", "was", "is")


def tiny_encoder(folder: Path) -> str:
    """Writes a BERT of two layers with random values, and its tokeniser."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *SIGNS, *FILLERS]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)  # The same again where the program is run again.
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return str(folder)


def few_words(path: Path) -> str:
    """Writes sentences, each with one sign of its class."""
    rows = [
        {"sentence": f"{one} {sign} {other} {last}", "label": label, "split": "test" if number % 3 == 0 else "train"}
        for label, sign in enumerate(SIGNS)
        for number, (one, other, last) in enumerate(itertools.product(FILLERS, FILLERS, FILLERS[:3]))
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def make_zoo(root: Path, encoder: str, sentences: str, first_layer: int, num_steps: int) -> Corpus:
    """Trains an adapter for each of several questions."""
    upper = {"name": "upper-layers", "path": encoder, "first_layer": first_layer, "num_classes": 2, "head": "fitted"}
    lora = {"name": "lora", "base": upper, "rank": 2, "targets": ["query", "value"], "train_head": ["classifier"]}
    zoo = ZooConfig(
        tasks=ZooTasks(kind="sentence-groups", path=sentences, base=encoder, first_layer=first_layer),
        networks=[lora],
        num_seen_tasks=12,
        num_validation_tasks=2,
        num_unseen_tasks=2,
        seeds_per_task=1,
        num_steps=num_steps,
        checkpoint_steps=[num_steps],
        learning_rate=0.01,
        num_condition_samples=16,
        execution="sequential",
    )
    return train_zoo(zoo, str(root / "corpus"), distributed=False)


def main(encoder: str = "", sentences: str = "", out: str = "runs/adapt-language-model", num_steps: int = 60) -> str:
    """Runs all steps into a folder, and returns the adapter's folder."""
    root, first_layer = Path(out), 5 if encoder else 1
    encoder, sentences = encoder or tiny_encoder(root / "encoder"), sentences or few_words(root / "sentences.parquet")
    corpus = make_zoo(root, encoder, sentences, first_layer, num_steps)
    sizes: dict[str, Any] = {"num_workers": 0, "num_condition_samples": 16, "num_query_samples": 16}
    generator = {"task_loss": {"num_steps": num_steps}}
    raywgen.train("hypernetwork", corpus=corpus.location, out=root / "generator", generator=generator, **sizes)
    table = pq.read_table(sentences, columns=["sentence", "label"])
    support = str(root / "question.parquet")
    pq.write_table(table.filter([label in (0, 1) for label in table["label"].to_pylist()]).slice(0, 400), support)
    found = raywgen.adapt(generator=root / "generator", support=support, out=root / "adapter")
    print(f"{found.path}: {found.num_values:,} values; PeftModel.from_pretrained(model, {str(found.path)!r}) loads it")
    return str(found.path)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2]) if len(sys.argv) > 2 else main()
