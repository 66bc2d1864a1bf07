import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from dyhead_zoo import TrainStep, create_detector, load_checkpoint, train
from dyhead_zoo.data.transforms import StandardTrain
from dyhead_zoo.engine import checkpoint, processes
from dyhead_zoo.engine import train as train_module
from dyhead_zoo.engine.config import TrainConfig
from dyhead_zoo.engine.optim import lr_factor, param_groups

NAMES = ("red", "green", "blue")
TINY = TrainConfig(
    epochs=2,
    batch_size=2,
    size=64,
    test_size=64,
    mosaic=0.5,
    num_workers=0,
    log_every=1,
    warmup_steps=2,
    progress=False,
)


def write_dataset(folder, count=6, extra=()):
    """Pictures with one rectangle of a pure colour each, and ``extra`` (image number, bbox, iscrowd) annotations."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(count):
        picture = Image.new("RGB", (80, 64), (90, 90, 90))
        box = [4 + 5 * i, 8 + 3 * i, 24, 20]
        color = [0, 0, 0]
        color[i % 3] = 255
        ImageDraw.Draw(picture).rectangle([box[0], box[1], box[0] + box[2] - 1, box[1] + box[3] - 1], tuple(color))
        picture.save(folder / "images" / f"{i}.png")
        images.append({"id": 100 + i, "file_name": f"{i}.png", "width": 80, "height": 64})
        annotations.append({"image_id": 100 + i, "category_id": i % 3 + 1, "bbox": box, "iscrowd": 0})
    annotations += [{"image_id": 100 + i, "category_id": 1, "bbox": box, "iscrowd": crowd} for i, box, crowd in extra]
    for number, annotation in enumerate(annotations, start=1):
        annotation.update(id=number, area=annotation["bbox"][2] * annotation["bbox"][3])
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))
    return {"images": folder / "images", "annotations": folder / "annotations.json"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


def tiny_detector(seed=0, name="test_atss_dyhead1", **kwargs):
    """Random in its forward pass too, by dropout."""
    torch.manual_seed(seed)
    detector = create_detector(name, class_names=NAMES, **kwargs)
    detector.backbone.register_forward_pre_hook(lambda m, x: (nn.functional.dropout(x[0], 0.2, m.training),))
    return detector


def plain_detector():
    """Without randomness, and without statistics of the images that happen to share a batch."""
    torch.manual_seed(0)
    return create_detector("test_atss_dyhead1", class_names=NAMES, norm_eval=True)


def run(data, output, detector=None, **overrides):
    """Train a tiny detector; returns it and the result."""
    detector = detector or tiny_detector()
    return detector, train(detector, **data, output=output, config=TINY, **overrides)


def log_of(output, event="train"):
    lines = [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def assert_equal_weights(ours, theirs):
    assert ours.keys() == theirs.keys()
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert not different


def final_state(output):
    return checkpoint.newest_state(Path(output))[1]


def assert_equal_runs(output, other):
    """Same weights, averages and optimiser moments, bit by bit."""
    ours, theirs = final_state(output), final_state(other)
    assert ours["progress"] == theirs["progress"]
    assert_equal_weights(ours["model"], theirs["model"])
    assert_equal_weights(ours["ema"], theirs["ema"])
    moments, other_moments = ours["optimizer"]["state"], theirs["optimizer"]["state"]
    assert moments.keys() == other_moments.keys()
    for key in moments:
        assert_equal_weights(moments[key], other_moments[key])


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    """An uninterrupted run: two epochs of three steps."""
    output = tmp_path_factory.mktemp("reference") / "run"
    run(data, output)
    return output


# -- what training does ------------------------------------------------------------------------------------------------


def test_loss_falls_and_the_result_says_what_was_done(data, tmp_path):
    detector, result = run(data, tmp_path, epochs=8, lr=3e-3, backbone_lr_scale=1.0, mosaic=0.0, color=0.0)
    losses = [line["loss"] for line in log_of(tmp_path)]
    assert len(losses) == result.steps == 24
    assert result.epochs == 8
    assert result.stopped_by is None
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert not detector.training


def test_same_seed_same_weights(data, reference, tmp_path):
    run(data, tmp_path / "same")
    assert_equal_runs(tmp_path / "same", reference)
    run(data, tmp_path / "other", seed=1)
    ours, theirs = final_state(tmp_path / "other")["model"], final_state(reference)["model"]
    assert any(not torch.equal(value, theirs[key]) for key, value in ours.items())


def test_number_of_workers_does_not_matter(data, reference, tmp_path):
    run(data, tmp_path, num_workers=1)
    assert_equal_runs(tmp_path, reference)


def test_weights_on_disk_are_the_average_and_can_be_loaded(data, tmp_path):
    detector, result = run(data, tmp_path)
    state = final_state(tmp_path)
    weights = load_file(result.weights)
    assert_equal_weights(weights, state["ema"])
    assert_equal_weights(detector.state_dict(), state["ema"])
    assert any(not torch.equal(state["ema"][key], state["model"][key]) for key in weights)
    with safe_open(result.weights, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["label_space"])["names"] == list(NAMES)
    assert json.loads(metadata["config"])["pretrained_cfg"]["long_side"] == 64
    other = tiny_detector(seed=5)
    load_checkpoint(other, result.weights)
    assert_equal_weights(other.state_dict(), state["ema"])


def test_without_average_the_weights_are_the_models(data, tmp_path):
    _, result = run(data, tmp_path, ema_decay=0.0, epochs=1)
    assert_equal_weights(load_file(result.weights), final_state(tmp_path)["model"])


def test_images_without_objects_crowds_and_tiny_boxes(tmp_path):
    extra = [(0, [0, 0, 1, 1], 0), (1, [0, 0, 80, 64], 1), (2, [79, 63, 1, 1], 0)]
    odd = write_dataset(tmp_path / "odd", extra=extra)
    content = json.loads(odd["annotations"].read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in (103, 104, 105)]
    odd["annotations"].write_text(json.dumps(content))
    _, result = run(odd, tmp_path / "run", scale_min=0.1, scale_max=3.0)
    assert result.steps == 6
    assert all(torch.isfinite(value).all() for value in load_file(result.weights).values())


# oneDNN's bf16 backward reads memory that it never wrote for a strided 3x3 convolution of a 1x1 map, which P7 of a
# 64-pixel canvas is: hence 128 pixels.
@pytest.mark.parametrize(
    "options",
    [
        {"amp": "bf16", "size": 128},
        {"amp": "fp16", "size": 128},
        {"channels_last": True},
        {"optimizer": "sgd"},
        {"grad_checkpointing": True},
    ],
)
def test_modes(data, tmp_path, options):
    detector, result = run(data, tmp_path, epochs=1, cache_images=True, schedule="step", **options)
    assert result.steps == 3
    before = tiny_detector().state_dict()
    assert any(not torch.equal(value, before[key]) for key, value in detector.state_dict().items())


def test_standard_recipe_resizes_as_the_papers_do(data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_module, "StandardTrain", lambda flip: StandardTrain(short_sides=(64,), flip=flip))
    detector = tiny_detector()
    detector.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[1][0].tolist())))
    run(data, tmp_path, detector, recipe="standard", epochs=1)
    assert seen == [(64, 80)] * 3


def test_frozen_parameters_stay_and_do_not_count(data, tmp_path):
    detector = tiny_detector(frozen_stages=1, freeze_norm=True)
    frozen = {name: p.detach().clone() for name, p in detector.named_parameters() if not p.requires_grad}
    assert frozen
    trainable = sum(p.numel() for p in detector.parameters() if p.requires_grad)
    run(data, tmp_path, detector, epochs=1)
    after = dict(detector.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert json.loads((tmp_path / "run.json").read_text())["trainable_parameters"] == trainable


def test_mosaic_ends_before_the_last_epochs(data, tmp_path, monkeypatch):
    seen = []
    original = train_module.SmallDataTrain
    monkeypatch.setattr(train_module, "SmallDataTrain", lambda **kw: seen.append(kw["mosaic"]) or original(**kw))
    run(data, tmp_path, epochs=3, close_mosaic_epochs=2)
    assert seen[-3:] == [0.5, 0.0, 0.0]


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_best_weights_are_those_of_the_highest_ap(data, tmp_path, monkeypatch):
    scores = iter([0.1, float("nan"), 0.3, 0.2])

    def fake_evaluate(detector, **kwargs):
        assert kwargs["annotations"] == data["annotations"]
        result = type("Result", (), {"metrics": {"AP": next(scores)}, "summary": lambda self: ""})()
        seen.append({key: value.clone() for key, value in detector.state_dict().items()})
        return result

    seen = []
    monkeypatch.setattr(train_module, "evaluate", fake_evaluate)
    validation = {"val_images": data["images"], "val_annotations": data["annotations"]}
    _, result = run(data, tmp_path, epochs=7, eval_every=2, **validation)
    assert [line["epoch"] for line in log_of(tmp_path, "eval")] == [2, 4, 6, 7]
    assert [line["AP"] for line in log_of(tmp_path, "eval")] == [0.1, None, 0.3, 0.2]
    assert result.best_metrics == {"AP": 0.3}
    assert result.metrics == {"AP": 0.2}
    assert_equal_weights(load_file(result.best_weights), seen[2])
    assert_equal_weights(load_file(result.weights), seen[3])


def test_evaluation_gives_coco_metrics(data, tmp_path):
    validation = {"val_images": data["images"], "val_annotations": data["annotations"]}
    _, result = run(data, tmp_path, epochs=1, **validation)
    assert {"AP", "AP50"} <= result.metrics.keys()
    assert result.best_metrics == result.metrics


# -- stopping and resuming ---------------------------------------------------------------------------------------------


class Crash(BaseException):
    """Ends a run in the place of a SIGKILL: nothing may catch it."""


@pytest.mark.parametrize("where", ["step 2", "state 1", "state 4", "weights 1"])
def test_a_run_that_died_ends_like_one_that_did_not(data, reference, tmp_path, monkeypatch, where):
    with monkeypatch.context() as patch:
        crash_at(patch, where)
        with pytest.raises(Crash):
            run(data, tmp_path, checkpoint_every_steps=2)
    run(data, tmp_path, tiny_detector(seed=9) if checkpoint.state_files(tmp_path) else None, resume=True)
    assert_equal_runs(tmp_path, reference)
    steps = [line["step"] for line in log_of(tmp_path)]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_leftovers_of_a_kill_are_removed(data, tmp_path):
    for name in (".state_00000003.pt.tmp", ".last.safetensors.0123abcd.tmp"):
        (tmp_path / name).write_bytes(b"half of it")
    run(data, tmp_path, epochs=1)
    assert not list(tmp_path.glob(".*"))


def crash_at(patch, where):
    """Die in a training step, or within the writing of a file, at its n-th occurrence."""
    kind, number = where.split()
    owner, name = {
        "step": (TrainStep, "forward"),
        "state": (torch, "save"),
        "weights": (checkpoint, "write_safetensors"),
    }[kind]
    original, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == int(number) + (kind == "step"):
            if kind == "state":
                Path(args[1]).write_bytes(b"half of it")
            raise Crash
        return original(*args, **kwargs)

    patch.setattr(owner, name, dying)


def test_sigkill(data, reference, tmp_path):
    process = spawn(train_and_wait_to_be_killed, data, tmp_path)
    deadline = time.time() + 300
    while len(checkpoint.state_files(tmp_path)) < 2 and time.time() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    run(data, tmp_path, tiny_detector(seed=9), resume=True)
    assert_equal_runs(tmp_path, reference)


def train_and_wait_to_be_killed(data, output):
    torch.set_num_threads(1)
    detector = tiny_detector()
    detector.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    run(data, output, detector, checkpoint_every_steps=1)


def spawn(function, *args):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dyhead_zoo.engine.train", "dyhead_zoo.models.atss"])
    process = context.Process(target=function, args=args)
    process.start()
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step(data, reference, tmp_path, caplog, number):
    detector, calls = tiny_detector(), []

    def signal_in_second_step(*_):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)

    detector.register_forward_pre_hook(signal_in_second_step)
    handler = signal.getsignal(number)
    _, result = run(data, tmp_path, detector)
    assert signal.getsignal(number) is handler
    assert (result.stopped_by, result.steps, result.epochs) == (number.name, 2, 0)
    assert "resume=True" in caplog.text
    _, result = run(data, tmp_path, tiny_detector(seed=9), resume=True)
    assert result.stopped_by is None
    assert_equal_runs(tmp_path, reference)
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_second_interrupt_ends_the_run_at_once(monkeypatch):
    clock = iter([0.0, 0.5, 5.0])
    monkeypatch.setattr(processes.time, "monotonic", lambda: next(clock))
    with processes.StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)  # passed on by torchrun
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_state_falls_back_to_the_one_before(data, reference, tmp_path, caplog, damage):
    run(data, tmp_path)
    newest, older = checkpoint.state_files(tmp_path)
    content = bytearray(newest.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    newest.write_bytes(content if damage == "flip" else content[: len(content) // 2] if damage == "truncate" else b"")
    run(data, tmp_path, tiny_detector(seed=9), resume=True)
    assert newest.name in caplog.text
    assert older.name in caplog.text
    assert_equal_runs(tmp_path, reference)


def test_only_damaged_states(data, tmp_path):
    (tmp_path / "state_00000003.pt").write_bytes(b"")
    with pytest.raises(checkpoint.CorruptStateError, match="none of the states"):
        run(data, tmp_path, resume=True)


def test_resume_from_a_named_state_goes_back(data, reference, tmp_path):
    run(data, tmp_path)
    first = checkpoint.state_files(tmp_path)[-1]
    _, result = run(data, tmp_path, resume=first)
    assert result.steps == 6
    assert_equal_runs(tmp_path, reference)
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_resumes_to_its_result_and_can_be_extended(data, reference, tmp_path):
    detector, first = run(data, tmp_path)
    again, second = run(data, tmp_path, tiny_detector(seed=9), resume=True)
    assert first == second
    assert_equal_weights(again.state_dict(), detector.state_dict())
    _, result = run(data, tmp_path, tiny_detector(seed=9), resume=True, epochs=3)
    assert (result.epochs, result.steps) == (3, 9)


def test_an_interrupted_evaluation_is_made_up_for(data, tmp_path, monkeypatch):
    validation = {"val_images": data["images"], "val_annotations": data["annotations"]}
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "evaluate", lambda *a, **k: (_ for _ in ()).throw(Crash()))
        with pytest.raises(Crash):
            run(data, tmp_path, epochs=1, **validation)
    _, result = run(data, tmp_path, tiny_detector(seed=9), epochs=1, resume=True, **validation)
    assert result.steps == 3
    assert "AP" in result.metrics
    assert len(log_of(tmp_path, "eval")) == 1


def test_resuming_with_other_settings_is_an_error(data, reference):
    with pytest.raises(ValueError, match=r"lr: 0\.001 -> 0\.1.*another output directory"):
        run(data, reference, resume=True, lr=0.1)
    with pytest.raises(ValueError, match="name: 'test_atss_dyhead1' -> 'test_atss'"):
        run(data, reference, tiny_detector(name="test_atss"), resume=True)


def test_a_state_that_lacks_a_newer_setting_resumes(data, reference, tmp_path):
    state = checkpoint.load_state(checkpoint.state_files(reference)[-1])
    del state["config"]["flip"], state["data"]["crowd regions"]
    torch.save(state, tmp_path / "state_00000003.pt")
    run(data, tmp_path, resume=True)
    assert_equal_runs(tmp_path, reference)


def test_a_state_of_another_run_does_not_overwrite_this_one(data, reference, tmp_path):
    run(data, tmp_path, epochs=1)
    with pytest.raises(FileExistsError, match="already holds a run"):
        run(data, tmp_path, resume=checkpoint.state_files(reference)[0])
    run(data, tmp_path / "new", resume=checkpoint.state_files(reference)[-1])
    assert_equal_runs(tmp_path / "new", reference)


def test_state_of_a_newer_version(data, reference, tmp_path):
    state = torch.load(checkpoint.state_files(reference)[0], weights_only=True)
    torch.save({**state, "version": 99}, tmp_path / "state_00000003.pt")
    with pytest.raises(ValueError, match="upgrade"):
        run(data, tmp_path, resume=True)


def test_an_output_directory_is_not_overwritten(data, reference):
    before = sorted(path.name for path in reference.iterdir())
    with pytest.raises(FileExistsError, match="resume=True"):
        run(data, reference)
    assert sorted(path.name for path in reference.iterdir()) == before


def test_no_temporary_files_remain(reference):
    assert sorted(path.name for path in reference.iterdir()) == [
        "last.safetensors", "log.jsonl", "run.json", "state_00000003.pt", "state_00000006.pt",
    ]  # fmt: skip


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_names_images_and_leaves_the_states(data, tmp_path, what):
    detector, calls = tiny_detector(), []

    def poison(module, inputs, raw):
        calls.append(1)
        if len(calls) == 5:
            if what == "loss":
                raw.cls_logits[0].data.fill_(float("nan"))
            else:
                raw.cls_logits[0].register_hook(lambda gradient: gradient * float("inf"))

    detector.register_forward_hook(poison)
    with pytest.raises(FloatingPointError, match=r"step 4 .*images \[10\d, 10\d\]"):
        run(data, tmp_path, detector)
    (state,) = checkpoint.state_files(tmp_path)
    assert state.name == "state_00000003.pt"
    assert all(torch.isfinite(value).all() for value in detector.state_dict().values() if value.ndim)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"learning_rate": 1}, r"unknown training settings \['learning_rate'\].*known: epochs"),
        ({"epochs": 0}, "epochs=0: must be at least 1"),
        ({"amp": "bf61"}, "amp='bf61': must be one of none, bf16, fp16"),
        ({"mosaic": 1.5}, "mosaic=1.5"),
        ({"scale_min": 2.0}, "scale_min=2.0"),
        ({"batch_size": 3, "accumulate": 2}, "batch_size=3 .* multiple of 2"),
        ({"val_images": "x"}, "val_annotations"),
    ],
)
def test_bad_settings(data, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path, **overrides)


def test_a_detector_of_other_classes(data, tmp_path):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="class_0"):
        run(data, tmp_path, create_detector("test_atss_dyhead1", num_classes=3))


def test_validation_data_are_checked_before_training(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(data, tmp_path / "run", val_images=data["images"], val_annotations="nowhere.json")
    content = json.loads(data["annotations"].read_text())
    content["categories"] = [{"id": k + 1, "name": name} for k, name in enumerate("abc")]
    (tmp_path / "other.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="none of which the detector knows"):
        run(data, tmp_path / "run", val_images=data["images"], val_annotations=tmp_path / "other.json")
    assert not (tmp_path / "run").exists()


def test_tensorboard_that_is_not_installed(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"dyhead-zoo\[train\]"):
        run(data, tmp_path, tensorboard=True)


def test_tensorboard(data, tmp_path, monkeypatch):
    written, module = [], types.ModuleType("torch.utils.tensorboard")

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert (folder, purge_step) == (str(tmp_path / "tensorboard"), 1)

        def add_scalar(self, name, value, step):
            written.append((name, step))

        def flush(self):
            pass

    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run(data, tmp_path, tensorboard=True, epochs=1)
    assert [step for name, step in written if name == "train/loss"] == [1, 2, 3]


def test_nothing_to_train(data, tmp_path):
    detector = tiny_detector().requires_grad_(False)
    with pytest.raises(ValueError, match="unfreeze"):
        run(data, tmp_path, detector)


def test_a_test_size_far_from_the_training_size_is_remarked(data, tmp_path, caplog):
    run(data, tmp_path, epochs=1, test_size=None)
    assert "pass test_size=64" in caplog.text


# -- several processes and parts ---------------------------------------------------------------------------------------


class MeanLoss(nn.Module):
    """A loss that is a mean over images, so that parts and processes must add up to the whole batch."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, images, image_sizes, targets):
        raw = self.detector(images, image_sizes)
        return {"loss": torch.stack([x.flatten(1).square().mean(1) for x in raw.cls_logits]).sum(0).mean()}


