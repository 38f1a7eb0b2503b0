"""`rayx lld`: from two models on disk to the mixture that takes one towards the other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console

from rayx.cli.options import JsonOption, parse_numbers
from rayx.cli.output import grid_of, warn
from rayx.corpus import Corpus
from rayx.errors import SpecError, did_you_mean
from rayx.likelihoods import Likelihoods, kl_bits_per_byte, mean_gap_bits_per_byte
from rayx.methods.lld import Estimate, aligned, identity_kernel
from rayx.methods.lld_sweep import SweepInversion, sweep_records
from rayx.recipe import Evaluation
from rayx.spec import TrainSpec
from rayx.store import open_store

if TYPE_CHECKING:
    from rayx.proxy.models import Model

IDENTITY, PROJECTION, GRADIENT, SWEEP = "identity", "projection", "gradient", "sweep"
STRANGE = 9.0  # mean square distance from the nearest mixture, in variances of a run's noise
ESTIMATORS = (IDENTITY, PROJECTION, GRADIENT, SWEEP)


def lld(
    base: Annotated[str, typer.Argument(help="Where training starts: a checkpoint or a folder.")],
    target: Annotated[str, typer.Argument(help="The model to be approached, of any kind.")],
    corpus: Annotated[str, typer.Option(help="Corpus whose domains are to be mixed.")],
    sweep: Annotated[
        str | None, typer.Option(help="Store of proxies trained from the base; inverted.")
    ] = None,
    estimator: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(ESTIMATORS)}. [default: sweep with --sweep, else identity]"),
    ] = None,
    prior: Annotated[
        str | None, typer.Option(help="name=weight,… to lean to. [default: uniform]")
    ] = None,
    ridge: Annotated[float, typer.Option(help="Strength of KL to the prior.")] = 0.0,
    temperature: Annotated[float, typer.Option(help="Of identity and projection.")] = 1.0,
    sequences: Annotated[int, typer.Option(min=1, help="Of each domain, at most.")] = 64,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of the corpus a text. [default: what both can take]"),
    ] = None,
    part: Annotated[str, typer.Option(help="Of the held-out text: first, second or all.")] = (
        "first"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Find the mixture that takes a base model towards a target model, as distributions.

    Both are read on held-out text (log-likelihood vectors). With --sweep, texts and context are
    those that the sweep's runs were evaluated on.

    Example: `rayx lld base.safetensors models/target --corpus data/mine --sweep runs/proxies`
    """
    name = estimator or (SWEEP if sweep else IDENTITY)
    if name not in ESTIMATORS:
        hint = did_you_mean(name, ESTIMATORS)
        raise SpecError(f"--estimator is {name!r}; expected one of {', '.join(ESTIMATORS)}.{hint}")
    if (name == SWEEP) != (sweep is not None):
        raise SpecError(f"--estimator {name} and --sweep {sweep}; give --sweep with sweep alone.")
    by_kernel = name in (IDENTITY, PROJECTION)
    if (ridge and by_kernel) or (temperature != 1.0 and not by_kernel):
        raise SpecError(f"--ridge is of {GRADIENT} and {SWEEP}, --temperature of the others; "
                        f"the estimator is {name}.")  # fmt: skip
    leaning = parse_numbers("--prior", prior) or None
    opened = Corpus.load(corpus)
    inversion = None
    evaluation = Evaluation(points=1, sequences=sequences, part=part)
    if sweep:
        inversion, spec = _inversion(sweep, opened)
        evaluation, context = spec.evaluation, spec.model.context
    from rayx.proxy.likelihood import likelihoods  # torch takes seconds to import
    from rayx.proxy.models import open_model

    models = [open_model(path, device) for path in (base, target)]
    length = context or min(model.usual_context for model in models)
    first, second = likelihoods(models, opened, length, evaluation)
    if inversion is not None:
        found = inversion.estimate(second.bits_per_byte, leaning, ridge)
    elif name == GRADIENT:
        kernel_NK = _gradients(models[0], opened, evaluation, device)
        found = aligned(first, second, kernel_NK, leaning, ridge)
    else:
        found = identity_kernel(first, second, leaning, temperature, name == PROJECTION)
    facts = {
        "estimator": name,
        "weights": dict(found.mixture),
        "aligned": found.aligned,
        "cosine": None if np.isnan(found.cosine) else found.cosine,
        "misfit": found.misfit,
        "kl_bits_per_byte": kl_bits_per_byte(first, second),
        "target_ahead_bits_per_byte": mean_gap_bits_per_byte(second, first),
        "bits_per_byte": {
            what: dict(zip(vector.targets, vector.bits_per_byte.tolist(), strict=True))
            for what, vector in (("base", first), ("target", second))
        },
        "corpus": opened.fingerprint, "context": length, "sequences": evaluation.sequences,
        "part": evaluation.part, "runs": len(inversion.losses_RT) if inversion else 0,
    }  # fmt: skip
    if as_json:
        return typer.echo(json.dumps(facts))
    _show(found, facts, first)


def _inversion(url: str, corpus: Corpus) -> tuple[SweepInversion, TrainSpec]:
    """Return the sweep of a store turned round, and one of its specs."""
    records = sweep_records(open_store(url).records())
    specs = [record.spec for record in records]
    spec = specs[0]
    assert isinstance(spec, TrainSpec)  # sweep_records returns no others
    if spec.corpus != corpus.fingerprint:
        raise SpecError(
            f"The sweep {url!r} is on corpus {spec.corpus}, and {corpus.url} is "
            f"{corpus.fingerprint}. Give the corpus that its runs were trained on."
        )
    domains = tuple(corpus.domains)
    weights_RK = np.stack([s.mixture.to_array(domains) for s in specs])
    losses_RT = np.array([[record.losses[d].bpb for d in domains] for record in records])
    return SweepInversion(weights_RK=weights_RK, losses_RT=losses_RT, domains=domains), spec


def _gradients(model: Model, corpus: Corpus, evaluation: Evaluation, device: str) -> np.ndarray:
    from rayx.proxy.likelihood import gradient_kernel
    from rayx.proxy.models import RayxModel

    if not isinstance(model, RayxModel):
        raise SpecError(
            f"--estimator {GRADIENT} needs gradients, and {model.name} is no checkpoint of rayx. "
            f"Use {IDENTITY}, or {SWEEP}."
        )
    return gradient_kernel(model.tensors, model.shape, corpus, evaluation, device=device)


def _show(found: Estimate, facts: Mapping[str, Any], base: Likelihoods) -> None:
    grid = grid_of("", "weight", "base", "target")
    for domain in base.targets:
        losses = (facts["bits_per_byte"][what][domain] for what in ("base", "target"))
        grid.add_row(domain, f"{found.mixture.get(domain, 0.0):.4f}", *(f"{v:.4f}" for v in losses))
    Console().print(grid)
    typer.echo(
        f"base and target (bits per byte above): divergence {facts['kl_bits_per_byte']:.4f} bits "
        f"per byte, target ahead by {facts['target_ahead_bits_per_byte']:+.4f}; estimator "
        f"{facts['estimator']}, {facts['sequences']} texts a domain at most, context "
        f"{facts['context']}, part {facts['part']}"
    )
    if not found.aligned:
        warn(["no mixture takes the base nearer to the target; the weights are the prior's"])
    if facts["runs"] and found.misfit > STRANGE * len(base.targets):
        sds = (found.misfit / len(base.targets)) ** 0.5
        warn([f"the target's losses are {sds:.0f} standard deviations of a run's noise from those "
              "of the nearest mixture: it was not trained as the sweep's runs were"])  # fmt: skip
