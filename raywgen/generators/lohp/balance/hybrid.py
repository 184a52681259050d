"""The balance of on-policy and off-policy paths together."""

from __future__ import annotations

from torch import Tensor


def hybrid_loss(on_policy: Tensor | None, off_policy: Tensor | None, mix: float) -> Tensor:
    """`(1 - mix) on + mix off`, or the one there is.

    Args:
        on_policy: Loss of the paths that the policy walked; None where the batch holds none.
        off_policy: Loss of the stored paths, likewise.
        mix: Share of off-policy paths.
    """
    assert 0 <= mix <= 1, mix
    if on_policy is None or off_policy is None:
        only = off_policy if on_policy is None else on_policy
        assert only is not None, "a batch without paths"
        return only
    return (1 - mix) * on_policy + mix * off_policy
