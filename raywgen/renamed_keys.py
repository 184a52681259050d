"""Keys of configs that have a new name, so that the error for an old key can say the new one.

`CHANGELOG.md` has the same table. A row for `generator.KEY` also holds for the demo and the benchmarks, where the
settings of a method stand under another name, such as `igpg.KEY`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

RENAMED = {
    "generator.tokenizer.quantiser": "generator.tokenizer.quantiser.kind",
    "generator.functional": "generator.task_loss",
    "generator.tokenizer.beam": "generator.tokenizer.quantiser.beam",
    "generator.tokenizer.codebook_decay": "generator.tokenizer.quantiser.decay",
    "generator.tokenizer.functional": "generator.tokenizer.output_loss_weight",
    "generator.tokenizer.num_codes": "generator.tokenizer.quantiser.num_codes",
    "generator.tokenizer.num_levels": "generator.tokenizer.quantiser.num_levels",
    "generator.tokenizer.revive_below": "generator.tokenizer.quantiser.revive_below",
    "way": "execution",
    "block": "batch_size",
}


def new_name(keys: Iterable[str], is_known: Callable[[str], bool]) -> tuple[str, str] | None:
    """Finds the new name of an old key.

    Args:
        keys: Dotted keys to look for, the most specific one first.
        is_known: Tells whether a config has a key of this name.

    Returns:
        The key that was renamed and its new name, or None if no key was renamed.
    """
    for key in keys:
        for old, new in sorted(RENAMED.items(), key=lambda row: -len(row[0])):
            old, new = old.removeprefix("generator."), new.removeprefix("generator.")
            if f".{key}".endswith(f".{old}") and is_known(renamed := key.removesuffix(old) + new):
                return key, renamed
    return None
