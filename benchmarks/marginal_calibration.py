"""Calibrate the estimate of `marginal`: spectra of gradients, and the gain of single adapters.

    python benchmarks/marginal_calibration.py [--model embedded] [--rows 256] [--sites 24] [--threads 2]

Spectra: the singular values of every matrix's mean gradient over calibration rows, by dense autograd; the decay is the
slope of log energy over log index, fitted by kind.
Gains: one matrix at a time gets an adapter, which trains for some steps of AdamW on a batch of rows; the gain is the
decrease of the loss on that batch. log gain is regressed on log sensitivity and log rank (least squares). The explained
variance shows how well the estimate predicts; rank correlations show how well sensitivity alone orders the matrices.
--sites 0 skips the gains.

Only training rows are read. Written to build/benchmarks/marginal_calibration-MODEL.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

import apportion
from apportion.data.batches import batches, encode
from apportion.data.sources import read_rows
from apportion.demo import DemoSettings
from apportion.experts.forms import known_form
from apportion.loading import load_model
from apportion.profiling.sensitivity import summed_sample_losses
from apportion.records.files import write_text
from apportion.records.profile import Profile
from apportion.records.site import Site

ROWS, TRAIN_ROWS, STEPS, LR = 256, 32, 5, 2e-3
RANKS = (1, 4, 16)
SITES = 24
LEAST_SHARE = 1e-6  # of all sensitivity, for a matrix to be looked at
TOP = 32  # singular values that the decay is fitted on


def main() -> None:
    """Measure every task, fit, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--sites", type=int, default=SITES)
    parser.add_argument("--tasks", nargs="+", default=list(DemoSettings().tasks))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.model)
    name = Path(args.model).stem
    output = Path(f"build/benchmarks/marginal_calibration-{name}.json")
    facts: dict[str, Any] = {"model": name, "rows": args.rows, "steps": STEPS, "lr": LR, "tasks": {}}
    for task in args.tasks:
        rows = read_rows(DemoSettings().tasks[task], num_rows=args.rows + TRAIN_ROWS)
        encoded = [encode(row, tokenizer) for row in rows]
        pad_id = int(tokenizer.pad_token_id)
        calibration = list(batches(encoded[: args.rows], pad_id, 32))
        profile = apportion.profile(model, calibration, sensitivity=True)
        train = next(batches(encoded[args.rows :], pad_id, TRAIN_ROWS))
        spectra = measure_spectra(model, calibration, profile)
        facts["tasks"][task] = {"spectra": fit_spectra(spectra, profile)}
        if args.sites:
            gains = measure_gains(model, profile, train, chosen_sites(profile, args.sites))
            facts["tasks"][task] |= {"fit": fit_gains(gains), "gains": gains}
        print(task, json.dumps({k: v for k, v in facts["tasks"][task].items() if k != "gains"}, indent=1), flush=True)
        write_text(output, json.dumps(facts, indent=1) + "\n")


def measure_spectra(model: Any, calibration: list[dict[str, Tensor]], profile: Profile) -> dict[str, list[float]]:
    """Return the singular values of every matrix's mean gradient that is not zero."""
    model.requires_grad_(requires_grad=True).zero_grad()
    for batch in calibration:
        summed_sample_losses(model, batch).backward()
    found = {}
    for site in profile.layout.sites():
        grad = gradient_of(model, site)
        if grad is not None and bool(grad.any()):
            found[site.name] = torch.linalg.svdvals(grad.double()).tolist()
    model.requires_grad_(requires_grad=False).zero_grad()
    return found


def gradient_of(model: Any, site: Site) -> Tensor | None:
    """Return a site's gradient."""
    if site.storage != "fused":
        return model.get_submodule(site.name).weight.grad
    path, expert, projection = site.name.rsplit(".", 2)
    module = model.get_submodule(path)
    form = known_form(module)
    grad = module.get_parameter(form.projections[projection].parameter).grad
    return None if grad is None else form.view(grad, projection)[int(expert)]


