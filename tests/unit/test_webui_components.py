"""HTML made from values: escaped, and right where it computes something."""

from __future__ import annotations

import ast
import json
import math
import re
from pathlib import Path

import pytest

from lora_diffusion.jobs.queue import Job
from lora_diffusion.runs import Failure
from webui import translate
from webui.components.chart import Line, number, render_chart
from webui.components.form import Choices, render_form
from webui.components.html import duration, html, picture_url, size, with_code
from webui.components.monitor import render_head, render_log, render_matrix
from webui.components.report import render_problems, render_report, render_toml
from webui.components.runs_table import render_runs
from webui.components.strip import render_strip
from webui.services.form_values import default_fields
from webui.services.machine import Machine
from webui.services.overview import RunRow
from webui.services.preflight import Preflight
from webui.services.presets import presets
from webui.services.schema import settings, summary
from webui.translate import FOLDER, LANGUAGES, Translator, words

WEBUI = Path(__file__).parents[2] / "webui"
HOSTILE = "<img src=x onerror=alert(1)>\"'><script>alert(2)</script>"
T = Translator("en")
LINE = Line("loss", 1, [(1, 1.0), (2, 0.1), (3, 0.01)])


def job(**changes: object) -> Job:
    values = {
        "id": 1, "kind": "train", "name": HOSTILE, "run": Path("runs/x"), "status": "failed", "position": None,
        "step": 3, "steps": 10, "seconds_per_step": 0.5, "error": Failure("RunError", HOSTILE, HOSTILE),
        "created": 0.0, "started": 5.0, "ended": 15.0,
    }  # fmt: skip
    return Job(**(values | changes))  # pyright: ignore[reportArgumentType]


def captioning_row(job: Job) -> RunRow:
    return RunRow("captioning-1", job, HOSTILE, HOSTILE, HOSTILE, "", "", "", None, None)


def test_a_captioning_on_the_page_of_runs_leads_to_its_data_set_and_is_stopped_there() -> None:
    row = RunRow(
        "captioning-1",
        job(kind="caption", name="set", status="running", error=None),
        "data/set",
        "set",
        "blip",
        "",
        "",
        "",
        None,
        None,
    )
    shown = render_runs(T, [row], 20.0)

    assert 'href="/dataset?set=data%2Fset">Captions of set</a>' in shown
    assert 'data-act="stop" data-id="captioning-1"' in shown
    assert ">captioning</span>" in shown
    assert "data-tick" not in shown and "?copy=" not in shown


NUMBERS = dict.fromkeys(
    (
        *("training_seconds", "memory_bytes", "images", "steps", "images_left_out", "images_for_validation"),
        *("captions_missing", "captions_cut", "longest_caption_tokens", "largest_crop_loss", "epochs"),
        *("adapter_layers", "adapter_parameters", "seconds_per_step"),
    ),
    1,
)
"""Of a report of the check."""


def report_of_check(text: str, **lists: object) -> dict[str, object]:
    """What `check --json` prints, with one text in all places; `lists` are its warnings and findings."""
    texts = dict.fromkeys(("base", "family", "prediction", "device", "precision"), text)
    return {**NUMBERS, **texts, "buckets": {text: 1}, **lists}


@pytest.mark.parametrize(("language", "title"), [("en", "Warnings"), ("de", "Warnungen")])
def test_what_a_check_warns_of_is_shown_open_and_does_not_count_as_nothing(language: str, title: str) -> None:
    t = Translator(language)
    silent = render_report(t, Preflight(report_of_check("x", warnings=[], findings=[])))
    warned = render_report(t, Preflight(report_of_check("x", warnings=["70x70 is trained at 64x64."], findings=[])))

    assert t("check.nothing") in silent and "<details" not in silent
    assert t("check.nothing") not in warned
    assert f'<details class="finding" open><summary><b>1</b> {title}</summary>' in warned
    assert "<li>70x70 is trained at 64x64.</li>" in warned


