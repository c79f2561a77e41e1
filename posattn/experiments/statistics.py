"""Intervals and paired tests of results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats


def losses_frame(results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Rows of train_length, contestant, seed, length, window, loss (nats a token) of extrapolation results."""
    rows = [
        (result["train_length"], result["contestant"], result["seed"], int(length), window, loss)
        for result in results
        for length, losses in result["losses"].items()
        for window, loss in enumerate(losses)
    ]
    return pd.DataFrame(rows, columns=["train_length", "contestant", "seed", "length", "window", "loss"])


def perplexity_table(losses: pd.DataFrame) -> pd.DataFrame:
    """Mean perplexity over seeds and the half width of its 95% interval (nan for one seed), by contestant and length;
    a row for each, in the order in which they came."""
    by_seed = losses.groupby(["contestant", "length", "seed"], sort=False)["loss"].mean().apply(math.exp)
    found = by_seed.groupby(["contestant", "length"], sort=False).agg(["mean", half_width])
    return found.rename(columns={"mean": "perplexity"}).reset_index()


def half_width(values: Sequence[float]) -> float:
    """Of the 95% interval of a mean, by Student's t; nan for one value."""
    n = len(values)
    if n < 2:
        return math.nan
    return float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))


@dataclass(frozen=True)
class Paired:
    """How much lower a contestant's loss is than another's on the same text, nats a token, in the mean of seeds.

    `low` and `high` bound the difference at 95% over windows (Student's t), `p` is of that test, `p_wilcoxon` of the
    signed ranks, `seeds` how many of the seeds agree in sign.
    """

    difference: float
    low: float
    high: float
    p: float
    p_wilcoxon: float
    seeds: str


def paired(losses: pd.DataFrame, first: str, second: str, length: int) -> Paired:
    """`first` against `second` at a length; positive where `first` is better."""
    here = losses[losses["length"] == length].pivot_table(index=["seed", "window"], columns="contestant", values="loss")
    gap = (here[second] - here[first]).dropna()
    by_window = gap.groupby("window").mean().to_numpy()
    by_seed = gap.groupby("seed").mean().to_numpy()
    mean, half = float(by_window.mean()), half_width(by_window)
    different = bool(np.any(by_window != 0.0)) and len(by_window) > 1
    return Paired(
        mean,
        mean - half,
        mean + half,
        float(stats.ttest_1samp(by_window, 0.0).pvalue) if different else math.nan,
        float(stats.wilcoxon(by_window).pvalue) if different else math.nan,
        f"{int(np.sum(np.sign(by_seed) == np.sign(mean)))} of {len(by_seed)}",
    )


def accuracy_table(results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Of the Chomsky tasks: best and mean over seeds of the mean accuracy past the training length, in percent."""
    rows = [
        (
            result["task"],
            result["contestant"],
            result["seed"],
            100 * float(np.mean([*result["accuracies"].values()])),
        )
        for result in results
    ]
    frame = pd.DataFrame(rows, columns=["task", "contestant", "seed", "accuracy"])
    found = frame.groupby(["task", "contestant"], sort=False)["accuracy"].agg(["max", "mean", "count"])
    return found.rename(columns={"max": "best", "count": "seeds"}).reset_index()


def distance_trend(added: Sequence[float]) -> float:
    """Spearman's rank correlation of what is added to a logit, [N] by key, with the key's distance from the last query:
    below 0 for a local head, above 0 for an anti-local one; 0 where all is equal."""
    values = np.asarray(added, dtype=np.float64)
    if len(values) < 2 or np.all(values == values[0]):
        return 0.0
    return float(stats.spearmanr(np.arange(len(values))[::-1], values).statistic)
