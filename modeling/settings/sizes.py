"""Which images a network takes, and the setting that lets it take others. Imports no torch."""

from collections.abc import Iterable

from modeling.settings.groups import ModelConfig


def misfit(m: ModelConfig, height: int, width: int) -> str | None:
    """Why the network of a configuration cannot take images of this size, with a setting that works; None if it can."""
    count, patch = len(m.channel_mult), m.patch_size
    factor = patch * 2 ** (count - 1)
    levels = next(n for n in range(count, -1, -1) if height % (patch * 2 ** (n - 1) if n else 1) == 0)
    sizes = [height // patch >> level for level in range(levels)]
    if height != width or levels == 0 or levels == 1 < count:
        fitting = [size for size in range(factor, 257, factor) if _attends(m, size)]
        resized = f"data.image_size={min(fitting, key=lambda size: abs(size - min(height, width)), default=factor)}"
        if height != width:
            return f"data={width} x {height} pixels: the images must be square; {resized} cuts squares out"
        works = f"{resized} resizes them"
    else:
        nearest = [min(sizes, key=lambda size: abs(size - wanted)) for wanted in m.attention_resolutions]
        cut = f"model.channel_mult={_typed(m.channel_mult[:levels])} " if levels < count else ""
        works = f"{cut}model.attention_resolutions={_typed(dict.fromkeys(nearest))} fits {height} x {width}"
    if levels < count:
        patches = f" of patches of {patch}" if patch > 1 else ""
        why = f"images of {height} pixels must be divisible by {factor}, for {count} resolutions{patches}"
        return f"model.channel_mult={m.channel_mult}: {why}; {works}"
    for size in m.attention_resolutions:
        if size not in sizes:
            why = f"images of {height} pixels have the resolutions {sizes}"
            return f"model.attention_resolutions={size}: {why}; {works}"
    return None


def _attends(m: ModelConfig, height: int) -> bool:
    levels = range(len(m.channel_mult))
    return {*m.attention_resolutions} <= {height // m.patch_size >> level for level in levels}


def _typed(values: Iterable[int]) -> str:
    return f"[{','.join(map(str, values))}]"
