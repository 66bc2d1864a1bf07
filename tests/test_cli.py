from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import dyhead_zoo
from dyhead_zoo import DEFAULT_DETECTOR, cli, create_detector, registry
from dyhead_zoo.engine.checkpoint import write_weights
from dyhead_zoo.engine.config import TrainConfig
from dyhead_zoo.engine.info import canvas_of, count_parameters
from dyhead_zoo.models import atss
from dyhead_zoo.pretrained import PretrainedCfg
from dyhead_zoo.weights import read_state_dict

VERBS = ("list", "info", "predict", "eval", "train", "explain", "import", "benchmark", "push", "pull", "verify")
TINY = "test_atss"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures with one white object each, of classes ``lamp`` and ``cup`` in turn."""
    root = tmp_path_factory.mktemp("data")
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": 7, "name": "lamp"}, {"id": 3, "name": "cup"}]
    for number in range(1, 5):
        pixels = np.zeros((64, 64, 3), np.uint8)
        pixels[16:48, 8:56] = 255
        Image.fromarray(pixels).save(root / f"{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png", "height": 64, "width": 64})
        box = {"bbox": [8, 16, 48, 32], "area": 48 * 32, "iscrowd": 0}
        content["annotations"].append({"id": number, "image_id": number, "category_id": (7, 3)[number % 2], **box})
    (root / "annotations.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector of ``cup`` and ``lamp`` that finds something everywhere, with arguments of its own."""
    detector = create_detector(TINY, class_names=["cup", "lamp"], channels=64)
    nn.init.constant_(detector.head.cls_logits.bias, 2.0)  # type: ignore[union-attr, arg-type]
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    write_weights(path, detector, {})
    return path


def data_flags(folder: Path, prefix: str = "") -> list[str]:
    return [f"--{prefix}images", str(folder), f"--{prefix}annotations", str(folder / "annotations.json")]


