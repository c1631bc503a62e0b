"""Fits the law of routed models to the results of this experiment, and writes it into the README, with a figure.

    python -m experiments.expert_count.fit --scale=quick
"""

import argparse
import io
import pathlib

import numpy as np

from experiments.expert_count.sweep import COUNTS, SWEEP, WIDTHS, arm
from moe_jax.analysis.report_figures import new_figure
from moe_jax.analysis.scaling_law import PUBLISHED, ScalingLaw, fit
from moe_jax.files import whole
from moe_jax.sweeps.results import Key, finished
from moe_jax.sweeps.tables import markdown, put_between_marks

FOLDER = pathlib.Path(__file__).resolve().parent


def read(scale: str) -> dict[str, np.ndarray]:
    """Of every finished run: ``parameters`` of its model with one expert, ``experts``, ``loss``."""
    rows = []
    for width in WIDTHS:
        for seed in range(SWEEP.scales[scale].seeds):
            one = finished(SWEEP, FOLDER / "results", Key(arm(width, 1), scale, seed))
            for experts in COUNTS:
                result = finished(SWEEP, FOLDER / "results", Key(arm(width, experts), scale, seed))
                if one and result:
                    rows.append((one["parameters"]["total"], experts, result["metrics"]["ce"]))
    return dict(zip(("parameters", "experts", "loss"), np.array(rows, np.float64).reshape(-1, 3).T))


def table(law: ScalingLaw, rest: float, runs: int, picture: str) -> str:
    header = ["", "a", "b", "c", "d", "E_start", "E_max"]
    row = lambda name, law: [name, *(f"{value:.3f}" for value in (law.a, law.b, law.c, law.d, law.start, law.most))]
    rows = [header, row("ours", law), *(row(f"{name}, Clark et al. 2022", other) for name, other in PUBLISHED.items())]
    return (f"{markdown(rows)}\n\nLeast squares of log10 loss over {runs} runs; root mean square of what remains {rest:.4f} "
            f"({100 * (10 ** rest - 1):.1f} % of the loss).\n\n![the law](results/{picture})")


def draw(runs: dict[str, np.ndarray], law: ScalingLaw):
    figure, axes = new_figure(3.4, 1, 1)
    counts = np.geomspace(1, max(COUNTS), 60)
    for size in np.unique(runs["parameters"]):
        mine = runs["parameters"] == size
        (line,) = axes[0, 0].plot(counts, law.loss(size, counts), label=f"{size / 1e6:.2f} M parameters with one expert")
        axes[0, 0].plot(runs["experts"][mine], runs["loss"][mine], "o", color=line.get_color(), markersize=4)
    axes[0, 0].set_xscale("log", base=2)
    axes[0, 0].set_xticks(COUNTS, COUNTS)
    axes[0, 0].set_yscale("log")
    axes[0, 0].yaxis.set_major_formatter("{x:g}")
    axes[0, 0].yaxis.set_minor_formatter("{x:g}")
    axes[0, 0].set_xlabel("experts")
    axes[0, 0].set_ylabel("cross-entropy, nats per token")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scale", default="quick", choices=("quick", "full"))
    scale = parser.parse_args().scale
    runs = read(scale)
    try:
        law, rest = fit(runs["parameters"], runs["experts"], runs["loss"])
    except ValueError as error:
        raise SystemExit(f"{error}. Run moe-jax sweep experiments/expert_count --scale={scale} first.")
    buffer = io.BytesIO()
    draw(runs, law).savefig(buffer, format="png", metadata={"Software": None})
    picture = f"law_{scale}.png"
    with whole(FOLDER / "results" / picture) as file:
        file.write(buffer.getvalue())
    text = table(law, rest, len(runs["loss"]), picture)
    put_between_marks(FOLDER / "README.md", f"law at scale {scale}", text)
    print(text)


if __name__ == "__main__":
    main()