def test_parts_add_up_to_the_batch(data, tmp_path, monkeypatch):
    monkeypatch.setattr("dyhead_zoo.engine.learner.TrainStep", MeanLoss)
    options = {"epochs": 1, "batch_size": 6, "optimizer": "sgd", "lr": 1e-3, "ema_decay": 0.0}
    whole, _ = run(data, tmp_path / "whole", plain_detector(), **options)
    parts, result = run(data, tmp_path / "parts", plain_detector(), accumulate=3, **options)
    assert result.steps == 1
    start = plain_detector().state_dict()
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[key], value, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(value, start[key]) for key, value in whole.state_dict().items())


def test_two_processes_train_as_one(data, tmp_path):
    """The batch, its canvas and its number of positives are the same; without BatchNorm's statistics so is the step."""
    validation = {"val_images": data["images"], "val_annotations": data["annotations"]}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [spawn(one_of_two, rank, port, data, validation, tmp_path) for rank in range(2)]
    for worker in workers:
        worker.join(timeout=240)
    assert [worker.exitcode for worker in workers] == [0, 0]
    first, second = (torch.load(tmp_path / f"weights_{rank}.pt") for rank in range(2))
    assert_equal_weights(first, second)
    alone, _ = run(data, tmp_path / "alone", plain_detector(), **SGD, **validation)
    losses, losses_alone = ([line["loss"] for line in log_of(tmp_path / run)] for run in ("run", "alone"))
    assert losses == pytest.approx(losses_alone, rel=1e-4)
    start = plain_detector().state_dict()
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-6)
    assert any((value - start[key]).abs().max() > 1e-4 for key, value in alone.state_dict().items())


