"""Config keys that were renamed, so that the error for an old key can name the new one.

`CHANGELOG.md` has the same table. A row for `generator.KEY` also holds for the demo and the benchmarks, where the
settings of a method stand under another name, such as `igpg.KEY`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

RENAMED = {
    "block": "batch_size",
    "codec.alike": "codec.count_equally",
    "codec.quantiser.trellis.state_bits": "codec.state_bits",
    "codec.small": "codec.min_values",
    "generator.denoiser.chunk_length": "generator.network.chunk_length",
    "generator.denoiser.grad_clip": "generator.denoiser.optimizer.grad_clip",
    "generator.denoiser.kind": "generator.network.kind",
    "generator.denoiser.learning_rate": "generator.denoiser.optimizer.learning_rate",
    "generator.denoiser.num_heads": "generator.network.num_heads",
    "generator.denoiser.num_layers": "generator.network.num_layers",
    "generator.denoiser.optimizer": "generator.denoiser.optimizer.kind",
    "generator.denoiser.warmup_steps": "generator.denoiser.optimizer.warmup_steps",
    "generator.denoiser.weight_decay": "generator.denoiser.optimizer.weight_decay",
    "generator.denoiser.width": "generator.network.width",
    "generator.functional": "generator.task_loss",
    "generator.functional.grad_clip": "generator.task_loss.optimizer.grad_clip",
    "generator.functional.learning_rate": "generator.task_loss.optimizer.learning_rate",
    "generator.functional.optimizer": "generator.task_loss.optimizer.kind",
    "generator.functional.warmup_steps": "generator.task_loss.optimizer.warmup_steps",
    "generator.functional.weight_decay": "generator.task_loss.optimizer.weight_decay",
    "generator.policy.chunk_length": "generator.network.chunk_length",
    "generator.policy.grad_clip": "generator.policy.optimizer.grad_clip",
    "generator.policy.kind": "generator.network.kind",
    "generator.policy.learning_rate": "generator.policy.optimizer.learning_rate",
    "generator.policy.num_heads": "generator.network.num_heads",
    "generator.policy.num_layers": "generator.network.num_layers",
    "generator.policy.optimizer": "generator.policy.optimizer.kind",
    "generator.policy.warmup_steps": "generator.policy.optimizer.warmup_steps",
    "generator.policy.weight_decay": "generator.policy.optimizer.weight_decay",
    "generator.policy.width": "generator.network.width",
    "generator.prior.grad_clip": "generator.prior.optimizer.grad_clip",
    "generator.prior.learning_rate": "generator.prior.optimizer.learning_rate",
    "generator.prior.optimizer": "generator.prior.optimizer.kind",
    "generator.prior.warmup_steps": "generator.prior.optimizer.warmup_steps",
    "generator.prior.weight_decay": "generator.prior.optimizer.weight_decay",
    "generator.regression.grad_clip": "generator.regression.optimizer.grad_clip",
    "generator.regression.learning_rate": "generator.regression.optimizer.learning_rate",
    "generator.regression.optimizer": "generator.regression.optimizer.kind",
    "generator.regression.warmup_steps": "generator.regression.optimizer.warmup_steps",
    "generator.regression.weight_decay": "generator.regression.optimizer.weight_decay",
    "generator.task_loss.anchor": "generator.task_loss.l2_anchor_weight",
    "generator.task_loss.likelihood": "generator.task_loss.nll_weight",
    "generator.task_loss.spread": "generator.task_loss.diversity_weight",
    "generator.tokenizer.beam": "generator.tokenizer.quantiser.beam",
    "generator.tokenizer.codebook_decay": "generator.tokenizer.quantiser.decay",
    "generator.tokenizer.functional": "generator.tokenizer.output_loss_weight",
    "generator.tokenizer.grad_clip": "generator.tokenizer.optimizer.grad_clip",
    "generator.tokenizer.learning_rate": "generator.tokenizer.optimizer.learning_rate",
    "generator.tokenizer.num_codes": "generator.tokenizer.quantiser.num_codes",
    "generator.tokenizer.num_levels": "generator.tokenizer.quantiser.num_levels",
    "generator.tokenizer.optimizer": "generator.tokenizer.optimizer.kind",
    "generator.tokenizer.quantiser": "generator.tokenizer.quantiser.kind",
    "generator.tokenizer.revive_below": "generator.tokenizer.quantiser.revive_below",
    "generator.tokenizer.warmup_steps": "generator.tokenizer.optimizer.warmup_steps",
    "generator.tokenizer.weight_decay": "generator.tokenizer.optimizer.weight_decay",
    "generator.diffusion.sampler": "generator.sampling.sampler",
    "generator.diffusion.sampling_steps": "generator.sampling.num_steps",
    "generator.path.sampling_steps": "generator.sampling.num_steps",
    "use_gpu": "device",
    "way": "execution",
}


def new_name(keys: Iterable[str], is_known: Callable[[str], bool]) -> tuple[str, str] | None:
    """Finds the new name of an old key.

    Args:
        keys: Dotted keys to look for, the most specific one first.
        is_known: Returns whether a config has a key of this name.

    Returns:
        The key that was renamed and its new name, or None if no key was renamed.
    """
    for key in keys:
        for old, new in sorted(RENAMED.items(), key=lambda row: -len(row[0])):
            old, new = old.removeprefix("generator."), new.removeprefix("generator.")
            if f".{key}".endswith(f".{old}") and is_known(renamed := key.removesuffix(old) + new):
                return key, renamed
    return None
