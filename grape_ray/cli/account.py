"""``grape-ray account``: noise, epsilon or number of steps, each from the others."""

from __future__ import annotations

import json

import click

from grape_ray.accounting import calibration
from grape_ray.accounting.mechanism import GAUSSIAN, RANDOMIZED, Mechanism
from grape_ray.errors import ConfigError

METHODS = {"gaussian": GAUSSIAN, "randomized": RANDOMIZED}


@click.command("account")
@click.option("--epsilon", type=float, help="Privacy budget, epsilon.")
@click.option("--delta", type=float, required=True, help="Privacy budget, delta.")
@click.option(
    "--sampling-prob", type=float, required=True, help="Chance of each example to be in a batch."
)
@click.option(
    "--steps", type=int, help="Number of steps; leave out to count those that the budget buys."
)
@click.option(
    "--noise-multiplier",
    type=float,
    help="Noise standard deviation over clip norm; leave out to calibrate it.",
)
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    default="gaussian",
    show_default=True,
    help="Exact or randomized clipping.",
)
@click.option("--probes", type=int, default=0, help="Randomized clipping: probes a layer.")
@click.option(
    "--shared-probes",
    is_flag=True,
    help="Randomized clipping: one draw of probes serves the whole batch.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    epsilon, delta, sampling_prob, steps, noise_multiplier, method, probes, shared_probes, as_json
) -> None:
    """Give two of --epsilon, --steps and --noise-multiplier, and get the third.

    Poisson sampling, adding or removing one example, privacy loss distributions; every answer is a
    bound from the safe side.
    """
    if [epsilon, steps, noise_multiplier].count(None) != 1:
        given = [
            name
            for name, v in (
                ("epsilon", epsilon),
                ("steps", steps),
                ("noise-multiplier", noise_multiplier),
            )
            if v is not None
        ]
        fix = "leave out the one to be computed"
        raise ConfigError(
            "account computes one of three",
            ", ".join(given),
            "two of --epsilon, --steps, --noise-multiplier",
            fix,
        )
    name = METHODS[method]
    if noise_multiplier is None:
        options = {"method": name, "probes": probes, "probes_shared": shared_probes}
        noise_multiplier = calibration.noise_multiplier(
            epsilon, delta, sampling_prob, steps, **options
        )
    mechanism = Mechanism(name, sampling_prob, noise_multiplier, probes, shared_probes)
    if steps is None:
        steps = calibration.steps_within(mechanism, epsilon, delta)
    if epsilon is None:
        epsilon = calibration.epsilon(mechanism, steps, delta)
    result = {
        "noise_multiplier": noise_multiplier,
        "epsilon": epsilon,
        "delta": delta,
        "steps": steps,
    }
    result |= {"sampling_prob": sampling_prob, "mechanism": name}
    if name == RANDOMIZED:
        result |= {"probes": probes, "probes_shared": shared_probes}
    if as_json:
        click.echo(json.dumps(result))
        return
    for key, value in result.items():
        click.echo(f"{key:<18}{value:.6g}" if isinstance(value, float) else f"{key:<18}{value}")
