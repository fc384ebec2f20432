"""The report's data: what it refuses, and that it comes back from disk as it went there."""

from __future__ import annotations

import itertools
import json
import math
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from damage import changes, failing_writes, full_disk, refused_or_same
from PIL import Image
from report.conftest import alike, with_changes

from thinsight.errors import StorageError, ThinsightError
from thinsight.records import seal, unseal
from thinsight.report import data as d
from thinsight.report.data import DATA_FILE, PICTURE_FOLDER, load_report_data, save_report_data
from thinsight.report.html import render, write_report
from thinsight.schedule import Schedule
from thinsight.searches.run import Trial

IMAGE = Image.new("RGB", (32, 32), "white")
ROW = d.ChangedAnswer("a", "what ?", "", "red", "blue", 1.0, 0.0)


def test_round_trip_on_disk(report, tmp_path):
    path = save_report_data(tmp_path / "run", report)
    assert path.name == DATA_FILE
    assert load_report_data(tmp_path / "run") == report


def test_a_report_from_before_changes_were_kept_is_read(report, tmp_path):
    changed = with_changes(report)
    save_report_data(tmp_path, changed)
    assert load_report_data(tmp_path) == changed

    def earlier(value):
        del value["changes"]
        for picture in value["pictures"]:
            del picture["outcome"]

    _edit(tmp_path, earlier)
    assert load_report_data(tmp_path) == report


def test_round_trip_of_the_least_report(bare_report, tmp_path):
    save_report_data(tmp_path, bare_report)
    assert load_report_data(tmp_path) == bare_report
    assert not (tmp_path / PICTURE_FOLDER).exists()


def test_saving_twice_leaves_no_partial_file(bare_report, tmp_path):
    save_report_data(tmp_path, bare_report)
    save_report_data(tmp_path, replace(bare_report, title="second"))
    assert load_report_data(tmp_path).title == "second"
    assert [p.name for p in tmp_path.iterdir()] == [DATA_FILE]


def test_undefined_tau_survives_as_null(bare_report, tmp_path):
    data = replace(bare_report, consistency=alike((math.nan, 0.5)))
    path = save_report_data(tmp_path, data)
    assert json.loads(path.read_text())["consistency"]["tau"] == [None, 0.5]
    tau = load_report_data(tmp_path).consistency.tau
    assert math.isnan(tau[0])
    assert tau[1] == 0.5


def test_picture_takes_arrays_and_sorts_them():
    picture = d.Picture(IMAGE, (2, 2), [np.array([3, 0]), np.array([], dtype=int)], (1, 2), "q")
    assert picture.kept == ((0, 3), ())
    assert picture.num_tokens == 4


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: d.Picture(IMAGE, (2, 2), [[4]], (0,), "q"), "token 4 is outside the 2 x 2 grid"),
        (lambda: d.Picture(IMAGE, (2, 2), [[-1]], (0,), "q"), "token -1 is outside"),
        (lambda: d.Picture(IMAGE, (2, 2), [[0]], (0, 1), "q"), "1 kept lists for 2 layers"),
        (lambda: d.Picture(IMAGE, (0, 2), [], (), "q"), "grid 0 x 2 is empty"),
        (lambda: d.Picture(IMAGE, (2, 2), [[0]], (0,), "q", outcome="bad"), "picture outcome 'bad' is unknown"),
        (lambda: d.Changes(3, 2, 2), "changes are 2 worse and 2 better of 3"),
        (lambda: d.Changes(3, 1, 0, (ROW, ROW)), "changes show 2 rows"),
        (lambda: replace(ROW, full=math.nan), "changed answer 'a'.full is nan"),
        (lambda: d.MethodRow("x", (), 0.5, None, 1.0, 1.0, 1.0, kind="best"), "method kind 'best' is unknown"),
        (lambda: d.MethodRow("x", (), math.nan, None, 1.0, 1.0, 1.0), "method 'x'.score is nan"),
        (lambda: d.TaskRow("t", 1, math.inf, 0.5), "per_task.full is inf"),
        (lambda: d.Headline(0.5, 0.5, d.Interval(0.0, math.nan, 0.1), 0.3, 2.0), "headline.drop.low is nan"),
        (lambda: alike((0.5,), ((1.0,),)), "tau_matrix must be 2 x 2"),
        (lambda: alike((0.5,), topk_overlap=(0.1, 0.2)), "topk_overlap has 2 values; it needs 1"),
        (lambda: alike((0.5,), tied_share=(0.1,)), "tied_share has 1 values; it needs 2"),
        (
            lambda: d.ReportData("t", d.ModelInfo("m", num_layers=3), keep_rates=(1.0, 0.5)),
            "the schedule has 2 layers but the model has 3",
        ),
        (lambda: d.ReportData("t", d.ModelInfo("m"), keep_rates=(0.5, 1.0)), "keep_rates"),
    ],
)
def test_bad_data_is_refused(build, says):
    with pytest.raises(ThinsightError) as caught:
        build()
    assert says in str(caught.value)