def test_texts_from_files_are_escaped_everywhere() -> None:
    fields = default_fields() | {"run.name": HOSTILE, "dataset.0.path": HOSTILE, "preview.prompts": HOSTILE}
    fields |= {"adapter.kind": HOSTILE, "adapter.targets": HOSTILE, "run.metadata": HOSTILE}
    findings = [{"what": HOSTILE, "items": [HOSTILE]}]
    shown = [
        render_form(T, fields, Choices([HOSTILE], [HOSTILE], presets())),
        render_head(T, job(), HOSTILE, 0.0),
        render_log(T, [HOSTILE]),
        render_matrix(T, [HOSTILE], [0], {(0, 0): HOSTILE}, [HOSTILE], None, frozenset()),
        render_problems(T, [(HOSTILE, HOSTILE)]),
        render_toml(T, HOSTILE, HOSTILE),
        render_report(T, Preflight(report_of_check(HOSTILE, warnings=[HOSTILE], findings=findings))),
        render_report(T, Preflight(None, HOSTILE)),
        render_chart([Line(HOSTILE, 1, [(1, 1.0)])], step_word=HOSTILE, label=HOSTILE),
        with_code(f"`{HOSTILE}`"),
        render_runs(T, [captioning_row(job(kind="caption", status="running"))], 0.0),
        render_strip(T, Machine("CPU", False, 1, 2), [(HOSTILE, job(kind="caption", status="running"))], 0),
    ]
    for part in shown:
        assert "<img src=x" not in part
        assert "<script" not in part
        assert "&lt;img" in part or "%3Cimg" in part


def test_only_constants_are_trusted_as_html() -> None:
    """`Markup(x)` and `html(x, …)` with anything but a text that stands in the code would let files write HTML."""
    wrong: list[str] = []
    found = 0
    for path in WEBUI.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Markup", "html")
            ):
                continue
            found += 1
            is_constant = bool(node.args) and isinstance(node.args[0], ast.Constant | ast.IfExp)
            is_conditional = bool(node.args) and isinstance(node.args[0], ast.IfExp)
            if is_conditional:
                choice = node.args[0]
                assert isinstance(choice, ast.IfExp)
                is_constant = isinstance(choice.body, ast.Constant) and isinstance(choice.orelse, ast.Constant)
            if not is_constant and path.name != "html.py":
                wrong.append(f"{path.name}:{node.lineno}")

    assert found > 60
    assert wrong == []


def test_markup_is_kept_and_text_is_not() -> None:
    assert html("<b>{x}</b>", x="<i>") == "<b>&lt;i&gt;</b>"
    assert html("<b>{x}</b>", x=html("<i>")) == "<b><i></b>"
    assert with_code("a `b<` c") == "a <code>b&lt;</code> c"


def test_every_setting_has_a_control_with_a_name_and_an_id() -> None:
    shown = str(render_form(T, default_fields(), Choices([], [], {})))
    rows = [row for section in settings().values() for row in section]
    names = re.findall(r'data-field="([\w.]+)"', shown)

    for row in rows:
        name = row.key if row.section == "dataset" else row.name
        assert names.count(name) == (2 if row.section == "dataset" else 1), row.name  # with the template of a folder
    ids = re.findall(r' id="([^"]+)"', shown)
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"train-[a-z0-9-]+", id) for id in ids)


def test_a_chart_places_points_between_its_edges() -> None:
    shown = str(render_chart([LINE], step_word="step"))
    [points] = re.findall(r'points="([^"]+)"', shown)
    pairs = [tuple(map(float, pair.split(","))) for pair in points.split()]

    assert pairs[0][0] == 0 and pairs[-1][0] == 1000
    assert [y for _, y in pairs] == sorted(y for _, y in pairs)  # a falling loss goes down, which is larger y
    assert all(0 <= y <= 300 for _, y in pairs)


