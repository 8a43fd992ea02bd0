"""Training times from logit-normal(0, 1) rather than uniform ones give better samples at an equal budget; so does
shifting them, with the sampler's own, towards noise (SD3, arXiv 2403.03206, tables 1 and 2, of 61 densities).

Varies the density of the training times alone (uniform, logit-normal, mode, cosmap; a shift of 3 of logit-normal, in
training and sampling). Measures the validation loss at fixed times and the Frechet distance in 5, 10, 25 and 50 Euler
steps. Shown where all distances together are lower than those of uniform times, and with the shift than without it,
seed by seed.
"""

from common import EMOJI, STEPS, gains, merged, study, told, verdict

SHIFTED = "logit-normal, shift 3"
shift = {"name": "shifted", "shift": 3.0}
DENSITIES = {
    "uniform": {"flow": {"density": "uniform"}},
    "logit-normal(0, 1)": {"flow": {"density": "logit_normal"}},
    "mode(1.29)": {"flow": {"density": "mode"}},
    "cosmap": {"flow": {"density": "cosmap"}},
    SHIFTED: {"flow": {"density": shift}, "sample": {"shift": 3.0}},
}


def main() -> None:
    claim = study(__file__, __doc__, steps=600)
    results = claim.sweep({name: merged(EMOJI, change) for name, change in DENSITIES.items()}, claim.figures)
    distances = [f"FD, {count} steps" for count in STEPS]
    beside = {name: "uniform" for name in DENSITIES if name != "uniform"} | {SHIFTED: "logit-normal(0, 1)"}
    said = {
        f"{name} has a lower distance than {other}": verdict(gains(results, name, other, distances))
        for name, other in beside.items()
    }
    claim.report(results, said)


if __name__ == "__main__":
    told(main)
