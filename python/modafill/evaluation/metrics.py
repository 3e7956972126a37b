"""What is measured: recognition (WA, UA, F1s, NLL), feature error (NRMSE) and calibration (CRPS)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score, multiclass_recall

from modafill.data import Labels


def recognition(probabilities: Tensor, target: Tensor) -> dict[str, float]:
    """``{"WA", "UA", "F1", "F1 weighted", "NLL"}`` of ``probabilities [B, classes]`` against ``target [B]``.

    WA is accuracy, UA macro recall, F1 macro F1, as the field computes them (MMIN); "F1 weighted" is weighted by the
    targets' classes (CDTP §4.1, IEMOCAP). Departure: ADMC eq. 7 prints a WA
    with true negatives and class weights, which exceeds 1 for more than two classes. NLL is ours: the mean negative
    log-likelihood in nats, of probabilities no smaller than float32's epsilon. It sees misplaced confidence.
    """
    if not bool(torch.isfinite(probabilities).all()):
        raise ValueError("probabilities: got NaN or infinity, expected finite values")
    truth = probabilities.gather(1, target[:, None]).clamp(min=torch.finfo(torch.float32).eps)
    classes = probabilities.shape[1]
    f1 = partial(multiclass_f1_score, probabilities, target, num_classes=classes)
    return {
        "WA": float(multiclass_accuracy(probabilities, target, num_classes=classes, average="micro")),
        "UA": float(multiclass_recall(probabilities, target, num_classes=classes, average="macro")),
        "F1": float(f1(average="macro")),
        "F1 weighted": float(f1(average="weighted")),
        "NLL": float(-truth.log().mean()),
    }


def nrmse(estimate: Tensor, truth: Tensor, scale: float) -> float:
    """Root mean squared error of ``estimate`` against ``truth`` (same shape), in units of ``scale``."""
    return float((estimate - truth).square().mean().sqrt()) / scale


def crps(samples: Tensor, truth: Tensor, scale: float, strata: int = 1) -> float:
    """Continuous ranked probability score of K samples ``[K, …]``, mean over ``truth […]``, in units of ``scale``.

    E|X − y| − ½ E|X − X'| with the unbiased estimate of the second term (Gneiting & Raftery 2007; "fair" CRPS), so that
    different K compare. One sample, or equal samples, are a point forecast: the mean absolute error.

    With ``strata`` S, sample k is of the (k mod S)-th of S equally weighted sources: pairs of one source then count for
    1 / S of the second term, as they do in the mixture, whichever their share among the pairs. Fewer than two samples
    of every source leave that part unknown: all pairs count alike.
    """
    k = len(samples)
    error = (samples - truth).abs().mean()
    if k == 1:
        return float(error) / scale
    everything = _sum_of_distances(samples)
    spread = everything / (k * (k - 1))
    sizes = [len(samples[s::strata]) for s in range(strata)]
    if strata > 1 and min(sizes) > 1:
        within = [_sum_of_distances(samples[s::strata]) for s in range(strata)]
        between = (everything - sum(within)) / (k * k - sum(n * n for n in sizes))
        same = sum(w / (n * (n - 1)) for w, n in zip(within, sizes, strict=True)) / strata
        spread = same / strata + (1 - 1 / strata) * between
    return float(error - spread / 2) / scale


def _sum_of_distances(samples: Tensor) -> Tensor:
    """Σ |X_i − X_j| over ordered pairs of ``[K, …]``, mean over the rest."""
    k = len(samples)
    weight = torch.arange(1 - k, k, 2, dtype=samples.dtype, device=samples.device)
    return 2 * (weight.reshape(-1, *[1] * (samples.ndim - 1)) * samples.sort(0).values).sum(0).mean()


def figures_of(labels: Labels) -> Callable[[Tensor, Tensor], dict[str, float]]:
    """What is measured of ``(answers, targets)``: :func:`recognition`, :func:`sentiment` or :func:`regression`."""
    if not labels.regression:
        return recognition
    return sentiment if labels.sentiment else regression


def sentiment(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """Figures of CDTP §4.1 for intensities in −3…3: ``prediction [B]`` against ``target [B]``.

    ``"ACC-7"`` compares what both round to within ±3 (halves to even). ``"ACC-2"`` and ``"F1"`` tell negative from
    non-negative (Zadeh et al. 2018); ``"ACC-2 nonzero"`` and ``"F1 nonzero"`` negative from positive, on the samples
    whose target is not 0 (MulT, whose code counts 0 as negative where it keeps it). F1 is weighted by the targets'
    classes; MulT's code swaps the arguments and weights by the predicted ones. ``"MAE"`` is the mean absolute error,
    ``"Corr"`` Pearson's correlation, left out where one is constant.

    Raises:
        ValueError: other shapes, NaN or infinity, or no target that is not 0.
    """
    distance = regression(prediction, target)
    nonzero = target != 0
    if not bool(nonzero.any()):
        raise ValueError("target: got zeros alone, expected at least one other value")
    prediction, target = prediction.to(torch.float64), target.to(torch.float64)
    levels = [values.clamp(-3, 3).round() for values in (prediction, target)]
    figures = {"ACC-7": float((levels[0] == levels[1]).to(torch.float64).mean())}
    for suffix, said, true in (
        ("", prediction >= 0, target >= 0),
        (" nonzero", prediction[nonzero] > 0, target[nonzero] > 0),
    ):
        figures[f"ACC-2{suffix}"] = float((said == true).to(torch.float64).mean())
        f1 = multiclass_f1_score(said.long(), true.long(), num_classes=2, average="weighted")
        figures[f"F1{suffix}"] = float(f1)
    return figures | distance


def regression(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """``{"MAE", "Corr"}`` of scores: ``prediction [B]`` against ``target [B]``; no Corr where one is constant."""
    if prediction.shape != target.shape or prediction.ndim != 1:
        raise ValueError(f"prediction: got {list(prediction.shape)}, expected [B] as target, {list(target.shape)}")
    for name, values in (("prediction", prediction), ("target", target)):
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name}: got NaN or infinity, expected finite values")
    prediction, target = prediction.to(torch.float64), target.to(torch.float64)
    figures = {"MAE": float((prediction - target).abs().mean())}
    if all(bool((values != values[0]).any()) for values in (prediction, target)):
        figures["Corr"] = float(torch.corrcoef(torch.stack([prediction, target]))[0, 1])
    return figures
