"""The local consistency loss of Mc-Di, for noise and for weight prediction.

With `eps ~ N(0, I)`, `theta_i` the i-th local target and `t < i T / k` (arXiv 2502.01117, section 3.2):

    x_t     = sqrt(abar_t^i) theta_i + sqrt(1 - abar_t^i) eps
    L_i^loc = E_t || sqrt(1 - abar_t^i) f(x_t, t) - sqrt(1 - abar_t) eps ||^2

If it is zero, the mean step of the global sampler equals the mean step of every local chain. With k = 1 it is the
vanilla loss `(1 - abar_t) || f - eps ||^2` (the paper's Mv-Di).

**Weight prediction.** A network that predicts the end `w` of the global chain implies the noise
`f = (x_t - sqrt(abar_t) w) / sqrt(1 - abar_t)`. Inserted into the residual r above, with `c = abar_t / abar_t^i`:

    r = sqrt(1 - abar_t) sqrt(abar_t^i / (1 - abar_t^i)) (theta_i - theta_hat_i)
    theta_hat_i = sqrt(abar_t^i) (1 - c) / (1 - abar_t) x_t + (1 - abar_t^i) / (1 - abar_t) sqrt(c) w

`theta_hat_i` is the local target that the prediction implies. This form never divides by a small number.

**Weighting over time.** All published variants minimise the same residual and differ by a factor of t:

    paper     r^2
    noise     r^2 / (1 - abar_t)                               uniform in the noise of the local chain
    weights   r^2 (1 - abar_t) / (abar_t (1 - abar_t^i))       uniform in w
    local     || theta_i - theta_hat_i ||^2                    uniform in the local target

For k = 1 `weights` and `local` are the same.

Here B counts samples of the chain.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Parameterisation = Literal["weights", "noise"]
Weighting = Literal["local", "paper", "noise", "weights"]


def noised(target_BD: Tensor, local_abar_B: Tensor, eps_BD: Tensor) -> Tensor:
    """Returns `x_t = sqrt(abar_t^i) theta_i + sqrt(1 - abar_t^i) eps`, `(B, D)`."""
    signal_B1 = local_abar_B.unsqueeze(-1)
    return signal_B1.sqrt() * target_BD + (1 - signal_B1).sqrt() * eps_BD


def local_consistency_loss(
    prediction_BD: Tensor,
    target_BD: Tensor,
    eps_BD: Tensor,
    abar_B: Tensor,
    local_abar_B: Tensor,
    *,
    parameterisation: Parameterisation,
    weighting: Weighting,
    weight_BD: Tensor | None = None,
) -> Tensor:
    """Returns `|| sqrt(1 - abar_t^i) f(x_t, t) - sqrt(1 - abar_t) eps ||^2 / D`, `(B,)` (Mc-Di, section 3.2).

    Args:
        prediction_BD: The network's prediction for `noised(target_BD, local_abar_B, eps_BD)`.
        target_BD: `theta_i`.
        eps_BD: The noise.
        abar_B: Signal of the global chain at t.
        local_abar_B: Signal of the i-th local chain at t, at least `abar_B`.
        parameterisation: Whether the prediction is `noise` or `weights`.
        weighting: Factor over time: `paper`, `noise`, `weights` or `local`; see the module's docstring.
        weight_BD: Weight of each value in the mean over D, 1 on average; equal for all by default.
    """
    abar_B1, local_B1 = abar_B.unsqueeze(-1), local_abar_B.unsqueeze(-1)
    factor_B = _factor(weighting, abar_B, local_abar_B)
    if parameterisation == "noise":
        residual_BD = (1 - local_B1).sqrt() * prediction_BD - (1 - abar_B1).sqrt() * eps_BD
        return factor_B * _mean(residual_BD.square(), weight_BD)
    x_BD = noised(target_BD, local_abar_B, eps_BD)
    c_B1 = abar_B1 / local_B1
    x_share_B1 = local_B1.sqrt() * (1 - c_B1) / (1 - abar_B1)
    implied_BD = x_share_B1 * x_BD + (1 - local_B1) / (1 - abar_B1) * c_B1.sqrt() * prediction_BD
    squared_residual_per_local_B = (1 - abar_B) * local_abar_B / (1 - local_abar_B)
    return factor_B * squared_residual_per_local_B * _mean((target_BD - implied_BD).square(), weight_BD)


def _mean(square_BD: Tensor, weight_BD: Tensor | None) -> Tensor:
    return (square_BD if weight_BD is None else weight_BD * square_BD).mean(dim=-1)


def _factor(weighting: Weighting, abar_B: Tensor, local_abar_B: Tensor) -> Tensor:
    """Returns the factor of the squared residual."""
    match weighting:
        case "paper":
            return abar_B.new_ones(abar_B.shape)
        case "noise":
            return 1 / (1 - abar_B)
        case "weights":
            return (1 - abar_B) / (abar_B * (1 - local_abar_B))
        case "local":
            return (1 - local_abar_B) / (local_abar_B * (1 - abar_B))