SGD = {"optimizer": "sgd", "lr": 0.01, "backbone_lr_scale": 1.0, "batch_size": 4, "epochs": 1}


def one_of_two(rank, port, data, validation, folder):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    detector, result = run(data, folder / "run", plain_detector(), **SGD, **validation)
    assert "AP" in result.metrics
    torch.save(detector.state_dict(), folder / f"weights_{rank}.pt")


# -- optimiser ---------------------------------------------------------------------------------------------------------


def test_param_groups():
    detector = tiny_detector(frozen_stages=0)
    groups = {g["name"]: g for g in param_groups(detector, lr=1.0, weight_decay=0.1, backbone_lr_scale=0.5)}
    assert {n: (g["lr"], g["weight_decay"]) for n, g in groups.items()} == {
        "body": (0.5, 0.1), "body_no_decay": (0.5, 0.0), "new": (1.0, 0.1), "new_no_decay": (1.0, 0.0),
    }  # fmt: skip
    members = [p for g in groups.values() for p in g["params"]]
    wanted = {name: p for name, p in detector.named_parameters() if p.requires_grad}
    assert len(members) == len({id(p) for p in members}) == len(wanted)
    names = {id(p): name for name, p in wanted.items()}
    for key, group in groups.items():
        assert all(names[id(p)].startswith("backbone.body.") == key.startswith("body") for p in group["params"])
        assert all((p.ndim > 1) == (not key.endswith("no_decay")) for p in group["params"])
    everything = param_groups(detector, lr=1.0, weight_decay=0.1, decay_norm_bias=True)
    assert all(group["weight_decay"] == 0.1 for group in everything)


