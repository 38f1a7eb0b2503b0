"""The page: whole, closed to the outside, honest about what is missing, the same every time."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

import rayx
from rayx.choose import Constraints, Simulate, choose
from rayx.fit import Table, fit_table
from rayx.mixture import Mixture, epochs
from rayx.report import render
from rayx.synthetic import World
from rayx.verify import compare, verification_specs

SECTIONS = "verdict warnings mixture verification fit response interaction curves".split()
SECTIONS += "regressors cost failures provenance".split()
VOID = {"meta", "br", "link", "img", "input", "hr"}
HOSTILE = ("<script>alert(1)</script>", 'a"b&c', "$x^2$ or $y$", "_under'score")


class Page(HTMLParser):
    """Reads a page, refusing tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self.section = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} is given twice"
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"] or ""

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.setdefault(self.section, []).append(data)

    def text(self, section: str) -> str:
        return " ".join(" ".join(self.words[section]).split())


def make_world(names=None, **changes) -> World:
    world = World.random(4, 3, seed=1, **changes)
    if names is None:
        return world
    supply = dict(zip(names, world.supply.values(), strict=True))
    return dataclasses.replace(world, domains=names, targets=names[:3], supply=supply)


def fill(world: World, folder, num_runs: int = 40):
    store = rayx.open(folder, create=True)
    weights_RK = np.random.default_rng(0).dirichlet(np.ones(4), num_runs)
    world.fill(
        store, [world.spec(Mixture.from_array(w, world.domains), 400_000) for w in weights_RK]
    )
    return store


def full_inputs(world: World, folder, seeds=(1000, 1001, 1002)) -> dict:
    """Everything that `render` takes, with a regressor that fits in a second."""
    store = fill(world, folder)
    fitted = fit_table(Table.from_frame(store.runs()), "inverse-power")
    objective = {world.targets[0]: 0.75, world.targets[1]: 0.25}
    caps = {world.domains[0]: 0.4}
    constraints = Constraints.by_name(fitted.table.domains, caps=caps)
    choice = choose(
        fitted, objective, world.supply, constraints, seed=0, method=Simulate(num_candidates=5_000)
    )
    arms = {
        "choice": Mixture(choice.weights),
        "uniform": Mixture.uniform(world.domains),
        "proportional": Mixture(world.supply),
    }
    specs = verification_specs(world.spec({world.domains[0]: 1}, 1_600_000), arms, seeds)
    sound = dataclasses.replace(world, failing_share=0.0)
    sound.fill(store, [spec for of_arm in specs.values() for spec in of_arm])
    mixture = arms["choice"]
    plan = {
        "schedule": [{"mixture": mixture.millionths, "tokens": 5_000_000}],
        "domain_tokens": dict(world.supply),
        "epochs": epochs(mixture, 5_000_000, world.supply),
        "labels": {"licence": {"permissive": 0.8125, "<copyleft>": 0.1875}},
        "provenance": {"runs": "0123456789abcdef", "created": "2026-01-01T00:00:00+00:00"},
    }
    return {
        "store": store,
        "fitted": fitted,
        "choice": choice,
        "verification": compare(store, specs, objective),
        "plan": plan,
        "caps": caps,
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict:
    return full_inputs(make_world(HOSTILE, failing_share=0.1), tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def page_text(inputs) -> str:
    return render(**inputs, title="A & B <i>report</i>")


def test_page_is_well_formed_with_every_section_and_unique_ids(page_text):
    page = Page(page_text)
    assert list(page.words)[1:] == SECTIONS
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(#|href="#)([^)"]+)', page_text)
    assert set(used) <= set(ids)


def test_page_fetches_nothing_and_runs_nothing(page_text):
    page = Page(page_text)
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, _ in page.tags}
    for tag, attrs in page.tags:
        for name, value in attrs.items():
            assert "//" not in (value or "") or name.startswith("xmlns"), (tag, name, value)
            assert not name.startswith("on") and name not in ("src", "srcset"), (tag, name)
            assert not name.endswith("href") or (value or "").startswith("#")
    outside = re.sub(r' xmlns(:\w+)?="[^"]*"', "", page_text)
    assert "http" not in outside and "@import" not in outside
    assert set(re.findall(r"url\((.)", outside)) == {"#"}


def test_page_hostile_names_are_text_everywhere(page_text):
    page = Page(page_text)
    assert "<script" not in page_text and "<i>report" not in page_text
    for name in HOSTILE:
        assert name in page.text("mixture")
    assert 'a"b&c: lowest at' in page.text("response")
    assert "$x^2$ or $y$: lowest at" in page.text("response")
    labels = [attrs["aria-label"] or "" for tag, attrs in page.tags if tag == "svg"]
    assert all(any(name in label for label in labels) for name in HOSTILE)


def test_page_figures_follow_the_reader_in_light_and_dark(page_text):
    for svg in re.findall(r"<svg.*?</svg>", page_text, flags=re.DOTALL):
        colors = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg))
        assert all(c in ("none", "currentColor") or c.startswith("var(--") for c in colors), colors
        assert re.search(r'<svg role="img" aria-label="[^"]+" viewBox="0 0 \d', svg)
        assert " width=" not in svg.split(">", 1)[0]
    declared = set(re.findall(r"(--\w+):", page_text))
    assert set(re.findall(r"var\((--\w+)\)", page_text)) <= declared
    assert "prefers-color-scheme: dark" in page_text


