"""A profile as one HTML page that loads nothing from elsewhere."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from synco_fast import config_text
from synco_fast.evaluation.report import METHODS, PAGE, escaped, fact_list, html_table, section
from synco_fast.profiling import figures, text


def page(result: dict[str, Any], output: Path) -> str:
    """The page of a profile, `result` being what `profile.json` holds."""
    about = result["about"]
    config = about["config"]
    return PAGE.substitute(
        title=escaped(f"Profile: {METHODS[config['method']]}, {config['model']['arch']}"),
        subtitle=escaped(f"{about['source']} in {output}, started {about['started']}"),
        facts=fact_list(_facts(result)),
        sections="\n".join(_sections(result)),
        environment=_environment(about, result["speed"]),
        config=escaped(config_text.to_yaml(config)),
    )


def _facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    step, added = result["step"], result["synthetic_negatives"]
    facts = [
        ("limit", result["verdict"]["limit"]),
        ("step", f"{text.milliseconds(step['time']['median_ms'])} ms"),
        ("images/s", f"{step['images_per_second']:,.0f}"),
        ("the op", f"{step['stages']['op']['share']:.1%}"),
    ]
    if added is not None:
        facts.append(("synthetic negatives add", f"{added['share_of_without']:+.1%}"))
    if result["about"]["images"] is not None:
        facts.append(("data wait", f"{step['stages']['data wait']['share']:.1%}"))
    return facts


def _sections(result: dict[str, Any]) -> Iterable[str]:
    yield _verdict(result["verdict"])
    yield _stages(result)
    yield _op(result)
    if result["op"]["kinds"]:
        yield _kinds(result)
    if result["memory"]["devices"]:
        yield section(
            "Memory over a step",
            figures.memory(result["memory"]["devices"], result["memory"]["stages"]),
            "What tensors hold, at each allocation and release of one step under torch.profiler; the stages behind it "
            "are the host's. A GPU's is all that PyTorch has allocated there; a CPU's is what has been allocated, less "
            "what was released, since the profiler began, so weights, optimizer and queue are not in it.",
        )
    rows = [
        [row["name"], f"{row['calls']:,.1f}", text.milliseconds(row["ms"]), f"{row['share']:.1%}"]
        for row in result["operators"]
    ]
    yield section(
        "Top operators",
        html_table([["operator", "calls a step", "own ms a step", "share"], *rows]),
        "By their own time, called operators left out, in steps under torch.profiler, which makes short ones look "
        "longer; on a GPU these are kernels. trace.json.gz beside this page has each call on a timeline: open it in "
        "Perfetto, whose ranges bear the stages' names.",
    )


def _verdict(verdict: dict[str, Any]) -> str:
    advice = "".join(
        f"<li><code>{escaped(row['key'])}</code> (now {escaped(row['now'])}): {escaped(row['set'])}</li>"
        for row in verdict["advice"]
    )
    numbers = [[name.replace("_", " "), _number(value)] for name, value in verdict["numbers"].items()]
    return section(
        "What limits you",
        f"<p><strong>{escaped(verdict['limit'])}</strong>: {escaped(verdict['evidence'])}.</p>"
        + (f"<p>Keys to turn:</p><ul>{advice}</ul>" if advice else "<p>No key is left to turn.</p>")
        + "<details><summary>Numbers it was judged by</summary>"
        + html_table([["share", "value"], *numbers])
        + "</details>",
        "The first that applies of: input, launches, communication, the op, and for the rest memory or compute.",
    )


def _stages(result: dict[str, Any]) -> str:
    configured = result["configured_step"]
    note = (
        ""
        if configured is None
        else f" With speed.cuda_graph and speed.key_stream as configured a step takes "
        f"{text.milliseconds(configured['time']['median_ms'])} ms, without waiting for data."
    )
    return section(
        "Stages of the step",
        figures.stages(result["step"])
        + f"<details><summary>As a table</summary>{html_table(text.stage_rows(result['step']))}</details>",
        "Own time of each stage, a gather inside it left out; what no stage claims is shown as unattributed. The step "
        "is that of training once its synthetic negatives have begun, with speed.cuda_graph and speed.key_stream off, "
        f"with which stages would have no times of their own.{note}",
    )


def _op(result: dict[str, Any]) -> str:
    op = result["op"]
    shape = ", ".join(f"{name} {size:,}" for name, size in op["shape"].items())
    head = f"<p>Backend {escaped(op['backend'])}: {escaped(shape)}, {escaped(op['dtype'])} queue.</p>"
    if op["phases"] is None:
        content = f"{head}<p>No phases: {escaped(op['no_phases_because'])}.</p>"
    else:
        content = head + figures.phases(result)
    return section(
        "Inside the op",
        content,
        "Where the op's time goes by the clocks inside it, as shares of its stage: the similarities with the queue, "
        "their weights and the gradient are plain MoCo's; selection of the hard set, draws, parents and the six kinds "
        "are what synthetic negatives add.",
    )


def _kinds(result: dict[str, Any]) -> str:
    op, added = result["op"], result["synthetic_negatives"]
    return section(
        "What synthetic negatives cost",
        f"<p>They add <strong>{escaped(text.overhead(added))}</strong>.</p>"
        + figures.kinds(op)
        + html_table(text.kind_rows(op)),
        "The step, and the op alone on the queries, keys and queue of a step, timed in turn with and without each "
        "kind, in an order drawn anew each round: the median of the paired differences and its 95% bootstrap interval. "
        "Beside it the clocks inside the op: the kind's own phase, and the same with its part of the draws and with "
        "the parents' rows that no other kind has drawn, which leaving it out saves, too. They agree where that lies "
        "in the interval. All of them together include what no single kind saves: the selection of the hard set.",
    )


def _environment(about: dict[str, Any], speed: dict[str, Any]) -> str:
    facts = {key: value for key, value in about.items() if key != "config"} | {"speed": speed}
    return (
        f"<details><summary>Versions and machine</summary><pre>{escaped(json.dumps(facts, indent=1))}</pre></details>"
    )


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.1%}" if isinstance(value, float) else str(value)
