"""Samples weights along the global chain, from noise.

One step goes from t to u > t. With `alpha = abar_t / abar_u`, `f` the predicted noise and `w` the predicted weights:

    mean           x_u = (x_t - (1 - alpha) / sqrt(1 - abar_t) f) / sqrt(alpha)           (DDPM's mean, Ho et al. 2020)
    stochastic     x_u + sqrt((1 - alpha) (1 - abar_u) / (1 - abar_t)) n,  n ~ N(0, I)    (DDPM)
    deterministic  x_u = sqrt(abar_u) w + sqrt(1 - abar_u) f                              (DDIM, eta = 0)

A sampling step may span several steps of the chain, so sampling needs fewer steps than the chain has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from raywgen.generators.mcdi.local_consistency import Parameterisation
from raywgen.generators.mcdi.schedule import Schedule
from raywgen.weights import KeyedNoise

Sampler = Literal["mean", "stochastic", "deterministic"]

Predict = Callable[[Tensor, Tensor], Tensor]
"""Maps states `(B, D)` and their steps int64 `(B,)` to predicted noise or weights `(B, D)`."""


def sample(
    predict: Predict,
    start_BD: Tensor,
    schedule: Schedule,
    *,
    parameterisation: Parameterisation,
    sampler: Sampler,
    num_steps: int,
    noise: KeyedNoise | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Returns the weights `(B, D)` at the end of the chain, differentiable in the parameters of `predict`.

    Args:
        predict: The denoiser with its condition.
        start_BD: The noise that the chain starts from.
        schedule: The chain.
        parameterisation: Whether `predict` gives `noise` or `weights`.
        sampler: `mean`, `stochastic` or `deterministic`.
        num_steps: Number of sampling steps, at most those of the chain.
        noise: B rows of keyed noise, for the stochastic sampler.
        temperature: Scales the noise of the stochastic sampler.
    """
    x_BD = start_BD
    for t, u in schedule.steps(num_steps):
        t_B = torch.full((len(x_BD),), t, dtype=torch.int64, device=x_BD.device)
        abar_t, abar_u = float(schedule.abar_T[t]), float(schedule.abar_T[u])
        prediction_BD = predict(x_BD, t_B)
        if sampler == "deterministic":
            x_BD = _deterministic_step(x_BD, prediction_BD, abar_t, abar_u, parameterisation)
            continue
        x_BD = mean_step(x_BD, prediction_BD, abar_t, abar_u, parameterisation)
        if sampler == "stochastic" and abar_u < 1:
            assert noise is not None, "the stochastic sampler draws noise"
            variance = (1 - abar_t / abar_u) * (1 - abar_u) / (1 - abar_t)
            x_BD = x_BD + temperature * variance**0.5 * noise.normal(x_BD.shape[1])
    return x_BD


def mean_step(
    x_BD: Tensor, prediction_BD: Tensor, abar_t: float, abar_u: float, parameterisation: Parameterisation
) -> Tensor:
    """The mean of `x_u` given `x_t`; for weights in the form that divides by nothing small."""
    alpha = abar_t / abar_u
    if parameterisation == "noise":
        return (x_BD - (1 - alpha) / (1 - abar_t) ** 0.5 * prediction_BD) / alpha**0.5
    weights_share = abar_u**0.5 * (1 - alpha) / (1 - abar_t)
    state_share = alpha**0.5 * (1 - abar_u) / (1 - abar_t)
    return weights_share * prediction_BD + state_share * x_BD


def _deterministic_step(
    x_BD: Tensor, prediction_BD: Tensor, abar_t: float, abar_u: float, parameterisation: Parameterisation
) -> Tensor:
    if parameterisation == "noise":
        noise_BD = prediction_BD
        weights_BD = (x_BD - (1 - abar_t) ** 0.5 * noise_BD) / abar_t**0.5
    else:
        weights_BD = prediction_BD
        noise_BD = (x_BD - abar_t**0.5 * weights_BD) / (1 - abar_t) ** 0.5
    return abar_u**0.5 * weights_BD + (1 - abar_u) ** 0.5 * noise_BD
