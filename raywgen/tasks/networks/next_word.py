"""The upper layers of a causal language model with its head, judged by how well they foresee each word of a text.

What lies below is frozen and the same for all tasks, so it is computed once for each text (`raywgen.tasks.
domain_texts`). Names of tensors are those of transformers' causal model, so that adapters of them are adapters of the
whole model.

Shape legend: S texts, T tokens, H width of the model, V tokens of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raywgen.tasks.base import TaskError
from raywgen.tasks.networks.checks import check_sizes
from raywgen.tasks.networks.text_models import check_causal_digest, load_causal_model
from raywgen.tasks.networks.upper_layers import UpperLayers, mean_feature

_NEARLY_SURE = 1.0 - 1e-6
_TAKEN = "give a Llama, Qwen2 or one like them"


class NextWord(nn.Module):
    """The layers of a causal language model from one on, and its head.

    A text is `text_samples`' row. The outputs are log-probabilities of two events: that the next token is the text's,
    by the geometric mean over its tokens, and that it is another one. So the cross-entropy of texts of class 0 is
    next-word loss in nats a token, in which each text weighs the same.

    Args:
        model: A model of transformers as `AutoModelForCausalLM` loads it. It is taken apart: build one for each of
            these.
        first_layer: Number of the first layer, from 0.

    Raises:
        TaskError: The model has no such layer, cannot be entered at one, reads words that come later, or does more than
            a linear map after its last layer.
    """

    def __init__(self, model: nn.Module, first_layer: int) -> None:
        super().__init__()
        kind, body = type(model).__name__, model.base_model
        head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
        assert isinstance(body, nn.Module)
        if isinstance(getattr(body, "embeddings", None), nn.Module):
            raise TaskError(f"{kind} reads words that come later; give a causal language model")
        names = [name for name, part in model.named_children() if part is head]
        if not names:
            raise TaskError(f"{kind} has more than a linear map after its last layer; {_TAKEN}")
        self._head_name = names[0]
        self._body_name = str(model.base_model_prefix)
        num_layers = int(model.config.num_hidden_layers)  # pyright: ignore[reportAttributeAccessIssue,reportArgumentType]
        if not 0 <= first_layer < num_layers:
            raise TaskError(f"first_layer={first_layer}: {kind} has layers 0 to {num_layers - 1}")
        example_SF, wanted_S = _example(model, first_layer)
        upper = UpperLayers(body, first_layer, 0)
        self.width = upper.width
        self.add_module(self._body_name, upper)
        self.add_module(self._head_name, model.get_submodule(self._head_name))
        if not example_SF.is_meta and not torch.allclose(self.log_p(example_SF), wanted_S, atol=1e-3):
            raise TaskError(f"{kind} has more than a linear map after its last layer; {_TAKEN}")

    def forward(self, x: Tensor) -> Tensor:
        """Returns log-probabilities `(S, 2)` for texts `(S, 2 H + T + T H)`."""
        log_p_S = self.log_p(x)
        other_S = torch.log1p(-log_p_S.exp().clamp(max=_NEARLY_SURE))
        return torch.stack([log_p_S, other_S], dim=-1)

    def log_p(self, x: Tensor) -> Tensor:
        """Returns the mean log-probability of each next token, nats `(S,)`."""
        num_tokens = (x.shape[-1] - 2 * self.width) // (1 + self.width)
        tokens_ST = x[..., 2 * self.width : 2 * self.width + num_tokens].long()
        upper = self.get_submodule(self._body_name)
        assert isinstance(upper, UpperLayers)
        # The layers skip one vector of a text, which is another one for sentences.
        last_STH, is_real_ST = upper.last_hidden(x[..., -(num_tokens + 1) * self.width :])
        logits_STV = self.get_submodule(self._head_name)(last_STH[..., :-1, :])
        chosen_ST = logits_STV.gather(-1, tokens_ST[..., 1:, None])[..., 0] - logits_STV.logsumexp(dim=-1)
        is_next_ST = is_real_ST[..., 1:]
        return (chosen_ST * is_next_ST).sum(dim=-1) / is_next_ST.sum(dim=-1).clamp(min=1)


def next_word(path: str, first_layer: int, digest: str = "") -> NextWord:
    """Builds the upper layers of a pretrained causal language model.

    Args:
        path: Folder of the model in the form of the hub, or `hf:NAME`.
        first_layer: Number of the first of them, from 0.
        digest: The digest of the model's weights, as `causal_digest` returns it, if these must be the same.

    Raises:
        TaskError: The model is not there, is another one than `digest` says, or cannot be entered at this layer.
    """
    check_sizes(first_layer=first_layer + 1)
    check_causal_digest(path, digest)
    return NextWord(load_causal_model(path), first_layer)


@torch.no_grad()
def text_samples(model: nn.Module, tokens_ST: Tensor, is_real_ST: Tensor, first_layer: int) -> Tensor:
    """Returns texts as networks and generators read them, `(S, 2 H + T + T H)`.

    They are the mean of the embeddings and of the last hidden states, each with a mean square of 1, which a generator
    reads, then the tokens' numbers, then the hidden states below the upper layers; padding is zeros.

    Args:
        model: The whole causal language model.
        tokens_ST: Tokens of texts, int64, the beginning of a text before its first.
        is_real_ST: Which are no padding, bool; that is at the end.
        first_layer: Number of the first of the upper layers.
    """
    output = model(input_ids=tokens_ST, attention_mask=is_real_ST.long(), output_hidden_states=True)
    features = [mean_feature(output.hidden_states[at], is_real_ST) for at in (0, -1)]
    below_STH = output.hidden_states[first_layer] * is_real_ST.unsqueeze(-1)
    return torch.cat([*features, (tokens_ST * is_real_ST).float(), below_STH.flatten(1)], dim=1)


@torch.no_grad()
def _example(model: nn.Module, first_layer: int) -> tuple[Tensor, Tensor]:
    """Returns two examples, and the mean log-probability of each one's next tokens by the whole model."""
    tokens_ST = torch.arange(1, 5).expand(2, -1)
    is_real_ST = torch.ones(2, 4, dtype=torch.bool)
    is_real_ST[1, 3:] = False
    log_p_STV = model(input_ids=tokens_ST, attention_mask=is_real_ST.long()).logits.log_softmax(dim=-1)
    chosen_ST = log_p_STV[:, :-1].gather(-1, tokens_ST[:, 1:, None])[..., 0]
    wanted_S = torch.stack([chosen_ST[0].mean(), chosen_ST[1, :2].mean()])
    return text_samples(model, tokens_ST, is_real_ST, first_layer), wanted_S