def test_equal_factors_are_equal_distances_on_a_log_chart() -> None:
    [points] = re.findall(r'points="([^"]+)"', str(render_chart([LINE], step_word="step", is_log=True)))
    ys = [float(pair.split(",")[1]) for pair in points.split()]

    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.2)


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(1, math.nan)],
        [(1, 0.0)],
        [(1, math.inf), (2, -1.0)],
        [(5, 2.0)],
        [(1, 3.0), (2, 3.0)],
        [(1, 1e-30), (2, 1e30)],
    ],
)
@pytest.mark.parametrize("is_log", [True, False])
def test_a_chart_survives_any_values(points: list[tuple[float, float]], is_log: bool) -> None:
    shown = str(render_chart([Line("x", 1, points)], step_word="step", is_log=is_log))

    assert "nan" not in shown and "inf" not in shown


def test_a_chart_carries_its_values_for_the_pointer() -> None:
    data = re.search(r'data-lines="([^"]+)"', str(render_chart([LINE], step_word="step")))
    assert data is not None
    lines = json.loads(data[1].replace("&#34;", '"'))

    assert lines == [{"name": "loss", "tone": 1, "points": [[1, 1.0], [2, 0.1], [3, 0.01]]}]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0001, "1e-4"), (0.000125, "1.25e-4"), (0.1234567, "0.123"), (1200, "1,200"), (2.5, "2.5")],
)
def test_numbers_on_an_axis_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_times_sizes_and_addresses() -> None:
    assert [duration(s) for s in (5, 65, 3600 + 62, -3)] == ["0:05", "1:05", "1:01:02", "0:00"]
    assert [size(n) for n in (5, 2_300_000, 9_800_000_000)] == ["5 B", "2 MB", "9.8 GB"]
    assert picture_url("dataset", 'a b/"?#.png', 96) == "/picture/dataset/a%20b/%22%3F%23.png?w=96"


# ---- Words ----


def used_keys() -> set[str]:
    """Keys named in the code; of a key that is put together, all that begin like it."""
    used: set[str] = set()
    for path in (WEBUI / "static").glob("*.js"):  # a page's script has its own words, without the page's name
        text = path.read_text(encoding="utf-8")
        used |= {key for key in words("en") if f'"{key.partition(".")[2]}"' in text}
    for path in WEBUI.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in words("en"):
                used.add(node.value)
            if isinstance(node, ast.JoinedStr):
                pattern = "".join(
                    re.escape(str(part.value)) if isinstance(part, ast.Constant) else "[a-z_]+" for part in node.values
                )
                used |= {key for key in words("en") if re.fullmatch(pattern, key)}
    return used


def test_languages_have_the_same_keys_and_placeholders() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(LANGUAGES)
    english = words("en")
    assert len(english) > 100
    for language in LANGUAGES:
        other = words(language)
        assert list(other) == list(english)
        for key, text in other.items():
            assert text.strip() == text != ""
            assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", english[key])), key


@pytest.mark.parametrize("language", [language for language in LANGUAGES if language != "en"])
def test_every_setting_is_described_with_the_same_names_and_numbers(language: str) -> None:
    english = {row.name: row.description for rows in settings().values() for row in rows}
    english |= {section: summary(section) for section in settings()}
    other = translate.settings(language)

    def facts(text: str) -> list[str]:
        """What stands in backticks, and the numbers."""
        return sorted(re.findall(r"`[^`]*`|\d+", text))

    assert other.keys() == english.keys()
    for name, (label, about) in other.items():
        assert label and about != english[name]
        assert facts(about) == facts(english[name]), name
    page = str(render_form(Translator(language), default_fields(), Choices([], [], {}), ""))
    assert other["run.steps"][1].split("`")[0] in page and english["run.steps"].split("`")[0] not in page


def test_no_word_is_unused() -> None:
    assert set(words("en")) - used_keys() == set()


def test_a_word_that_is_not_there_is_an_error() -> None:
    with pytest.raises(KeyError):
        T("no.such.word")


def test_the_command_beside_the_config_trains_with_all_cores() -> None:
    """Accelerate's launcher would give its one process one thread."""
    shown = str(render_toml(T, "", "ink"))

    assert re.search(r'id="train-command">lora-diffusion train --config &(quot|#34);ink.toml&(quot|#34);<', shown)
