"""Medians, ratios and the chart, from the kept results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.lab.experiment.images import CASES
from tests.lab.experiment.scenarios import SIDES, Result

Bar = tuple[str, str]  # side, scenario

BARS: dict[Bar, str] = {
    ("oci", "oci"): "OCI image, overlayfs",
    ("ours", "cold"): "Nydus, cold",
    ("ours", "dragonfly"): "Nydus and Dragonfly, cold",
    ("ours", "remote"): "Dragonfly, remote peer",
    ("ours", "local"): "Dragonfly, local peer",
    ("ours", "local-image"): "Dragonfly, local peer, image here",
    ("ours", "cache"): "Nydus cache",
    ("ours", "learned"): "Nydus, cold, seen before",
    ("oci", "overlayfs"): "OCI image, pulled before",
    **{
        (side, scenario): f"Nydus with {name}, {title}"
        for side, name in (("fuse", "FUSE"), ("erofs", "EROFS"), ("auto", "either"))
        for scenario, title in (
            ("cold", "cold"),
            ("dragonfly", "Dragonfly, cold"),
            ("remote", "remote peer"),
            ("local", "local peer"),
            ("local-image", "local peer, image here"),
            ("cache", "cache"),
            ("learned", "cold, seen before"),
        )
    },
    ("upstream", "cold"): "upstream, cold",
    ("upstream", "dragonfly"): "upstream and Dragonfly, cold",
    ("upstream", "remote"): "upstream, remote peer",
    ("upstream", "local"): "upstream, local peer",
    ("upstream", "local-image"): "upstream, local peer, image here",
    ("upstream", "cache"): "upstream, cache",
}
# The published six, and the one that only we have.
CHART: tuple[Bar, ...] = (
    ("oci", "oci"),
    ("ours", "cold"),
    ("ours", "dragonfly"),
    ("ours", "remote"),
    ("ours", "local"),
    ("ours", "cache"),
    ("ours", "learned"),
)
COLORS = ("#5b6770", "#d1495b", "#edae49", "#66a182", "#00798c", "#2e4057", "#8d6a9f")


BEGIN, END = "<!-- begin of what the experiment wrote -->", "<!-- end of what the experiment wrote -->"


def load(*paths: Path) -> list[Result]:
    """All starts of these files; of one that was made again the last. Raises OSError, and ValueError for a file that is
    none of this program's."""
    found: dict[Any, Result] = {}
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                result = Result(**json.loads(line))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number}: no result of the experiment ({error})") from None
            before = found.get(result.key)
            if before is None or before.when <= result.when:
                found[result.key] = result
    return list(found.values())


def medians(results: Sequence[Result]) -> dict[str, dict[str, dict[Bar, dict[str, Any]]]]:
    """link -> case -> bar -> medians of its starts."""
    found: dict[str, dict[str, dict[Bar, list[Result]]]] = {}
    for result in results:
        bars = found.setdefault(result.link, {}).setdefault(result.case, {})
        bars.setdefault((result.side, result.scenario), []).append(result)
    order = [case.name for case in CASES]
    return {
        link: {
            case: {
                bar: {
                    **{
                        name: statistics.median(getattr(start, name) for start in bars[bar])
                        for name in ("seconds", "bytes", "requests", "data_bytes", "data_requests", "load")
                    },
                    "starts": len(bars[bar]),
                }
                for bar in sorted(bars, key=list(BARS).index)
            }
            for case, bars in sorted(cases.items(), key=lambda item: order.index(item[0]) if item[0] in order else 99)
        }
        for link, cases in found.items()
    }