def failure(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The message that a command which the user can mend ends with."""
    status: object
    try:
        status = cli.main([str(a) for a in argv])
    except SystemExit as end:  # argparse
        status = end.code
    errors = capsys.readouterr().err
    _, mark, message = errors.rpartition("dyhead-zoo: error: ")
    assert status == 2 and mark
    assert "Traceback" not in errors
    return mark + message.rstrip("\n")


# -- help and flags ----------------------------------------------------------------------------------------------------


def test_help_needs_no_torch() -> None:
    code = f"""
import contextlib, io, sys
from dyhead_zoo.cli import main
for argv in ([], *([verb] for verb in {VERBS})):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([*argv, "--help"])
    assert out.getvalue().startswith("usage: dyhead-zoo"), out.getvalue()
heavy = {{"torch", "torchvision", "timm", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "dyhead_zoo", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("dyhead-zoo ")


TRAIN = ["train", TINY, "--images", "i", "--annotations", "a", "--output", "o"]


def parsed_config(*flags: str) -> TrainConfig:
    args = cli.build_parser().parse_args([*TRAIN, *flags])
    return TrainConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(TrainConfig)})


def test_train_flags_default_to_the_settings() -> None:
    assert parsed_config() == TrainConfig()


@pytest.mark.parametrize("field", dataclasses.fields(TrainConfig), ids=lambda field: field.name)
def test_every_setting_has_a_flag(field: dataclasses.Field[Any]) -> None:
    flag, hint = "--" + field.name.replace("_", "-"), typing.get_type_hints(TrainConfig)[field.name]
    value: object
    if hint is bool:
        value, flags = not field.default, [flag if not field.default else flag.replace("--", "--no-", 1)]
    elif typing.get_origin(hint) is typing.Literal:
        value = next(choice for choice in typing.get_args(hint) if choice != field.default)
        flags = [flag, str(value)]
    else:
        kinds = set(typing.get_args(hint)) or {hint}
        value = 77 if int in kinds else 0.75 if float in kinds else "text"
        flags = [flag, str(value)]
    assert getattr(parsed_config(*flags), field.name) == value


def test_wrong_flags_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid choice: 'fly'" in failure(capsys, "fly")
    assert "NAME, --images, --annotations" in failure(capsys, "eval")
    assert "--batch-size" in failure(capsys, "predict", "--batch-size", "0")
    assert "'oops' is not of the form KEY=VALUE" in failure(capsys, *TRAIN, "--model-args", "oops")
    assert "7 is not in 0..1" in failure(capsys, "predict", "--score-threshold", "7")
    assert "--epochs" in failure(capsys, *TRAIN, "--epochs", "many")


# -- list and info -----------------------------------------------------------------------------------------------------


def test_list_shows_names_status_and_tags(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert rows["atss_resnet50_dyhead6"][:2] == ["url", "mmdet_1x_coco,"]
    assert rows[TINY] == ["none"] and DEFAULT_DETECTOR in rows
    assert cli.main(["list", "atss_resnet50*", "--pretrained", "--exclude", "*caffe*", "--exclude", "*official*"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["atss_resnet50.mmdet_1x_coco", "atss_resnet50_dyhead6.mmdet_1x_coco"]
    assert "'yolo*'" in failure(capsys, "list", "yolo*")


def info(capsys: pytest.CaptureFixture[str], name: str) -> dict[str, str]:
    assert cli.main(["info", name]) == 0
    return {key: text.strip() for key, text in (line.split(":", 1) for line in capsys.readouterr().out.splitlines())}


def test_info_shows_size_and_labels(capsys: pytest.CaptureFixture[str]) -> None:
    rows = info(capsys, TINY)
    detector = create_detector(TINY)
    assert float(rows["parameters"].split()[0]) == pytest.approx(count_parameters(detector) / 1e6, abs=0.01)
    assert rows["classes"].split()[0] == "80" and "person" in rows["classes"]
    assert rows["weights"].startswith("none") and not {"reported", "measured"} & rows.keys()
    assert "Did you mean" in failure(capsys, "info", "ats_resnet50_dyhead6")


def test_info_says_whose_a_figure_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"reported": {"AP": 43.3}, "reported_by": "its authors", "url": "https://example.org/w.pth"}
    cfg = registry.get_pretrained_cfg(TINY).replace(**theirs, measured={"AP": 0.431}, measured_on="val2017")
    monkeypatch.setitem(atss.cfgs, TINY, cfg)
    rows = info(capsys, TINY)
    assert rows["reported"] == "AP 43.3 (by its authors)" and rows["measured"] == "AP 43.1 (on val2017)"
    assert "https://example.org/w.pth" in rows["weights"] and "not checked" in rows["weights"]


def test_info_and_explain_leave_the_weights_of_a_saved_detector_unread(
    folder: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = info(capsys, f"local-dir:{weights}")
    assert rows["weights"] == f"local file: {weights}" and rows["classes"] == "2 (cup, lamp)"
    flags = ["--annotations", str(folder / "annotations.json"), "--images", str(folder)]
    assert cli.main(["explain", "--detector", f"local-dir:{weights}", *flags]) == 0
    captured = capsys.readouterr()
    assert "4 objects" in captured.out and not captured.err


def test_canvas_is_the_protocol_rounded_up() -> None:
    assert canvas_of(PretrainedCfg(short_side=800, long_side=1333, pad_divisor=32)) == (800, 1344)


# -- predict -----------------------------------------------------------------------------------------------------------


def test_predict_with_a_checkpoint_that_knows_its_detector(
    folder: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpoint", str(weights), "--output", str(tmp_path), "--device", "cpu"]
    assert cli.main(["predict", str(folder / "1.png"), str(folder / "[23].png"), *flags]) == 0
    content = json.loads((tmp_path / "predictions.json").read_text())
    assert [c["name"] for c in content["categories"]] == ["cup", "lamp"]
    assert len(content["images"]) == 3 and content["annotations"]
    assert all(a["score"] >= 0.3 for a in content["annotations"])
    assert {p.name for p in tmp_path.iterdir()} == {"predictions.json", "1.jpg", "2.jpg", "3.jpg"}
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 4 and out[-1].startswith("3 pictures, ")


def test_predict_without_input_takes_the_photo_and_says_so(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["predict", "--checkpoint", str(weights), "--output", str(tmp_path), "--no-draw"]) == 0
    assert "ships with matplotlib" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.json"]


def test_predict_goes_on_after_an_unreadable_file(
    folder: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no picture")
    flags = ["--checkpoint", str(weights), "--output", str(tmp_path / "out"), "--class-names", "a,b"]
    assert cli.main(["predict", str(bad), str(folder / "1.png"), *flags]) == 1
    captured = capsys.readouterr()
    assert f"could not read {bad}" in captured.err and "1 pictures" in captured.out
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(content["images"]) == 1 and content["categories"][0]["name"] == "a"


def test_foreign_checkpoints_may_carry_records_of_their_own(
    folder: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, _ = read_state_dict(weights)
    torch.save({"state_dict": tensors, "meta": {"config": "model = dict(...)"}}, tmp_path / "foreign.pth")
    flags = ["--checkpoint", tmp_path / "foreign.pth", "--detector", TINY, "--num-classes", 2]
    assert "of another shape" in failure(capsys, "predict", folder, *flags)  # 64 channels, and TINY has 32


def test_predict_names_what_is_wrong(folder: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "gone.png does not exist" in failure(capsys, "predict", folder / "gone.png")
    assert "no published weights" in failure(capsys, "predict", folder, "--detector", TINY)
    assert "Did you mean" in failure(capsys, "predict", folder, "--detector", "ats_resnet50")
    assert "no weight file at nothing.pth" in failure(capsys, "predict", folder, "--checkpoint", "nothing.pth")
    assert "not allowed with" in failure(capsys, "predict", folder, "--attention", "--no-draw")
    assert "device 'toaster'" in failure(capsys, "predict", folder, "--device", "toaster")
    assert "does not fit" in failure(
        capsys, "predict", folder, "--checkpoint", weights, "--detector", "test_atss_dyhead1"
    )


def test_debug_shows_the_traceback(folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        cli.main(["predict", str(folder / "gone.png"), "--debug"])


# -- eval --------------------------------------------------------------------------------------------------------------


def test_predict_and_eval_fuse(
    folder: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused: list[bool] = []
    forward = dyhead_zoo.Detector.forward
    monkeypatch.setattr(
        dyhead_zoo.Detector, "forward", lambda self, *args: fused.append(self.fused) or forward(self, *args)
    )
    flags = ["--checkpoint", str(weights), "--fuse"]
    assert cli.main(["predict", str(folder / "1.png"), "--output", str(tmp_path), "--no-draw", *flags]) == 0
    assert cli.main(["eval", TINY, *data_flags(folder), *flags]) == 0
    assert len(fused) == 5 and all(fused)
    capsys.readouterr()
    assert "leave one of them out" in failure(
        capsys, "eval", TINY, *data_flags(folder), *flags, "--output", tmp_path / "eval.json"
    )


def test_eval_writes_result_and_predictions(
    folder: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = ["--output", str(tmp_path / "new" / "eval.json"), "--predictions", str(tmp_path / "predictions.json")]
    flags = [*data_flags(folder), "--checkpoint", str(weights), "--batch-size", "2", "--max-images", "3"]
    assert cli.main(["eval", TINY, *flags, *outputs]) == 0
    assert "3 images, 3 objects" in capsys.readouterr().out
    result = json.loads((tmp_path / "new" / "eval.json").read_text())
    assert result["num_images"] == 3 and 0 <= result["metrics"]["AP50"] <= 1
    assert [row["name"] for row in result["per_class"]] == ["cup", "lamp"]
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    assert predictions and {p["category_id"] for p in predictions} <= {3, 7}


def test_eval_names_what_is_wrong(folder: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = data_flags(folder)
    known = ["eval", TINY, "--checkpoint", weights]
    assert "no published weights" in failure(capsys, "eval", TINY, *data)
    assert "share no class" in failure(capsys, *known, *data, "--class-names", "a,b")
    assert "gone" in failure(capsys, *known, "--images", folder, "--annotations", folder / "gone.json")
    assert "gone" in failure(capsys, *known, "--images", "gone", *data[2:])
    for flag in ("--output", "--predictions"):  # told before the weights are loaded
        assert f"{folder} is no regular file: give another path" in failure(capsys, "eval", TINY, *data, flag, folder)


def test_warnings_are_one_line(folder: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--checkpoint", str(weights), "--class-names", "cup,bottle", "--max-images", "1"]
    assert cli.main(["eval", TINY, *data_flags(folder), *flags]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "dyhead-zoo: warning: the detector does not know 'lamp': their objects count as misses"
    ]


# -- train -------------------------------------------------------------------------------------------------------------


def test_train_then_resume_then_eval(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["train", TINY, *data_flags(folder), "--output", str(tmp_path / "run"), "--device", "cpu"]
    run += ["--batch-size", "2", "--size", "64", "--num-workers", "0"]
    run += ["--model-args", "channels=64", "--model-args", "towers=1"]
    assert cli.main([*run, *data_flags(folder, "val-"), "--epochs", "1"]) == 0
    out = capsys.readouterr().out
    assert "1 epochs, 2 steps, best AP" in out and "best.safetensors" in out
    assert "run already holds a run: pass --resume to" in failure(capsys, *run)
    assert cli.main([*run, *data_flags(folder, "val-"), "--epochs", "2", "--resume"]) == 0
    assert "2 epochs, 4 steps" in capsys.readouterr().out
    checkpoint = tmp_path / "run" / "last.safetensors"
    assert cli.main(["eval", TINY, *data_flags(folder), "--checkpoint", str(checkpoint)]) == 0  # labels from the file
    assert "4 images" in capsys.readouterr().out


def test_train_names_what_is_wrong(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["train", TINY, *data_flags(folder), "--output", tmp_path / "run"]
    assert "epochs=0" in failure(capsys, *run, "--epochs", "0")
    assert "no published weights" in failure(capsys, *run, "--pretrained")
    assert "did you mean 'frozen_stages'" in failure(capsys, *run, "--model-args", "frozen_stage=1")
    assert "both val_images and val_annotations" in failure(capsys, *run, "--val-images", folder)
    assert "--pretrained" in failure(capsys, *run, "--pretrained", "--checkpoint", "x.safetensors")
    assert not (tmp_path / "run").exists()


# -- push and pull -----------------------------------------------------------------------------------------------------


def test_push_checks_before_it_lists(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, record = tmp_path / "run", tmp_path / "record.json"
    run.mkdir()
    assert "expected a folder with config.json" in failure(capsys, "push", run, "me/x", "--dry-run")
    (run / "best.safetensors").write_bytes(weights.read_bytes())
    assert f"push its weights, {run}/best.safetensors" in failure(capsys, "push", run, "me/x", "--dry-run")
    push = ["push", run / "best.safetensors"]
    for wrong in ("x", "a/b/c"):
        assert f"'{wrong}' is no repository of the Hub: expected ORG/REPO" in failure(capsys, *push, wrong, "--dry-run")
    assert "me/x!" in failure(capsys, *push, "me/x!", "--dry-run")
    for content, said in (("[1]", "holds a list, no record"), ("{", "is no JSON file")):
        record.write_text(content)
        assert f"{record} {said}" in failure(capsys, *push, "me/x", "--record", record, "--dry-run")


def test_pull_takes_the_names_that_loading_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(dyhead_zoo, "pull", lambda *args, revision: calls.append((*args, revision)))
    for name in ("me/x@v1", "hf-hub:me/x"):
        assert cli.main(["pull", name]) == 0
    assert calls == [("me/x", Path("x"), "v1"), ("me/x", Path("x"), None)]
    assert "'x' is no repository of the Hub: expected ORG/REPO" in failure(capsys, "pull", "hf-hub:x@v1")


# -- benchmark ---------------------------------------------------------------------------------------------------------


def test_benchmark_passes_its_flags_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from dyhead_zoo.engine import benchmark

    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(benchmark, "run_benchmark", lambda *args, **more: calls.append((*args[1:], more)))
    assert cli.main(["benchmark", "op", "--reps", "3", "--csv", "x.csv", "--threads", "2"]) == 0
    assert calls == [(3, Path("x.csv"), {"threads": 2})]


# -- README ------------------------------------------------------------------------------------------------------------


def readme_blocks(language: str) -> list[str]:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", readme, re.DOTALL)


def test_commands_of_the_readme_are_understood() -> None:
    lines = "".join(readme_blocks("bash")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in re.split("&&|\n", "\n".join(lines))]
    verbs = [command[1:] for command in commands if command and command[0].endswith("dyhead-zoo")]
    assert {verb[0] for verb in verbs} == set(VERBS)
    for verb in verbs:
        cli.build_parser().parse_args(verb)


def test_names_that_the_readme_imports_exist() -> None:
    code = "\n".join(readme_blocks("python"))
    imported = re.findall(r"^from dyhead_zoo import (.+)$", code, re.MULTILINE)
    assert imported
    for name in ", ".join(imported).split(", "):
        assert hasattr(dyhead_zoo, name)
    names = re.findall(r'create_detector\("([^"]+)"', code)
    assert all(dyhead_zoo.is_detector(name) or registry.parse_grammar(name) for name in names)
