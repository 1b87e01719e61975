"""The report's plots: what is drawn of a run's records."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lightning_jax.metrics.console import SmoothedLoss
from lightning_jax.metrics.figures import COLORS, INK, Record, figure, peaks
from lightning_jax.metrics.formatting import scientific

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 300  # most columns of a heat map: more would only make the file larger


# Of reinforcement learning: a metric, the heading of its curve, and what it is.
_REINFORCEMENT = (
    ("completion_tokens", "Length of completions", "In tokens, the mean of each generation."),
    ("entropy", "Entropy", "Of the policy at the tokens it is trained on, in nats."),
    ("clip_share", "Clipped tokens", "Share of tokens that the trust region leaves without gradient."),
    (
        "policy_change",
        "Change within a generation",
        "Divergence from the policy that made the rollouts, nats per token.",
    ),
    ("kl", "Divergence from the reference", "From the model as the stage began, nats per token."),
    ("probability_correlation", "Agreement of rollouts and trainer", "Correlation of the probabilities they give."),
    ("equal_reward_groups", "Prompts that teach nothing", "Share of prompts whose completions all have one reward."),
    ("value_explained_variance", "Value model", "Share of the returns' variance that its predictions explain."),
    (
        "length_correlation",
        "Does the reward like length?",
        "Its correlation with the length of completions, among those of one prompt.",
    ),
)
# Of each generation's completions: rates of its parts by their names in the record.
_RATES = {
    "generated_tokens_per_second": "generation",
    "rewarded_tokens_per_second": "reward",
    "scored_tokens_per_second": "scoring by the trainer",
    "tokens_per_second": "update",
}


@dataclass(frozen=True)
class Plot:
    """A figure with its heading and a sentence that says how to read it."""

    title: str
    caption: str
    svg: str


def plots(records: Sequence[Record], unigram_entropy: Mapping[str, float], flops_convention: str) -> list[Plot]:
    """All plots for which the records hold something, in the order of the report.

    Args:
      records: of metrics.jsonl.
      unigram_entropy: nats per token by corpus, drawn as reference lines.
      flops_convention: name of the FLOPs count behind the MFU.
    """
    makers: Iterable[Callable[[], Plot | None]] = (
        lambda: _loss(records, unigram_entropy),
        lambda: _curve(records, "accuracy", "Preference accuracy", "Share of a batch's pairs told right."),
        lambda: _curve(records, "margin", "Preference margin", "Reward of the chosen chat less that of the rejected."),
        lambda: _reward(records),
        *(functools.partial(_curve, records, *described) for described in _REINFORCEMENT),
        lambda: _learning_rate(records),
        lambda: _gradient_norm(records),
        lambda: _batch(records),
        lambda: _throughput(records, flops_convention),
        lambda: _rates_of_generations(records),
        lambda: _expert_load(records),
        lambda: _balance(records),
    )
    return [plot for make in makers if (plot := make()) is not None]


def of_likelihoods(records: Sequence[Record]) -> list[Record]:
    """Those with a loss in nats: that of a policy gradient is near zero whatever the policy is worth."""
    return [record for record in records if "loss" in record and "surrogate" not in record]


def validation_corpora(records: Sequence[Record], measure: str = "validation_loss") -> list[str]:
    """Corpora that the records have the measure of, in alphabetical order."""
    return sorted({corpus for record in records for corpus in record.get(measure, {})})


def validation_curve(
    records: Sequence[Record], corpus: str, measure: str = "validation_loss"
) -> list[tuple[int, float]]:
    """Steps and values of the measure of one corpus."""
    return [(r["step"], r[measure][corpus]) for r in records if corpus in r.get(measure, {})]


def _loss(records: Sequence[Record], unigram_entropy: Mapping[str, float]) -> Plot | None:
    trained = of_likelihoods(records)
    steps, losses = _series(trained, "loss")
    smoothed_loss = SmoothedLoss()
    stages = [record.get("stage") for record in trained]
    smoothed = np.array([smoothed_loss.update(loss, stage) for loss, stage in zip(losses, stages, strict=True)])
    corpora = validation_corpora(records)
    if not np.isfinite(losses).any() and not corpora:
        return None

    def draw(axes: "Axes") -> None:
        seen = [smoothed]
        if steps.size:
            kept = peaks(losses)
            axes.plot(steps[kept], losses[kept], color=COLORS[0], alpha=0.3, linewidth=0.8)
            axes.plot(steps, smoothed, color=COLORS[0], label="training, smoothed")
        for index, corpus in enumerate(corpora):
            color = COLORS[1 + index % (len(COLORS) - 1)]
            at, values = np.array(validation_curve(records, corpus), dtype=float).T
            axes.plot(at, values, "o-", color=color, markersize=3, label=f"validation, {corpus}")
            seen.append(values)
        for corpus, entropy in sorted(unigram_entropy.items()):
            color = COLORS[1 + corpora.index(corpus) % (len(COLORS) - 1)] if corpus in corpora else INK
            axes.axhline(entropy, color=color, linestyle="--", linewidth=0.9, label=f"unigram entropy, {corpus}")
            seen.append(np.array([entropy]))
        # One spike of the raw loss must not flatten everything else: it may leave the picture.
        finite = np.concatenate(seen)
        finite = finite[np.isfinite(finite)]
        if finite.size:
            margin = 0.05 * (np.ptp(finite) or 1.0)
            axes.set_ylim(finite.min() - margin, finite.max() + margin)
        axes.set_ylabel("nats per token")
        axes.legend()

    return Plot(
        "Loss",
        "The faint line is the loss of each logged step. "
        "A model that only knows how often each token occurs would stay at the unigram entropy.",
        figure("Loss", records, [draw], height=3.6),
    )


def _reward(records: Sequence[Record]) -> Plot | None:
    steps, rewards = _series(records, "reward")
    if not np.isfinite(rewards).any():
        return None

    def draw(axes: "Axes") -> None:
        axes.plot(steps, rewards, color=COLORS[0], label="sampled, each generation")
        for index, corpus in enumerate(validation_corpora(records, "validation_reward")):
            at, values = np.array(validation_curve(records, corpus, "validation_reward"), dtype=float).T
            axes.plot(at, values, "o-", color=COLORS[1 + index % 7], markersize=3, label=f"held out, {corpus}")
        axes.legend()

    caption = (
        "Mean over the first prompts of each generation, before any are replaced; on held-out prompts of the "
        "likeliest completions."
    )
    return Plot("Reward", caption, figure("Reward", records, [draw]))


def _learning_rate(records: Sequence[Record]) -> Plot | None:
    return _curve(records, "learning_rate", "Learning rate", "At each logged step.")


def _gradient_norm(records: Sequence[Record]) -> Plot | None:
    caption = "Global norm before clipping; spikes are kept when points are thinned out."
    return _curve(records, "gradient_norm", "Gradient norm", caption, logarithmic=True)


def _curve(records: Sequence[Record], name: str, title: str, caption: str, logarithmic: bool = False) -> Plot | None:
    steps, values = _series(records, name)
    if not np.isfinite(values).any():
        return None

    def draw(axes: "Axes") -> None:
        kept = peaks(values)
        axes.plot(steps[kept], values[kept], color=COLORS[0], linewidth=1.0)
        if logarithmic and (values > 0).any():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter("")
        else:
            axes.yaxis.set_major_formatter(lambda value, _: scientific(value))

    return Plot(title, caption, figure(title, records, [draw]))


def _batch(records: Sequence[Record]) -> Plot | None:
    drawn = []
    for name, unit in (("batch_tokens", "tokens per batch"), ("context_length", "context length")):
        steps, values = _series(records, name)
        if not np.isfinite(values).any():
            continue

        def draw(axes: "Axes", steps: np.ndarray = steps, values: np.ndarray = values, unit: str = unit) -> None:
            axes.step(steps, values, where="post", color=COLORS[0])
            axes.set_ylim(0, 1.15 * np.nanmax(values))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.set_ylabel(unit)

        drawn.append(draw)
    if not drawn:
        return None
    title = "Batch size and context"
    return Plot(title, "As the stages set them.", figure(title, records, drawn, height=1.9 * len(drawn)))


def _throughput(records: Sequence[Record], flops_convention: str) -> Plot | None:
    timings = [{"step": record["step"], **record.get("timing", {})} for record in records]
    steps, rates = _series(timings, "tokens_per_second")
    if not np.isfinite(rates).any():
        return None
    mfu_steps, utilisation = _series(timings, "mfu")

    def draw(axes: "Axes") -> None:
        axes.plot(steps, rates, color=COLORS[0], linewidth=0.9, label="tokens per second")
        axes.set_ylim(0, 1.15 * np.nanmax(rates))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_ylabel("tokens per second")

    def draw_utilisation(axes: "Axes") -> None:
        axes.plot(mfu_steps, 100 * utilisation, color=COLORS[2], linewidth=0.9)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"MFU, % ({flops_convention})")

    known = np.isfinite(utilisation).any()
    caption = "Training steps alone: evaluation, checkpoints and compilation are left out."
    caption += "" if known else " MFU: n/a, the peak of this device is not known."
    drawn = [draw, draw_utilisation] if known else [draw]
    return Plot("Throughput", caption, figure("Throughput", records, drawn, height=1.2 + 1.4 * len(drawn)))


def _rates_of_generations(records: Sequence[Record]) -> Plot | None:
    timings = [{"step": record["step"], **record.get("timing", {})} for record in records]
    if not any("generated_tokens_per_second" in timing for timing in timings):
        return None

    def draw(axes: "Axes") -> None:
        for color, (name, part) in zip(COLORS, _RATES.items(), strict=False):
            axes.plot(*_series(timings, name), color=color, linewidth=0.9, label=part)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_ylabel("tokens per second")
        axes.legend()

    title = "Speed of rollouts, rewards and updates"
    caption = "Tokens of completions over the seconds of each part; of updates, tokens of their rows, padding included."
    return Plot(title, caption, figure(title, records, [draw]))


def _expert_load(records: Sequence[Record]) -> Plot | None:
    steps, load_SLE = _loads(records)
    if not steps.size:
        return None
    _, layers, experts = load_SLE.shape
    bins = np.array_split(np.arange(len(steps)), min(_COLUMNS, len(steps)))
    load_SR = np.stack([load_SLE[group].mean(axis=0).reshape(-1) for group in bins])

    def draw(axes: "Axes") -> None:
        extent = (steps[0], max(steps[-1], steps[0] + 1), layers - 0.5, -0.5)
        image = axes.imshow(
            load_SR.T, aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=0, vmax=2, extent=extent
        )
        for border in np.arange(layers - 1) + 0.5:
            axes.axhline(border, color="white", linewidth=0.6)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("layer")
        axes.grid(False)
        bar = axes.figure.colorbar(image, ax=axes, pad=0.01, extend="max")
        bar.set_label("load / even share")
        bar.outline.set_visible(False)

    caption = (
        f"Each layer's band has one row per expert ({experts}, the first on top). The colour is the number of "
        "tokens it gets relative to an even share, from 0 (idle) to 2 and more (twice its share)."
    )
    height = min(6.0, max(2.4, 0.08 * layers * experts))
    return Plot("Expert load", caption, figure("Expert load", records, [draw], height=height))


def _balance(records: Sequence[Record]) -> Plot | None:
    steps, load_SLE = _loads(records)
    if not steps.size:
        return None
    busiest_SL, idlest_SL = load_SLE.max(axis=2), load_SLE.min(axis=2)
    dropped_steps, dropped = _series(records, "dropped_fraction")

    def draw(axes: "Axes") -> None:
        worst = busiest_SL.max(axis=1)
        kept = peaks(worst)
        axes.plot(steps[kept], worst[kept], color=COLORS[4], linewidth=0.9, label="busiest, worst layer")
        axes.plot(steps, busiest_SL.mean(axis=1), color=COLORS[1], linewidth=0.9, label="busiest, mean over layers")
        axes.plot(steps, idlest_SL.mean(axis=1), color=COLORS[0], linewidth=0.9, label="idlest, mean over layers")
        axes.axhline(1.0, color=INK, linestyle="--", linewidth=0.8)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("load / even share")
        axes.legend()

    def draw_dropped(axes: "Axes") -> None:
        axes.plot(dropped_steps, 100 * dropped, color=COLORS[3], linewidth=0.9)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("dropped, %")

    drawn = [draw, draw_dropped] if np.isfinite(dropped).any() else [draw]
    caption = "Busiest and idlest expert of a layer; 1 is perfect balance." + (
        " Below, the share of routed tokens that found no room." if len(drawn) == 2 else ""
    )
    return Plot("Expert balance", caption, figure("Expert balance", records, drawn, height=1.2 + 1.4 * len(drawn)))


def _series(records: Sequence[Record], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric; what is None becomes NaN."""
    points = [(record["step"], record[name]) for record in records if name in record]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def _loads(records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Steps S and expert loads [S, L, E] of the records that have them in the newest one's shape."""
    pairs = [(r["step"], np.array(r["expert_load"], dtype=float)) for r in records if "expert_load" in r]
    pairs = [(step, load) for step, load in pairs if load.ndim == 2 and load.shape == pairs[-1][1].shape]
    if not pairs:
        return np.zeros(0), np.zeros((0, 0, 0))
    return np.array([step for step, _ in pairs], dtype=float), np.stack([load for _, load in pairs])
