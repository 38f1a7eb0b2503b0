"""The meter: measures on a pack the signals that its policies ask for.

Runs that want the same signal at the same step are measured together. What is drawn depends on the
data seed and on how many measurements a run has had, so that a run that is resumed draws the same.

Legend: R runs, S sources, B sequences of a batch, T context, K domains.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rayx.corpus import Corpus
from rayx.corpus.places import probe_places
from rayx.corpus.sampler import generator, sequence_count, take
from rayx.mixture import Mixture
from rayx.policy import Drops, Excess, Gradients, Influence, Losses, Probe, Signal
from rayx.proxy.checkpoint import read_checkpoint
from rayx.proxy.influence import influence
from rayx.proxy.model import Rotary
from rayx.proxy.optimizer import PackedAdamW
from rayx.proxy.signals import excess_losses, inner_products, loss_drops, probe_losses
from rayx.spec import TrainSpec
from rayx.steering import Steering
from rayx.store import Store


class Meter:
    """Measures signals on the runs of one pack.

    Args:
        corpus: Where sources and probes are read.
        specs: The pack's runs.
        steerings: What steers each.
        optimizer: Holds their parameters and moments.
        store: Where the checkpoints of references are.
        device: Where the parameters are.

    Attributes:
        seconds_R: What measuring has taken of each run so far.
        flops_R: The same in FLOPs.
    """

    def __init__(
        self,
        corpus: Corpus,
        specs: Sequence[TrainSpec],
        steerings: Sequence[Steering],
        optimizer: PackedAdamW,
        store: Store | None,
        device: torch.device,
    ) -> None:
        self.corpus, self.specs, self.steerings = corpus, specs, steerings
        self.optimizer, self.store, self.device = optimizer, store, device
        self.shape = specs[0].model
        self.rotary = Rotary(self.shape, device)
        self.seconds_R = np.zeros(len(specs))
        self.flops_R = np.zeros(len(specs))
        self._texts: dict[Probe, Tensor] = {}
        self._references: dict[str, dict[str, Tensor]] = {}

    def measure(self, runs: Sequence[int], lr_share: float) -> list[np.ndarray | None]:
        """Return what each of these runs' blocks ask for, None where that is nothing."""
        values: dict[int, np.ndarray | None] = dict.fromkeys(runs)
        groups: dict[Signal, list[int]] = {}
        for run in runs:
            signal = self.steerings[run].signal
            if signal is not None:
                groups.setdefault(signal, []).append(run)
        for signal, members in groups.items():
            began = time.perf_counter()
            for run, value in zip(members, self._values(signal, members, lr_share), strict=True):
                values[run] = np.asarray(value, np.float64)
            self.seconds_R[members] += (time.perf_counter() - began) / len(members)
            self.flops_R[members] += signal.flops(self.shape)
        return list(values.values())

    def _values(self, signal: Signal, runs: list[int], lr_share: float) -> np.ndarray:
        mine = torch.tensor(runs, device=self.device)
        parameters = {n: p.detach()[mine] for n, p in self.optimizer.parameters.items()}
        model = (parameters, self.shape, self.rotary)
        if isinstance(signal, Losses):
            return probe_losses(*model, [self._text(probe) for probe in signal.probes])
        if isinstance(signal, Gradients):
            tokens = self._sources(runs, signal.sources, signal.sequences)
            if signal.probes:
                probes = [self._some(runs, probe, signal.sequences) for probe in signal.probes]
                tokens = torch.cat([tokens, torch.stack(probes, dim=1)], dim=1)
            return inner_products(*model, tokens, over=signal.over)
        if isinstance(signal, Excess):
            tokens = self._sources(runs, signal.sources, signal.sequences)
            reference = self._reference(signal)
            return excess_losses(*model, tokens, reference, signal.reference.spec.model)
        probes = [self._text(probe) for probe in signal.probes]
        if isinstance(signal, Influence):
            tokens = self._sources(runs, signal.sources, signal.sequences)
            return influence(*model, probes, tokens, signal.curvature, signal.damping)
        assert isinstance(signal, Drops)
        batches = [
            self._sources(runs, signal.sources, signal.batch_sequences, part)
            for part in range(signal.steps)
        ]
        copied, first, second = (
            {n: t.detach()[mine] for n, t in group.items()} for group in self.optimizer.tensors
        )
        specs = [self.specs[run] for run in runs]
        updates = self.optimizer.updates
        return loss_drops(
            (copied, first, second),
            specs,
            lr_share,
            self.shape,
            self.rotary,
            batches,
            probes,
            updates,
        )

    def _rng(self, run: int, *key: object) -> np.random.Generator:
        number = len(self.steerings[run].decisions)
        return generator("signal", self.specs[run].data_seed, number, *key)

    def _sources(
        self, runs: list[int], sources: Sequence[Mixture], sequences: int, part: int = 0
    ) -> Tensor:
        """Return a batch of training text of each source for each run, shape (R, S, B, T + 1)."""
        drawn = [
            [
                self._batch(source, sequences, self._rng(run, "source", s, part))
                for s, source in enumerate(sources)
            ]
            for run in runs
        ]
        return torch.from_numpy(np.array(drawn)).to(self.device)

    def _batch(self, source: Mixture, sequences: int, rng: np.random.Generator) -> np.ndarray:
        """Return sequences of a mixture, shape (B, T + 1); counts are its quotas, rounded."""
        context = self.shape.context
        upper_K = np.cumsum(list(source.values()))
        points_B = (np.arange(sequences) + rng.random()) / sequences
        domain_B = np.minimum(np.searchsorted(upper_K, points_B, side="right"), len(upper_K) - 1)
        rows = []
        for k, domain in enumerate(source):
            count = int((domain_B == k).sum())
            if count:
                shard = self.corpus.train(domain)
                held = sequence_count(len(shard), context)
                places = rng.choice(held, size=count, replace=count > held)
                rows.append(take(shard, places, context))
        return np.concatenate(rows)

    def _some(self, runs: list[int], probe: Probe, sequences: int) -> Tensor:
        """Return so many of a probe's sequences for each run, shape (R, B, T + 1)."""
        text = self._text(probe)
        places = [
            np.resize(self._rng(run, "probe", probe.target).permutation(len(text)), sequences)
            for run in runs
        ]
        return text[torch.from_numpy(np.array(places)).to(self.device)]

    def _text(self, probe: Probe) -> Tensor:
        """Return all sequences of a probe, shape (N, T + 1)."""
        if probe not in self._texts:
            split = self.corpus.train if probe.part == "train" else self.corpus.heldout
            places = probe_places(self.corpus, probe, self.shape.context)
            rows = take(split(probe.target), places, self.shape.context)
            self._texts[probe] = torch.from_numpy(rows).to(self.device)
        return self._texts[probe]

    def _reference(self, signal: Excess) -> dict[str, Tensor]:
        name = signal.reference.checkpoint
        if name not in self._references:
            assert self.store is not None, "train_pack refuses parents without a store"
            state = read_checkpoint(self.store, signal.reference)
            self._references[name] = {n: t.to(self.device) for n, t in state.parameters.items()}
        return self._references[name]
