"""Curves as JSON, Markdown and figures."""

import dataclasses
import json
import pathlib
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Point:
    """Measurements at one point of a curve: repeats, one after the other."""

    x: float
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Lines over one axis; all of them have points at the same places."""

    name: str
    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[Point]]


def table(curve: Curve) -> str:
    """The medians, in brackets the least and the largest; and what they are of the first one of their line."""
    names = list(curve.lines)
    lines = [f'| {" | ".join([curve.x, *(part for name in names for part in (name, "of the first"))])} |']
    lines.append(f'|{" ---: |" * (1 + 2 * len(names))}')
    for row in zip(*curve.lines.values(), strict=True):
        cells = [f'{row[0].x:g}']
        for name, point in zip(names, row, strict=True):
            several = f' [{min(point.values):.4g}, {max(point.values):.4g}]' if len(point.values) > 1 else ''
            cells += [f'{point.median:.4g}{several}', f'{point.median / curve.lines[name][0].median:.2f}']
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def figure(curve: Curve) -> Figure:
    """Medians as lines, from the least to the largest as bars."""
    drawn = Figure(figsize=(6, 4), layout='constrained')
    axes = drawn.subplots()
    for name, points in curve.lines.items():
        middle = [point.median for point in points]
        low = [point.median - min(point.values) for point in points]
        high = [max(point.values) - point.median for point in points]
        axes.errorbar([point.x for point in points], middle, [low, high], marker='o', capsize=3, label=name)
    axes.set(title=curve.title, xlabel=curve.x, ylabel=textwrap.fill(curve.y, 44))
    axes.set_ylim(bottom=0)
    if len(curve.lines) > 1:
        axes.legend()
    return drawn


def write(folder: pathlib.Path, environment: Mapping[str, Any], curves: Sequence[Curve]) -> None:
    """Writes curves.json, curves.md and a PNG of each curve."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {'environment': dict(environment), 'curves': [dataclasses.asdict(curve) for curve in curves]}
    (folder / 'curves.json').write_text(json.dumps(plain, indent=1) + '\n', encoding='utf-8')
    facts = ', '.join(f'{name} {value}' for name, value in environment.items())
    parts = [f'{facts}. Medians over repeats, in brackets the least and the largest.']
    for curve in curves:
        parts.append(f'## {curve.title}\n\n{curve.y}.\n\n{table(curve)}\n\n![{curve.title}]({curve.name}.png)')
        figure(curve).savefig(folder / f'{curve.name}.png', dpi=120)
    (folder / 'curves.md').write_text('\n\n'.join(parts) + '\n', encoding='utf-8')