def _edit(folder, change):
    """A report that was written so, with a checksum that fits."""
    path = folder / DATA_FILE
    value = unseal(json.loads(path.read_text()))
    change(value)
    path.write_text(json.dumps(seal(value)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.update(schema_version=1), "schema_version 1 is unknown"),
        (lambda v: v.pop("schema_version"), "schema_version None is unknown"),
        (lambda v: v.update(colour="red"), "unknown key 'colour'"),
        (lambda v: v.pop("title"), "key 'title' is missing"),
        (lambda v: v["model"].update(num_layers=2.5), "report.json.model.num_layers: expected a whole number"),
        (lambda v: v["model"].update(num_layers=True), "expected a whole number, got True"),
        (lambda v: v["headline"].update(score="high"), "report.json.headline.score: expected a finite number"),
        (lambda v: v["headline"].update(score=None), "headline.score: expected a finite number, got None"),
        (lambda v: v["trials"][0].update(accepted=1), "trials[0].accepted: expected true or false"),
        (lambda v: v["trials"][0]["schedule"].update(keep_rates=[0.5, 1.0]), "trials[0].schedule: keep_rates"),
        (lambda v: v["timing"][0].update(reduced=[]), "timing[0]: timing 'prefill' has 7 full runs, 0 reduced ones"),
        (lambda v: v.update(schema_version=2), "schema_version 2 is unknown"),
        (lambda v: v.update(methods={}), "report.json.methods: expected a list"),
        (lambda v: v.update(model=[]), "report.json.model: expected an object"),
        (lambda v: v.update(environment=[]), "report.json.environment: expected an object"),
        (lambda v: v["pictures"][0].update(grid=[16]), "pictures[0].grid[1]: "),
        (lambda v: v["pictures"][0].update(grid=[16, 16, 1]), "should have at most 2 items"),
        (lambda v: v["pictures"][0].update(image="../secret.png"), "is not a plain file name"),
        (lambda v: v["pictures"][0].update(image=7), "is not a plain file name"),
        (lambda v: v["pictures"][0].update(image="gone.png"), "missing or damaged"),
    ],
)
def test_bad_file_is_refused_in_one_line(report, tmp_path, change, says):
    save_report_data(tmp_path, report)
    _edit(tmp_path, change)
    with pytest.raises(ThinsightError) as caught:
        load_report_data(tmp_path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "write the report anew" in str(caught.value)


def test_truncated_json_and_missing_folder(bare_report, tmp_path):
    with pytest.raises(ThinsightError, match=r"no report\.json in"):
        load_report_data(tmp_path / "nowhere")
    path = save_report_data(tmp_path, bare_report)
    path.write_text(path.read_text()[:20])
    with pytest.raises(ThinsightError, match="not valid JSON"):
        load_report_data(tmp_path)
    for content, says in (
        ("[]", "is not a JSON object"),
        ("{}", "has no checksum"),
        ("[" * 100_000, "nested too deep"),
        (f'{{"title": {"1" * 5000}}}', "5000 digits"),
    ):
        path.write_text(content)
        with pytest.raises(StorageError, match=rf"report\.json is .*{says}.*; write the report anew"):
            load_report_data(tmp_path)


def test_truncated_picture(report, tmp_path):
    save_report_data(tmp_path, report)
    file = min((tmp_path / PICTURE_FOLDER).iterdir())
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ThinsightError, match="missing or damaged"):
        load_report_data(tmp_path)