def table(results: Sequence[Result]) -> str:
    """Markdown: seconds, how many times faster than the plain image, MB and requests of the registry."""
    lines: list[str] = []
    for link, cases in medians(results).items():
        lines += [f"Registry behind {link}:", ""]
        names = list(cases)
        lines.append("| | " + " | ".join(names) + " |")
        lines.append("| --- |" + " --- |" * len(names))
        for bar, title in BARS.items():
            cells = [_cell(cases[name], bar) for name in names]
            if any(cells):
                lines.append(f"| {title} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def conditions(results: Sequence[Result]) -> str:
    """Markdown: how often, when and beside how much other work each row was measured."""
    lines = ["| | starts of each | load | measured (UTC) | of |", "| --- | --- | --- | --- | --- |"]
    for link, cases in medians(results).items():
        for bar, title in BARS.items():
            mine = [one for one in results if one.link == link and (one.side, one.scenario) == bar]
            if not mine:
                continue
            starts = sorted({cases[name][bar]["starts"] for name in cases if bar in cases[name]})
            loads = [one.load for one in mine]
            cells = [f"{title}, {link.split(',')[0]}", _span(str(starts[0]), str(starts[-1]))]
            cells.append(_span(f"{min(loads):.1f}", f"{max(loads):.1f}"))
            cells.append(_span(min(one.when for one in mine), max(one.when for one in mine)))
            cells.append(", ".join(sorted({one.commit for one in mine if one.commit})))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _span(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _cell(bars: dict[Bar, dict[str, Any]], bar: Bar) -> str:
    found, plain = bars.get(bar), bars.get(("oci", "oci"))
    if found is None:
        return ""
    text = f"{found['seconds']:.2f} s"
    if plain is not None and bar[1] not in ("oci", "overlayfs"):
        text += f" ({plain['seconds'] / found['seconds']:.1f}x)"
    if found["bytes"]:
        text += f", {found['bytes'] / 1e6:.1f} MB in {found['requests']:.0f}"
    return text


def as_json(results: Sequence[Result]) -> dict[str, Any]:
    sums = medians(results)
    return {
        link: {
            case: {f"{side} {scenario}": figures for (side, scenario), figures in bars.items()}
            for case, bars in cases.items()
        }
        for link, cases in sums.items()
    }


def chart(results: Sequence[Result], link: str, stem: Path) -> list[Path]:
    """The bar chart as SVG and PNG; nothing without matplotlib (`pip install nydus-py[bench]`)."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "experiment", "font.family": "DejaVu Sans", "svg.fonttype": "none"})
    from matplotlib import pyplot

    cases = medians(results)[link]
    bars = [bar for bar in CHART if any(bar in found for found in cases.values())]
    figure, axes = pyplot.subplots(figsize=(11, 5.2), dpi=110)
    width = 0.86 / len(bars)
    for index, bar in enumerate(bars):
        heights = [found[bar]["seconds"] if bar in found else 0.0 for found in cases.values()]
        places = [group + (index - (len(bars) - 1) / 2) * width for group in range(len(cases))]
        drawn = axes.bar(places, heights, width * 0.94, label=BARS[bar], color=COLORS[CHART.index(bar)])
        axes.bar_label(drawn, [f"{height:.2g}" if height < 10 else f"{height:.0f}" for height in heights], fontsize=7)
    axes.set_yscale("log")
    axes.set_ylabel("seconds from `nerdctl run` to its end (log scale)")
    axes.set_xticks(range(len(cases)), list(cases))
    axes.set_title(f"Start of a container, registry behind {link}", fontsize=11)
    axes.grid(axis="y", which="major", alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.07), frameon=False)
    figure.tight_layout()
    written = []
    for ending in ("svg", "png"):
        path = stem.with_suffix(f".{ending}")
        figure.savefig(path, metadata={"Date": None} if ending == "svg" else {"Software": None})
        written.append(path)
    pyplot.close(figure)
    return written


def write(results: Sequence[Result], out: Path) -> list[Path]:
    """table.md, table.json and one chart per link."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(f"{table(results)}\n{conditions(results)}")
    (out / "table.json").write_text(json.dumps(as_json(results), indent=1) + "\n")
    written = [out / "table.md", out / "table.json"]
    for link in medians(results):
        written += chart(results, link, out / f"experiment-{link.split()[0]}")
    return written


def into(results: Sequence[Result], docs: Path) -> list[Path]:
    """The charts, the tables between two marks of performance.md (ValueError when it has none), and every start of
    them, for `load` to have with those of a later run."""
    page = docs / "performance.md"
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, behind = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page}: the marks are not there, {BEGIN} and {END}")
    starts = docs / "experiment.jsonl"
    starts.write_text("".join(f"{json.dumps(asdict(one))}\n" for one in results))
    written = [page, starts]
    blocks = []
    for link in medians(results):
        drawn = chart(results, link, docs / f"experiment-{link.split()[0]}")
        written += drawn
        picture = next((path.name for path in drawn if path.suffix == ".svg"), "")
        blocks += [f"![seconds to start four images]({picture})\n"] if picture else []
        blocks.append(table([one for one in results if one.link == link]))
    page.write_text("\n".join([before + BEGIN + "\n", *blocks, conditions(results), END + behind]))
    return written


__all__ = ["BARS", "CHART", "SIDES", "as_json", "chart", "conditions", "into", "load", "medians", "table", "write"]
