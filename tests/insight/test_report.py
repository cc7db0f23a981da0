"""The report, on runs that were trained: its numbers against the models, its page in a browser."""

import csv
import json
import shutil
import time
from dataclasses import replace
from statistics import mean, stdev

import pytest
import torch
from safetensors.torch import load_file, save_file

from gowide_dist import load_model, load_recipe
from gowide_dist.files import sha256
from gowide_dist.insight.latency import latency_ms
from gowide_dist.insight.plots import draw
from gowide_dist.insight.report import _run_section, report
from gowide_dist.insight.results import read_results, spread
from gowide_dist.insight.text import table
from gowide_dist.insight.trained import open_trained
from gowide_dist.pipeline import walk
from gowide_dist.prepare import prepare
from gowide_dist.run import Run
from tests.command import gowide, refused
from tests.fashion import chain, encode_part, write_job
from tests.insight.browser import look_at


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The chain under one teacher with two seeds, imitation and distillation beside as many plain epochs."""
    root = tmp_path_factory.mktemp("several")
    recipe = chain(encode_part(root, 600, 200))
    stages = recipe["stages"]
    recipe["data"]["seed"] = stages["teacher"]["seed"] = 0
    stages["distill"]["epochs"] = 1
    del stages["finetune"]
    stages["baseline"] = {"train": "thin", "objective": "labels", "epochs": 3, "optim": {"lr": 0.05}}
    trained_runs = []
    for seed in (0, 1):
        job = write_job(root, {**recipe, "name": f"chain-{seed}", "seed": seed})
        prepared = prepare(load_recipe(job), root / "runs")
        walk(prepared.run, [instance.key for instance in prepared.unfinished])
        trained_runs.append(prepared.run)
    return trained_runs


@pytest.fixture(scope="module")
def reported(runs, tmp_path_factory):
    """The first run with its report as text and as data."""
    text, data = report(runs[:1])
    return runs[0], text, data


@pytest.fixture
def copy(runs, tmp_path):
    shutil.copytree(runs[0].path, tmp_path / "copy")
    return Run(tmp_path / "copy")


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_agreement_dead_channels_and_latency_of_finished_networks(reported):
    run, text, data = reported
    results = {f"{row['stage']}/{row['network']}": row for row in data["results"]}
    trained = open_trained(run.path, "teacher")
    images = trained.validation_images(trained.recipe.data.val)
    mean, std = (
        torch.tensor(values)[:, None, None] * 255 for values in (trained.preprocessing.mean, trained.preprocessing.std)
    )
    pixels = torch.cat([batch.images.clone() for batch in images.batches()]).permute(0, 3, 1, 2).float()
    images.close()
    with torch.inference_mode():
        outputs = {stage: load_model(run.path, stage)((pixels - mean) / std) for stage in ("teacher", "distill")}
    predictions = {stage: logits.argmax(dim=1) for stage, (logits, _) in outputs.items()}
    agreement = 100 * (predictions["teacher"] == predictions["distill"]).double().mean()
    assert results["distill/thin"]["agreement"] == pytest.approx(float(agreement), abs=0.51)  # one of 200, by rounding
    assert results["teacher/wide"]["agreement"] is None
    for stage, (_, blocks) in outputs.items():
        dead = [int((block.amax((0, 2, 3)) == 0).sum()) for block in blocks]
        assert data["dead_channels"][f"{stage}/{'wide' if stage == 'teacher' else 'thin'}"] == dead
    assert all(row["latency_ms_1"] > 0 and row["latency_ms_64"] > 0 for row in results.values())
    assert f"{results['distill/thin']['agreement']:.2f}" in text
    written = rows(run.report / "results.csv")
    assert [float(row["top1"]) for row in written] == [row["top1"] for row in data["results"]]
    assert all((run.report / f"{name}.png").read_bytes().startswith(b"\x89PNG")
               for name in ("loss", "accuracy"))  # fmt: skip


def test_accuracy_in_the_mean_of_classes_stands_beside_top1(copy):
    """Unless it is the same, because the classes have equally many images."""
    text, data = report([copy], measure=False)
    row = data["results"][0]
    assert row["balanced_top1"] == pytest.approx(copy.stage("teacher/wide").done.balanced_top1) != row["top1"]
    assert "top-1 %  balanced %  top-5 %" in text and f"{row['balanced_top1']:.2f}" in text
    assert float(rows(copy.report / "results.csv")[0]["balanced_top1"]) == pytest.approx(row["balanced_top1"])
    for path in copy.path.glob("stages/*/*/done.json"):
        done = json.loads(path.read_text())
        path.write_text(json.dumps({**done, "balanced_top1": done["top1"]}))
    assert "balanced" not in report([copy], measure=False)[0]
    for path in copy.path.glob("stages/*/*/done.json"):  # of a run from before it was noted
        done = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in done.items() if key != "balanced_top1"}))
    assert "balanced" not in report([copy], measure=False)[0]


def test_top5_is_left_out_where_it_is_always_all(runs):
    """And nothing is explained that the table does not have."""
    results = read_results(runs[0])
    for classes, shown in ((6, True), (5, False)):
        data = results.recipe.data.model_copy(update={"classes": classes})
        section = _run_section(replace(results, recipe=results.recipe.model_copy(update={"data": data})))
        assert ("top-5 %" in table(section.head, section.rows)) is shown
        assert "Balanced" in section.caption
    unmeasured = _run_section(replace(results, measured={key: {} for key in results.done}))
    assert "Latency" not in unmeasured.caption and "Agreement" not in unmeasured.caption


@pytest.mark.filterwarnings("error")
def test_dots_without_a_line_have_no_legend():
    """Of a stage with epochs: 0."""
    assert "<svg" in draw(lambda ax: ax.plot([0], [1.0], "o"))


def test_latency_is_a_median_after_warm_up():
    durations = iter([0.5, 0.5, 0.01, 0.2, 0.03] + [0.02] * 50)
    calls = []

    def forward(images):
        calls.append(images)
        time.sleep(next(durations))

    assert latency_ms(forward, torch.zeros(1), seconds=0.2) == pytest.approx(30, abs=15)
    assert len(calls) == 5
    assert latency_ms(calls.append, torch.zeros(1)) < 1
    assert len(calls) == 5 + 2 + 50


def test_dead_channels_are_reported(copy):
    before = report([copy])[1]["dead_channels"]["distill/thin"]
    stage_dir = copy.stage("distill/thin")
    weights = load_file(stage_dir.model)
    weights["layer2.0.bn3.bias"][:3] = -1e6  # the unit ends in a ReLU
    save_file(weights, stage_dir.model)
    done = json.loads((stage_dir.path / "done.json").read_text())
    (stage_dir.path / "done.json").write_text(json.dumps({**done, "model_sha256": sha256(stage_dir.model)}))
    text, data = report([copy])
    dead = data["dead_channels"]["distill/thin"]
    assert dead[0] == before[0]
    assert max(3, before[1]) <= dead[1] <= before[1] + 3
    line = f"{dead[1]} of 32 channels of block 2 are zero for all validation images"
    assert line in text
    assert line in (copy.report / "report.html").read_text()


def test_measurements_are_kept(reported, capfd):
    run, text, _ = reported
    before = (run.report / "measured.json").stat().st_mtime_ns
    assert report([run])[0] == text == report([run], measure=False)[0]
    assert (run.report / "measured.json").stat().st_mtime_ns == before
    assert capfd.readouterr().err == ""


def test_where_its_folder_cannot_be_written(copy, tmp_path, capfd):
    """Measurements are shown, though not kept."""
    shutil.rmtree(copy.report, ignore_errors=True)
    copy.report.write_text("no folder")
    (copy.path / "environment.json").write_text("[1]")
    text, data = report([copy], out=tmp_path / "out")
    assert all(row["latency_ms_1"] > 0 for row in data["results"])
    assert f"more in {tmp_path / 'out'}" in text
    assert "the measurements are not kept" in capfd.readouterr().err


def test_without_its_data(copy):
    recipe = copy.recipe_path.read_text().replace("val.beton", "gone.beton")
    copy.recipe_path.write_text(recipe)
    (copy.report / "measured.json").unlink(missing_ok=True)
    text, data = report([copy])
    assert "distill/thin: not measured:" in text
    assert "gone.beton" in data["not_measured"]["distill/thin"]
    assert all(row["agreement"] is None and row["latency_ms_1"] > 0 for row in data["results"])
    assert "gone.beton" in (copy.report / "report.html").read_text()


def test_a_run_in_progress(copy):
    stage_dir = copy.stage("distill/thin")
    (stage_dir.path / "done.json").unlink()
    lines = stage_dir.metrics.read_text().splitlines()
    stage_dir.metrics.write_text("\n".join([lines[0], '{"kind": "tr', '"words"', lines[1]]) + '\n{"kin')
    text, _ = report([copy], measure=False)
    assert "3 of 4 stages done" in text
    epoch = json.loads(lines[1])["epoch"]
    assert f"distill/thin: epoch {epoch:.2f} of 1" in text
    assert f"distill/thin: epoch {epoch:.2f} of 1" in (copy.report / "report.html").read_text()


def test_a_run_that_has_only_begun(copy):
    shutil.rmtree(copy.path / "stages")
    shutil.rmtree(copy.report, ignore_errors=True)
    text, _ = report([copy], measure=False)
    assert "0 of 4 stages done" in text
    assert text.count("not started") == 4
    assert "0 of 4 stages done" in (copy.report / "report.html").read_text()


def test_several_seeds(runs, tmp_path):
    ascii_alone = {"PYTHONIOENCODING": "ascii"}  # which has no ±
    result = gowide("report", *[run.path for run in runs], "--out", tmp_path, env=ascii_alone)
    assert result.returncode == 0, result.stderr
    done = {key: [run.stage(key).done.top1 for run in runs] for key in ("distill/thin", "baseline/thin")}
    difference = [a - b for a, b in zip(done["distill/thin"], done["baseline/thin"], strict=True)]
    statistics = {row["stage"]: row for row in rows(tmp_path / "runs.csv")}
    assert statistics["teacher"]["top1_n"] == "1"  # shared
    assert statistics["imitate"]["minus_baseline_n"] == ""  # fewer epochs
    assert statistics["distill"]["top1_n"] == statistics["distill"]["minus_baseline_n"] == "2"
    assert float(statistics["distill"]["top1_mean"]) == pytest.approx(mean(done["distill/thin"]), abs=1e-4)
    assert float(statistics["distill"]["minus_baseline_mean"]) == pytest.approx(mean(difference), abs=1e-4)
    assert float(statistics["distill"]["minus_baseline_sd"]) == pytest.approx(stdev(difference), abs=1e-4)
    line = next(line for line in result.stdout.splitlines() if line.startswith("| distill"))
    shown = f"{mean(done['distill/thin']):.2f} ± {stdev(done['distill/thin']):.2f}"
    assert shown.replace("±", "?") in line
    assert shown in (tmp_path / "runs.html").read_text()
    assert "(seeds 0, 1)" in result.stdout
    balanced = [run.stage("distill/thin").done.balanced_top1 for run in runs]
    assert f"| {mean(balanced):.2f} ± {stdev(balanced):.2f}".replace("±", "?") in line
    assert "balanced %" in result.stdout
    assert float(statistics["distill"]["balanced_top1_mean"]) == pytest.approx(mean(balanced), abs=1e-4)


def test_a_seed_that_has_finished_nothing_has_no_part(runs, copy, tmp_path):
    """And classes with equally many validation images need no accuracy of their own."""
    shutil.rmtree(copy.path / "stages")
    other = copy.path.parent / "other"
    shutil.copytree(runs[1].path, other)
    for path in other.glob("stages/*/*/done.json"):
        done = json.loads(path.read_text())
        path.write_text(json.dumps({**done, "balanced_top1": done["top1"]}))
    text, _ = report([copy, Run(other)], out=tmp_path / "out")
    assert f"{copy.path}, {other} (seeds 1)" in text
    assert "balanced" not in text


def test_runs_that_differ_in_more(runs, copy, tmp_path):
    copy.recipe_path.write_text(copy.recipe_path.read_text().replace("epochs: 3", "epochs: 4"))
    text, data = report([*runs, copy], out=tmp_path / "out")
    assert [len(group["runs"]) for group in data["groups"]] == [2, 1]
    assert "| stages.baseline.epochs" in text
    assert "stages.baseline.epochs" in (tmp_path / "out" / "runs.html").read_text()
    named = copy.path.parent / "elsewhere"
    shutil.copytree(copy.path, named)
    recipe = (named / "recipe.yaml").read_text().replace("epochs: 4", "epochs: 5")
    (named / "recipe.yaml").write_text(recipe.replace("name: chain-0", "name: other"))
    report([*runs, copy, Run(named)], out=tmp_path / "out")
    names = [row["recipe"] for row in rows(tmp_path / "out" / "runs.csv")]
    assert list(dict.fromkeys(names)) == [str(runs[0].path), str(copy.path), "other"]


def test_the_same_twice_is_refused(runs, copy):
    line = refused("report", runs[0].path, copy.path)
    assert "same recipe and seed" in line
    assert spread([]) is None
    assert spread([1.0])["sd"] is None


@pytest.mark.parametrize("several", [False, True])
def test_the_page_in_a_browser(reported, runs, tmp_path, several):
    if not (chromium := shutil.which("chromium")):
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    _, data = report(runs if several else runs[:1], out=tmp_path / "report")
    page = tmp_path / "report" / ("runs.html" if several else "report.html")
    seen, asked = look_at(page, [1280, 800, 400], chromium, tmp_path / "chromium")
    dark, _ = look_at(page, [400], chromium, tmp_path / "chromium", dark=True)
    assert (seen["400"]["ink"], seen["400"]["paper"]) == ("rgb(31, 35, 41)", "rgb(255, 255, 255)")
    assert (dark["400"]["ink"], dark["400"]["paper"]) == ("rgb(230, 237, 243)", "rgb(15, 19, 24)")
    assert set(dark["400"]["words"]) == (set() if several else {dark["400"]["ink"]})
    assert set(asked) <= {"/wrapper.html", f"/{page.name}", "/favicon.ico"}
    numbers = [f"{row['top1']:.2f}" for run in data.get("runs", [data]) for row in run["results"]]
    for width, shown in seen.items():
        assert len(shown["figures"]) == (0 if several else 5), width
        assert set(shown["words"]) == (set() if several else {shown["ink"]})
        assert all(drawn > 100 and width > 200 for drawn, width in shown["figures"]), width
        assert shown["overflow"] <= 0, width
        assert shown["hidden"] and max(shown["hidden"]) <= 0, width  # no column has to be scrolled to
        assert "`" not in shown["text"]
        assert shown["asked"] == []
        assert all(number in shown["text"] for number in numbers)
        assert "not measured" not in shown["text"] or several
