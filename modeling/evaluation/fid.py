"""FID, KID, Inception Score, precision and recall, by torch-fidelity: its Inception, ported from TensorFlow.

Heusel et al. 2017, Binkowski et al. 2018, Salimans et al. 2016, Kynkaanniemi et al. 2019. The reference is every
training image, not flipped. Its features and the samples are kept, so that an evaluation that was stopped resumes. FID
of few samples is biased: below MIN_SAMPLES its name ends in their number. Every process must call the functions that
draw samples or compute features. torch-fidelity is imported where it is used: it brings PyTorch's compiler along, which
takes a second that an evaluation without FID does not need.
"""

import hashlib
import logging
import math
import pickle
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from modeling.distributed.collectives import from_first, is_first
from modeling.distributed.shares import sharded
from modeling.inference.kept import keep, read_kept
from modeling.reliability.errors import UserError, short
from modeling.reliability.files import existing
from modeling.reliability.signals import poll, stopped_at_once
from modeling.reliability.terminal import counted

log = logging.getLogger(__name__)
MIN_SAMPLES = 10_000
KID_SUBSET = 1000
FEATURES = [2048, 1008]  # of the pool and of the logits
FIDELITY = "inception", ["2048", "logits_unbiased"]  # torch-fidelity's names for them
NEIGHBOURS = 3  # of precision and recall
METRICS = {  # our names of torch-fidelity's
    "fid": "frechet_inception_distance",
    "kid": "kernel_inception_distance_mean",
    "kid_std": "kernel_inception_distance_std",
    "inception_score": "inception_score_mean",
    "inception_score_std": "inception_score_std",
    "precision": "precision",
    "recall": "recall",
}


class Unavailable(UserError):
    """The Inception weights cannot be downloaded; the message says why and what to do."""


@dataclass
class Inception:
    """The feature extractor of all the metrics."""

    network: nn.Module  # maps uint8 [N, 3, H, W] to pool features and logits, see FEATURES
    sha256: str  # of the file with its weights
    device: torch.device

    @torch.no_grad()
    def features(self, images: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Pool features [N, 2048] and unbiased logits [N, 1008], float32 on the CPU.

        `images` are batches of uint8 [B, C, H, W]; C = 3, or 1, which is repeated.
        """
        network = self.network.to(self.device)

        def run(batch: Tensor, rows: range) -> Tensor:
            poll()
            if not rows:
                return torch.empty(0, sum(FEATURES))
            rgb = batch[rows.start : rows.stop].to(self.device).expand(-1, 3, -1, -1)
            return torch.cat([part.float().cpu() for part in network(rgb)], dim=1)

        parts = [sharded(len(batch), partial(run, batch)) for batch in images]
        pool, logits = torch.split(torch.cat(parts), FEATURES, dim=1)
        return pool.contiguous(), logits.contiguous()


def load_inception(weights: str | None, sha256: str, device: torch.device) -> Inception:
    """The extractor with the weights of a file (None: the published ones), whose SHA-256 begins with `sha256`."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = download(sha256) if weights is None else existing("evaluation.inception_weights", weights)
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if not found.startswith(sha256):
            raise UserError(f"evaluation.inception_weights={path}: SHA-256 {found[:12]}..., not {sha256}...")
        # torch-fidelity would unpickle whatever is in the file, so it gets a copy of the tensors alone.
        state = torch.load(path, map_location="cpu", weights_only=True)
        with tempfile.NamedTemporaryFile(suffix=".pth") as clean:
            torch.save(dict(state), clean.name)
            network = FeatureExtractorInceptionV3(*FIDELITY, feature_extractor_weights_path=clean.name)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"evaluation.inception_weights={path} cannot be read: {short(error)}") from None
    return Inception(network, found, device)


def cached_weights() -> Path:
    """Where the published weights are once they were downloaded: in PyTorch's cache folder."""
    return Path(torch.hub.get_dir(), "checkpoints", Path(_url()).name)


def _url() -> str:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return str(URL_INCEPTION_V3)


def download(sha256: str) -> Path:
    """The published weights in PyTorch's cache folder, downloaded by the first process; else Unavailable in all."""
    path = cached_weights()

    def failure() -> str:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                with stopped_at_once():
                    torch.hub.download_url_to_file(_url(), str(path), hash_prefix=sha256, progress=False)
        except (OSError, RuntimeError) as error:
            return short(error)
        return ""

    if reason := from_first(failure):
        raise Unavailable(
            f"the Inception weights could not be downloaded ({reason}): put {path.name} of torch-fidelity "
            f"into {path.parent}, or name the file: evaluation.inception_weights=<file>"
        )
    return path


def reference_features(inception: Inception, images: Tensor, data_sha256: str, folder: Path, batch_size: int) -> Tensor:
    """Pool features of the training images [N, 2048], kept in `folder`; those kept are for the first process alone."""
    key = hashlib.sha256(f"{data_sha256} train {inception.sha256}".encode()).hexdigest()[:16]
    path = folder / f"{key}.npy"
    kept = read_kept(path) if is_first() else None
    if from_first(lambda: kept is not None):
        return torch.empty(0) if kept is None else kept
    log.info("features of %d training images, once: %s", len(images), path)
    pool, _ = inception.features(counted("features", torch.split(images, batch_size), "batches"))
    keep(path, pool)
    return pool


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """FID (Heusel et al. 2017, equation 6) between two sets of features [N, D] and [M, D], in float64.

    NaN of a single image, which has no covariance.
    """
    if min(len(features), len(reference)) < 2:
        return math.nan
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(f.double()) for f in (features, reference)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[METRICS["fid"]])


def enough_neighbours(samples: int, references: int) -> bool:
    """Whether every image has the neighbours beside itself that precision and recall look for."""
    return min(samples, references) > NEIGHBOURS


def quality_metrics(pool: Tensor, logits: Tensor, reference: Tensor) -> dict[str, float]:
    """All metrics of samples with pool features [N, D] and logits [N, K] against a reference [M, D].

    Without precision and recall if there are too few images, see `enough_neighbours`.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    n = len(pool)
    log.info("FID and its relatives of %d samples", n)
    subset = min(KID_SUBSET, n, len(reference))
    with stopped_at_once():  # minutes for 50,000 samples
        found = kid_features_to_metric(pool, reference, kid_subset_size=subset, verbose=False)
        found |= isc_features_to_metric(logits)
        if enough_neighbours(n, len(reference)):
            options = {"prc_neighborhood": NEIGHBOURS, "save_cpu_ram": True, "verbose": False}
            found |= prc_features_to_metric(pool, reference, **options)
        found[METRICS["fid"]] = frechet_distance(pool, reference)
    return {name if n >= MIN_SAMPLES else f"{name}_{n}": found[key] for name, key in METRICS.items() if key in found}