def test_page_same_inputs_give_the_same_bytes_and_leave_matplotlib_alone(inputs, page_text):
    import matplotlib

    before = dict(matplotlib.rcParams)
    assert render(**inputs, title="A & B <i>report</i>") == page_text
    assert dict(matplotlib.rcParams) == before


def test_page_states_what_was_decided_and_measured(inputs, page_text):
    page, choice, checked = Page(page_text), inputs["choice"], inputs["verification"]
    verdict = page.text("verdict")
    assert "Confirmed: a clear win over every baseline." in verdict
    assert checked["verdict"] in verdict
    assert f"{choice.predicted:.4f} bpb" in verdict
    assert f"{choice.baselines['proportional'].regret:+.4f}" in verdict
    measured = checked["comparisons"]["proportional"]["difference_bpb"]
    assert f"{-measured:+.4f}" in verdict
    assert f"noise of one seed {checked['seed_sd_bpb']:.4f}" in verdict
    mixture = page.text("mixture")
    for domain, share in choice.weights.items():
        assert f"{100 * share:.1f}%" in mixture
        assert f"{inputs['plan']['epochs'].get(domain, 0):.2f}" in mixture
    assert "40.0%" in mixture  # the cap
    assert "permissive" in mixture and "81.2%" in mixture and "<copyleft>" in mixture
    for warning in choice.warnings:
        assert warning in page.text("warnings")
    failed = sum(s == "failed" for s in inputs["store"].status().values())
    assert f"{failed} of 49 runs failed" in page.text("failures")
    assert "Loss is not finite at step" in page.text("failures")
    provenance = page.text("provenance")
    assert f"49 recorded, {failed} failed, {40 - failed} fitted" in provenance
    assert set(inputs["store"].runs()["corpus"]) <= set(provenance.split())
    assert "0123456789abcdef" in provenance


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ((-0.1, -0.05), "Confirmed"),
        ((-0.1, -0.03), "Partly confirmed: a clear win over 1 of 2"),
        ((-0.1, 0.1), "Not confirmed: clearly worse than 1 of 2"),
        ((0.001, -0.001), "Not confirmed: every difference is within the noise"),
    ],
)
def test_verdict_follows_the_differences_and_their_t_intervals(inputs, differences, words):
    checked = {**inputs["verification"]}
    checked["comparisons"] = {
        arm: {"difference_bpb": d, "stderr_bpb": 0.01, "seeds_won": 1, "seeds": 3}
        for arm, d in zip(("uniform", "proportional"), differences, strict=True)
    }
    page = Page(render(**{**inputs, "verification": checked}))
    assert words in page.text("verdict")


def test_page_one_seed_claims_no_confirmation(tmp_path):
    inputs = full_inputs(make_world(), tmp_path / "one", seeds=(1000,))
    page = Page(render(**inputs))
    assert "Not confirmed" in page.text("verdict")
    assert "noise unknown: one seed" in page.text("verdict")
    assert "one seed, so no interval" in page.text("verification")


def test_page_empty_store_says_what_is_missing(tmp_path):
    page = Page(render(rayx.open(tmp_path / "empty", create=True)))
    assert list(page.words)[1:] == SECTIONS
    assert "No mixture chosen yet" in page.text("verdict")
    for section in ("fit", "response", "interaction", "regressors"):
        assert "Nothing has been fitted yet" in page.text(section)
    assert "has not been verified" in page.text("verification")
    assert "No run has ended yet" in page.text("cost")


def test_page_only_failures_counts_them_with_their_message(tmp_path):
    store = fill(make_world(failing_share=1.0), tmp_path / "failed", num_runs=9)
    page = Page(render(store))
    assert "9 of 9 runs failed" in page.text("failures")
    assert "Loss is not finite at step" in page.text("failures")
    assert "9 of 9 runs failed" in page.text("warnings")
    assert "No finished run has evaluations" in page.text("curves")
    assert "9" in page.text("cost")


def test_page_fitted_without_choice_shows_the_fit_around_the_mean_mixture(tmp_path):
    store = fill(make_world(), tmp_path / "fitted")
    fitted = fit_table(Table.from_frame(store.runs()), "ridge")
    page = Page(render(store, fitted))
    assert "40 runs are fitted" in page.text("verdict")
    assert "No mixture has been chosen" in page.text("mixture")
    assert "the mean mixture of the runs" in page.text("response")
    assert "objective: R" in page.text("fit")


def test_page_choice_without_signal_says_so(tmp_path):
    world = make_world(noise_sd=5.0)
    flat = dataclasses.replace(world, gain=np.full((3, 4), 5.0), power=np.full((3, 4), 1e-3))
    store = fill(dataclasses.replace(flat, floor=np.full(3, 30.0)), tmp_path / "flat")
    fitted = fit_table(Table.from_frame(store.runs()), "ridge")
    choice = choose(fitted, {"web": 1.0}, world.supply, seed=0, method=Simulate(num_candidates=500))
    assert not choice.signal
    page = Page(render(store, fitted, choice))
    assert "No signal: keep the proportional mixture" in page.text("verdict")
    assert "Not verified" in page.text("verdict")


def test_page_of_500_runs_stays_small(tmp_path):
    store = fill(make_world(), tmp_path / "many", num_runs=500)
    fitted = fit_table(Table.from_frame(store.runs()), "ridge")
    text = render(store, fitted)
    assert len(text.encode()) < 3_000_000
    # Every run is a point of its own in the panel of the objective.
    panel = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)[0]
    assert panel.count("<use") >= 500


def test_import_report_loads_no_matplotlib():
    code = "import sys, rayx.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