def test_modules_say_which_parts_learn_at_another_rate():
    detector = create_detector("test_deformable_detr", class_names=NAMES)
    groups = {g["name"]: g for g in param_groups(detector, lr=1.0, weight_decay=0.1, backbone_lr_scale=0.5)}
    names = {id(p): name for name, p in detector.named_parameters()}
    slow = {names[id(p)] for key in ("new_x0.1", "new_no_decay_x0.1") for p in groups[key]["params"]}
    assert slow == {name for name in names.values() if "sampling_offsets" in name or "reference_points" in name}
    assert len(slow) == 2 * (1 + 2 + 1)  # weight and bias of an encoder layer's, two decoder layers', the queries'
    rates = {key: (g["lr"], g["peak_lr"]) for key, g in groups.items()}
    assert rates["new_x0.1"] == rates["new_no_decay_x0.1"] == (0.1, 0.1) and rates["new"] == (1, 1)


def test_rates_of_nested_parts_multiply():
    class Part(torch.nn.Module):
        def __init__(self, **parts):
            super().__init__()
            self.lr_scales = {name: scale for name, (_, scale) in parts.items()}
            for name, (module, _) in parts.items():
                self.add_module(name, module)

    inner = Part(a=(torch.nn.Linear(2, 2, bias=False), 0.5), ab=(torch.nn.Linear(2, 2, bias=False), 4.0))
    groups = param_groups(Part(inner=(inner, 0.1)), lr=2.0, weight_decay=0.1)
    assert {g["name"]: (g["lr"], g["params"][0] is inner.a.weight) for g in groups} == {
        "new_x0.05": (pytest.approx(0.1), True),
        "new_x0.4": (pytest.approx(0.8), False),
    }


