"""A causal language model of about a million values with a tokeniser of its own, trained on files of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from raywgen.benchmarks.recipes import folder_of
from raywgen.progress import Reporter
from raywgen.tasks.networks.text_models import transformers_module
from raywgen.tasks.text_tasks import split_texts

_BEGIN, _END, _UNKNOWN = "<s>", "</s>", "<unk>"


@dataclass(kw_only=True)
class DecoderConfig:
    """Size and training of a small decoder, a Llama.

    Attributes:
        paths: Files of texts; those that their column `split` keeps for tests are left out.
        vocab_size: Tokens of its tokeniser, pairs of bytes that are merged by their frequency in these texts.
        width: Width of its hidden states.
        num_layers: Its layers.
        max_tokens: Tokens after which a text is cut.
        num_steps: Steps of AdamW, at a rate that falls by a cosine.
        batch_size: Texts of a step.
        learning_rate: Rate at the first step.
    """

    paths: list[str] = field(default_factory=list)
    vocab_size: int = 2048
    width: int = 96
    num_layers: int = 3
    max_tokens: int = 24
    num_steps: int = 400
    batch_size: int = 32
    learning_rate: float = 3e-3


def small_decoder(root: str, config: DecoderConfig, seed: int) -> str:
    """Trains a decoder, or finds it trained; returns its folder, as transformers loads it."""
    folder = Path(folder_of(root, "decoder", asdict(config) | {"seed": seed}))
    if (folder / "config.json").is_file():
        return str(folder)
    transformers: Any = transformers_module()
    parts = (split_texts(path)[:2] for path in config.paths)
    texts = [text for data, train_S in parts for text in data.sentences_at(train_S)]
    tokenizer = _tokenizer(texts, config.vocab_size, transformers)
    found = tokenizer(texts)["input_ids"]
    tokens = [[tokenizer.bos_token_id, *own, tokenizer.eos_token_id][: config.max_tokens] for own in found]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.width,
                intermediate_size=3 * config.width,
                num_hidden_layers=config.num_layers,
                num_attention_heads=max(1, config.width // 32),
                max_position_embeddings=256,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        _train(model, tokens, config)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)  # Its config.json comes last, and says that all is there.
    return str(folder)


def _tokenizer(texts: Sequence[str], vocab_size: int, transformers: Any) -> Any:
    import tokenizers  # It comes with transformers.

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_UNKNOWN, _BEGIN, _END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    names = {"bos_token": _BEGIN, "eos_token": _END, "unk_token": _UNKNOWN, "pad_token": _END}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names)


def _train(model: Any, tokens: Sequence[Sequence[int]], config: DecoderConfig) -> None:
    """Trains by the loss of the next token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.num_steps)
    batches = _batches(len(tokens), config.batch_size)
    with Reporter().step("decoder", f"train {sum(part.numel() for part in model.parameters()):,} values") as bar:
        for step in range(config.num_steps):
            chosen = [torch.tensor(tokens[row]) for row in next(batches)]
            tokens_ST = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
            is_real_ST = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in chosen], batch_first=True)
            labels_ST = tokens_ST.masked_fill(is_real_ST == 0, -100)
            loss = model(input_ids=tokens_ST, attention_mask=is_real_ST, labels=labels_ST).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update(step + 1, config.num_steps)
    model.eval()


def _batches(num: int, size: int) -> Iterator[list[int]]:
    """Yields rows without end, each once before any comes again."""
    while True:
        order = torch.randperm(num).tolist()
        for first in range(0, num - size + 1, size):
            yield order[first : first + size]