def fit_spectra(spectra: dict[str, list[float]], profile: Profile) -> dict[str, Any]:
    """Fit energy of direction i = c i^-decay to every matrix's first singular values, and summarise by kind."""
    by_kind: dict[str, list[tuple[float, float, float, float]]] = defaultdict(list)
    for name, values in spectra.items():
        energy = np.square(np.array(values[:TOP]))
        energy = energy[energy > energy[0] * 1e-12]
        if len(energy) < 4:
            continue
        fit = stats.linregress(np.log(np.arange(1, len(energy) + 1)), np.log(energy))
        whole = float(np.square(values).sum())
        site = profile.layout.by_name[name]
        shares = (float(energy[0]) / whole, float(energy[:8].sum()) / whole)
        by_kind[f"{site.kind}.{site.projection}"].append((-fit.slope, fit.rvalue**2, *shares))
    names = ("decay", "r_squared", "share_of_1", "share_of_8")
    return {
        kind: {"matrices": len(found)} | dict(zip(names, map(statistics.median, zip(*found, strict=True)), strict=True))
        for kind, found in by_kind.items()
    }


def chosen_sites(profile: Profile, count: int) -> list[Site]:
    """Choose matrices of every projection at even distances in sensitivity."""
    norms = profile.measured_sensitivity()["default"]
    groups: dict[str, list[Site]] = defaultdict(list)
    for site in profile.layout.sites():
        if norms.get(site.name, 0) > LEAST_SHARE * sum(norms.values()):
            groups[f"{site.kind}.{site.projection}"].append(site)
    each = max(count // len(groups), 1)
    chosen = []
    for group in groups.values():
        ranked = sorted(group, key=lambda site: -norms[site.name])
        places = sorted({round(place) for place in np.linspace(0, len(ranked) - 1, each)})
        chosen += [ranked[place] for place in places]
    return chosen


def measure_gains(model: Any, profile: Profile, train: dict[str, Tensor], sites: list[Site]) -> list[dict[str, Any]]:
    """Train one adapter at a time from the same state, and return the decrease of the loss."""
    norms = profile.measured_sensitivity()["default"]
    everything = apportion.plan(profile, "lora", rank=max(RANKS))
    with torch.no_grad():
        before = float(summed_sample_losses(model, train)) / TRAIN_ROWS
    found = []
    for site in sites:
        for rank in RANKS:
            placement = replace(everything.by_site[site.name], rank=rank, alpha=2.0 * rank)
            cost = replace(everything.cost, trainable_parameters=placement.num_parameters(site))
            alone = replace(everything, placements=(placement,), cost=cost)
            adapted = apportion.apply(copy.deepcopy(model), alone)
            optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=LR, weight_decay=0)
            for _ in range(STEPS):
                optimizer.zero_grad()
                (summed_sample_losses(adapted, train) / TRAIN_ROWS).backward()
                optimizer.step()
            with torch.no_grad():
                after = float(summed_sample_losses(adapted, train)) / TRAIN_ROWS
            found.append(
                {
                    "site": site.name,
                    "kind": f"{site.kind}.{site.projection}",
                    "sensitivity": norms[site.name] / profile.provenance["sequences"]["default"],
                    "rank": rank,
                    "gain": before - after,
                }
            )
    return found


def fit_gains(gains: list[dict[str, Any]]) -> dict[str, Any]:
    """Regress log gain, and measure how well sensitivity alone orders the matrices."""
    positive = [gain for gain in gains if gain["gain"] > 0]
    columns = [[1.0, *(math.log(gain[key]) for key in ("sensitivity", "rank"))] for gain in positive]
    target = np.log([gain["gain"] for gain in positive])
    weights, _, _, _ = np.linalg.lstsq(np.array(columns), target, rcond=None)
    residual = target - np.array(columns) @ weights
    fit = {"points": len(positive), "of": len(gains), "r_squared": 1 - float(residual.var() / target.var())}
    fit |= dict(zip(("constant", "of_sensitivity", "of_rank"), weights.tolist(), strict=True))
    for rank in RANKS:
        own = [gain for gain in gains if gain["rank"] == rank]
        pairs = [[gain[key] for gain in own] for key in ("sensitivity", "gain")]
        fit[f"rank_correlation_at_{rank}"] = float(stats.spearmanr(*pairs).statistic)
    return fit


if __name__ == "__main__":
    main()