def test_parameters_that_a_module_owns_itself_are_parts_too():
    class Owner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lr_scales = {"own": 0.1}
            self.own, self.owned = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))

    owner = Owner()
    for module in (owner, torch.nn.Sequential(owner)):
        groups = {g["name"]: g for g in param_groups(module, lr=2.0, weight_decay=0.1)}
        assert groups.keys() == {"new", "new_x0.1"} and groups["new_x0.1"]["lr"] == pytest.approx(0.2)
        assert groups["new_x0.1"]["params"][0] is owner.own and groups["new"]["params"][0] is owner.owned


def test_position_tables_are_not_decayed():
    detector = create_detector("atss_swin_dyhead1", class_names=NAMES)
    groups = param_groups(detector, lr=1.0, weight_decay=0.1)
    exempt = {id(p) for g in groups if not g["weight_decay"] for p in g["params"]}
    tables = [p for name, p in detector.named_parameters() if "relative_position_bias_table" in name]
    assert tables
    assert all(id(p) in exempt for p in tables)


def test_lr_factor():
    schedule = {"steps_per_epoch": 10, "epochs": 12}
    cosine = [lr_factor(s, schedule="cosine", warmup_steps=5, **schedule) for s in range(120)]
    assert cosine[0] == pytest.approx(0.2)
    assert cosine[5:] == sorted(cosine[5:], reverse=True)
    assert cosine[60] == pytest.approx(0.5)
    assert 0 < cosine[-1] < 0.001
    steps = [lr_factor(s, schedule="step", warmup_steps=0, **schedule) for s in range(120)]
    assert steps[79] == 1
    assert steps[80] == steps[109] == pytest.approx(0.1)
    assert steps[110] == pytest.approx(0.01)
    short = [lr_factor(s, steps_per_epoch=2, epochs=2, schedule="step", warmup_steps=1000) for s in range(2)]
    assert short == [1.0, 1.0]


def test_config_is_json():
    assert json.loads(json.dumps(TINY.to_dict())) == TINY.to_dict()
    assert TrainConfig(**TINY.to_dict()) == TINY
    assert all(f.metadata["help"] for f in dataclasses.fields(TrainConfig))
