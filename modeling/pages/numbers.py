"""Numbers for people: names, formats, and the published ones to compare with."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from modeling.pages.results import Results

PUBLISHED_ON = "cifar10"  # the data of the published numbers; they stand beside those of no other
SOURCE = (
    "Ho, Jain and Abbeel 2020, Denoising Diffusion Probabilistic Models, table 1 (CIFAR-10, unconditional, L_simple)"
)
FORMATS = {
    "fid": "{:.2f}",
    "wavelet_distance": "{:.4f}",
    "wavelet_distance_stderr": "{:.4f}",
    "recognised": "{:.1%}",
    "recognised_stderr": "{:.1%}",
    "bits_per_dim": "{:.3f}",
    "bits_per_dim_stderr": "{:.3f}",
    "held_out_loss": "{:.5f}",
    "images": "{:,.0f}",
    "images_per_second": "{:,.1f}",
    "parameters": "{:,.0f}",
    "steps": "{:,.0f}",
}
NAMES = {
    "bits_per_dim": "bits/dim",
    "wavelet_distance": "wavelet distance",
    "held_out_loss": "loss",
    "images": "images",
    "images_per_second": "images/s",
}


def is_fid(metric: str) -> bool:
    """Whether a metric is the FID, of 50,000 samples or of as many as its name says."""
    return re.fullmatch(r"fid(_\d+)?", metric) is not None


def label(metric: str) -> str:
    """'FID', or 'FID of 1,000 samples' for fid_1000."""
    if match := re.fullmatch(r"fid(?:_(\d+))?", metric):
        return f"FID of {int(match[1]):,} samples" if match[1] else "FID"
    return NAMES.get(metric, metric.replace("_", " "))


def formatted(metric: str, value: Any) -> str:
    """A value in the digits that mean something; whatever is no number as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "unknown" if value is None else str(value)  # null in JSON: not a number
    return FORMATS.get("fid" if is_fid(metric) else metric, "{:.4g}").format(value)


def with_error(metrics: Mapping[str, Any], metric: str) -> str:
    """A value, with its standard error where there is one."""
    error = metrics.get(f"{metric}_stderr")
    plus_minus = "" if error is None else f" ± {formatted(f'{metric}_stderr', error)}"
    return formatted(metric, metrics[metric]) + plus_minus


@dataclass
class Headline:
    """A number of the report, with the published one, if any, and what is to be known about it."""

    name: str
    value: str
    published: str = ""
    note: str = ""


def headlines(data: str, results: Results) -> list[Headline]:
    """What to look at first of results on `data`."""
    return [*_quality(data, results), *_likelihood(data, results), *_effort(data, results)]


def _quality(data: str, results: Results) -> Iterator[Headline]:
    published, found = {"fid": "3.17"} if data == PUBLISHED_ON else {}, results.evaluation
    for metric in filter(is_fid, results.metrics):
        partial = "fewer samples give a higher FID: not comparable with published ones, which are of 50,000"
        text = formatted(metric, results.metrics[metric])
        yield Headline(label(metric), text, published.get(metric, ""), "" if metric == "fid" else partial)
    if "wavelet_distance" in found:
        floor = formatted("wavelet_distance", found["wavelet_distance_of_test_images"])
        samples = found["wavelet_distance_samples"]
        count = found.get("wavelet_distance_test_images", samples)  # there may be fewer, whose distance is larger
        beside = "as many test images" if count >= samples else f"{count:,} test images, which are fewer and so further"
        note = f"of {samples:,} samples; {beside}: {floor}. It is no FID"
        yield Headline("Fréchet wavelet distance", with_error(found, "wavelet_distance"), "", note)
    if "recognised" in found:
        note = (
            f"by a small classifier; of the test images: {formatted('recognised', found['recognised_of_test_images'])}"
        )
        yield Headline("recognised as their class", with_error(found, "recognised"), "", note)
    if reason := found.get("quality", {}).get("left_out"):
        yield Headline("FID", "not measured", published.get("fid", ""), str(reason))
    if "nearest_rms" in found:
        beside = found["nearest_rms_of_test_images"]
        note = f"of 255 levels; test images: {beside:.1f}. Much less would mean copies"
        yield Headline("distance to the nearest training image", f"{found['nearest_rms']:.1f}", "", note)


def _likelihood(data: str, results: Results) -> Iterator[Headline]:
    evaluation = results.evaluation
    if "bits_per_dim" in results.metrics:
        note = "upper bound"
        if "bits_per_dim_images" in evaluation:
            steps = evaluation["bits_per_dim_timesteps"]
            note += f", {evaluation['bits_per_dim_images']:,} test images, {steps:,} time steps each"
        text = with_error(results.metrics, "bits_per_dim")
        yield Headline("bits/dim", text, "≤ 3.75" if data == PUBLISHED_ON else "", note)
    loss = (results.training | results.metrics).get("held_out_loss")  # of all test images, once there is an evaluation
    if loss is not None:
        yield Headline("held-out loss", formatted("held_out_loss", loss), "", "EMA weights, fixed noise")


def _effort(data: str, results: Results) -> Iterator[Headline]:
    found = results.training | results.metrics
    names = {"images": "images seen", "images_per_second": "images/s in training"}
    for metric, name in ({"parameters": "parameters", "steps": "steps"} | names).items():
        if metric in found:
            beside = "35.7 million" if metric == "parameters" and data == PUBLISHED_ON else ""
            yield Headline(name, formatted(metric, found[metric]), beside)
    if "seconds" in found:
        yield Headline("time of training", str(timedelta(seconds=round(found["seconds"]))))