def test_one_changed_byte_is_told_or_changes_nothing(report, tmp_path):
    path = save_report_data(tmp_path, report)
    picture = min((tmp_path / PICTURE_FOLDER).iterdir())
    for file in (path, picture):
        whole, refused = file.read_bytes(), 0
        for changed in changes(whole, 120):
            file.write_bytes(changed)
            refused += refused_or_same(lambda: load_report_data(tmp_path), report, file)
        file.write_bytes(whole)
        assert refused > 100
    assert load_report_data(tmp_path) == report


def test_pictures_of_an_earlier_report_go_once_the_new_one_is_there(report, tmp_path):
    save_report_data(tmp_path, report)
    other = replace(report.pictures[0], image=Image.new("RGB", (32, 32), "red"))
    save_report_data(tmp_path, replace(report, pictures=(other,)))
    assert len(list((tmp_path / PICTURE_FOLDER).iterdir())) == 1
    assert load_report_data(tmp_path).pictures == (other,)


@pytest.mark.parametrize("error", [full_disk(), KeyboardInterrupt()], ids=["full", "interrupted"])
def test_a_report_is_the_old_one_or_the_new_one(report, bare_report, tmp_path, error):
    old = replace(bare_report, pictures=report.pictures[:1])
    picture = replace(report.pictures[0], image=Image.new("RGB", (32, 32), "red"))
    new = replace(bare_report, title="new", pictures=(picture,))
    pages = {render(old), render(new)}
    for call in itertools.count():
        folder = tmp_path / str(call)
        save_report_data(folder, old)
        write_report(folder / "report.html", old)
        with failing_writes(call, error) as failed, suppress(StorageError, KeyboardInterrupt):
            save_report_data(folder, new)
            write_report(folder / "report.html", new)
        assert load_report_data(folder) in (old, new)
        assert (folder / "report.html").read_text() in pages
        assert not list(folder.rglob("*.part"))
        if not failed:
            break
    assert call == 3 * 5


def test_no_link_is_followed(report, tmp_path):
    """Names that anyone can guess, in a folder that others may write, must not lead elsewhere."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("report.html.part", "report.json.part", "report.html", "report.json"):
        (folder / name).symlink_to(victim)
    save_report_data(folder, report)
    write_report(folder / "report.html", report)
    assert victim.read_text() == "precious"
    assert not (folder / "report.html").is_symlink()
    assert load_report_data(folder) == report


def test_half_of_a_surrogate_pair_is_written_as_its_escape(report, tmp_path):
    """A file name's odd byte, which Python hands over so, must not cost a finished search its report."""
    odd = replace(report, title="caf\udce9", per_task=(d.TaskRow("a\ud800b", 3, 1.0, 0.5),))
    save_report_data(tmp_path, odd)
    write_report(tmp_path / "report.html", odd)
    loaded = load_report_data(tmp_path)
    assert loaded.title == "caf\\udce9"
    assert loaded.per_task[0].task == "a\\ud800b"
    assert "a\\ud800b" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_unwritable_folder(report, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ThinsightError, match="cannot be written"):
        save_report_data(tmp_path / "file", report)


def test_infinite_number_is_refused(bare_report, tmp_path):
    trial = Trial(2, 0.5, 8, math.inf, True, True, Schedule((1.0, 0.5)))
    with pytest.raises(ThinsightError, match="infinite"):
        save_report_data(tmp_path, replace(bare_report, trials=(trial,)))
    assert not (tmp_path / DATA_FILE).exists()
