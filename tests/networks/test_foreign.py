"""Networks of others: by name, without running or downloading anything that a recipe says, as they are elsewhere."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import yaml
from safetensors.torch import load_file
from torch import nn

from gowide_dist import build_network, load_recipe
from gowide_dist.errors import RecipeError, RunError
from gowide_dist.identity import identities
from gowide_dist.networks.build import build_on_meta, build_unseeded
from gowide_dist.networks.folding import fold_batch_norms
from gowide_dist.networks.foreign import Timm
from gowide_dist.networks.teacher import Teacher
from gowide_dist.networks.weights import load_weights, save_weights
from gowide_dist.networks.wrapped import synchronised
from gowide_dist.prepare import check_foreign
from gowide_dist.run import Run
from gowide_dist.stages import BlocksStage
from gowide_dist.train.costs import stage_cost
from gowide_dist.train.fit import check_fit
from gowide_dist.train.objectives import build_objective
from gowide_dist.train.optim import MovingAverage
from tests.docs import DOCS, fenced_blocks
from tests.fashion import chain, write_job

NETS = Path(__file__).parent / "nets.py"
OPTIM = {"lr": 0.1}
LABELS = {"objective": "labels", "epochs": 1, "optim": OPTIM}
BLOCKS = {"objective": "blocks", "teacher": "teacher", "epochs": 2, "optim": OPTIM, "classifier": "fresh"}
KL = {"objective": "kl", "teacher": "teacher", "epochs": 1, "optim": OPTIM}
THIN = {
    "block": "basic",
    "depths": [1, 1],
    "base": 8,
    "stem": "imagenet",
}  # blocks at a quarter and an eighth of the side
TIMM = {"timm": "test_efficientnet", "blocks": ["blocks.1", "blocks.2"]}


def own(name, **options):
    return build_network({"own": name, **options}, 10, NETS)


def recipe(tmp_path, wide, thin=THIN, **stage):
    """A recipe with a teacher and a student, whose stage says `stage`."""
    values = chain(tmp_path, networks={"wide": wide, "thin": thin})
    values["stages"] = {"teacher": {"train": "wide", **LABELS}, "learn": {"train": "thin", **(stage or LABELS)}}
    return write_job(tmp_path, values)


@pytest.mark.parametrize(
    ("network", "line"),
    [
        ({"timm": "mobilenetv4_conv_smal"}, "timm has no such model, did you mean 'mobilenetv4_conv_small'"),
        ({"timm": "test_resnet.foo"}, "no such weights, did you mean 'test_resnet.r160_in1k'"),
        ({"timm": "hf_hub:timm/resnet18"}, "timm: should be the name of a model of timm's, not 'hf_hub:timm/resnet18'"),
        ({"timm": "test_resnet", "pretrained": True}, "pretrained is not for a recipe to say"),
        ({"timm": "test_resnet", "checkpoint_path": "x.pth"}, "checkpoint_path is not for a recipe to say"),
        ({"timm": "test_resnet", "num_classes": 7}, "num_classes is not for a recipe to say"),
        ({"timm": "test_resnet", "widht": 2}, "cannot be built: .*widht"),
        ({"timm": "test_resnet", "blocks": ["layer5"]}, "blocks: no submodule 'layer5', did you mean 'layer"),
        ({"torchvision": "resnet51"}, "no such classifier, did you mean 'resnet50'"),
        ({"torchvision": "fasterrcnn_resnet50_fpn"}, "no such classifier"),
        ({"torchvision": "resnet18", "weights": "DEFAULT"}, "weights is not for a recipe to say"),
        ({"own": "Stagd"}, "nets.py defines no such function or class, did you mean 'Staged'"),
        ({"own": "_hidden"}, "defines no such function"),
        ({"own": "nothing"}, "gives NoneType, not a torch.nn.Module"),
        ({"own": "Staged", "depth": 3}, "cannot be built: .*depth"),
        ({"torchvision": "resnet18", "pretrained": True}, "pretrained is not for a recipe to say"),
        ({"torchvision": "resnet18", "timm": "resnet18"}, "names two networks, by timm and torchvision; take one"),
        ({"own": "double"}, "stages.0.0.weight is float64; build it in float32"),
        ({"own": "lazy"}, "1.weight has no shape before it has seen images"),
        ({"own": "leaves"}, "cannot be built: SystemExit: 3"),
        ({"own": "lookup"}, "cannot be built: KeyError: 'width'"),
        ({"own": "wrapped"}, "gives a DataParallel, which wraps a network; give the network itself"),
        ({"own": "empty"}, "has no parameters"),
        ({"own": "Extra"}, "_extra_state of its state is no tensor"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_built_is_told(network, line, capsys):
    with pytest.raises(RecipeError, match=line):
        build_network(network, 10, NETS)
    assert not capsys.readouterr().out  # where JSON may be
    assert torch.get_default_dtype() == torch.float32


def test_no_classes():
    with pytest.raises(RecipeError, match=r"^num_classes: should be at least 1, not 0$"):
        build_network({"arch": "resnet18"}, 0)


@pytest.mark.parametrize("name", ["os:system", "os.system", "/tmp/evil.py", "../evil:run", "__import__('os')", "import os", "system", "nn", "print", "__builtins__"])  # fmt: skip
def test_a_dangerous_name_runs_nothing(tmp_path, monkeypatch, name):
    """Nor does reading such a recipe, with or without the file of networks."""
    monkeypatch.chdir(tmp_path)
    job = recipe(tmp_path, {"own": name, "command": "touch ran"})
    evil = tmp_path / "evil.py"
    evil.write_text("open('ran', 'w')")
    for networks in (None, NETS):
        with pytest.raises(RecipeError):
            loaded = load_recipe(job, networks=networks)
            check_fit(loaded, loaded.instances.values(), 10)
    assert not (tmp_path / "ran").exists()


def test_the_file_is_read_when_a_network_is_built_and_never_before(tmp_path):
    nets = tmp_path / "mine.py"
    nets.write_text("import torch\nraise OSError('at import')\ndef f(num_classes): ...")
    loaded = load_recipe(recipe(tmp_path, {"own": "f"}), networks=nets)
    with pytest.raises(RecipeError, match=r"--networks: .*mine.py, line 2: at import; the file must stand alone"):
        check_fit(loaded, loaded.instances.values(), 10)
    with pytest.raises(RecipeError, match=r"--networks: .*no.py: No such file"):
        load_recipe(recipe(tmp_path, {"own": "f"}), networks=tmp_path / "no.py")


def test_a_run_has_its_own_copy_which_is_part_of_the_identity(tmp_path):
    nets = tmp_path / "mine.py"
    nets.write_text(NETS.read_text())
    job = recipe(tmp_path, {"own": "Staged", "width": 4}, **KL)
    loaded, run = load_recipe(job, networks=nets), Run(tmp_path / "run")
    run.write_recipe(loaded)
    again = run.recipe()
    assert run.networks.read_text() == NETS.read_text()
    checksums = {"train": "a", "val": "b"}
    before = identities(loaded, checksums)
    assert identities(again, checksums) == before
    assert before["teacher/wide"]["network"]["width"] == 4
    nets.write_text(NETS.read_text() + "\n")
    after = identities(load_recipe(job, networks=nets), checksums)
    assert [key for key in before if before[key] != after[key]] == ["teacher/wide", "learn/thin"]  # by its teacher
    stage_dir = run.stage("teacher/wide")
    with stage_dir.lock():
        stage_dir.claim(before["teacher/wide"])
    with pytest.raises(RunError, match=r"\(--networks: the file is another\)"):
        stage_dir.check_identity(after["teacher/wide"])


def test_weights_have_the_names_that_the_world_knows(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.manual_seed(0)
    for network, plain in (
        (build_network({"timm": "test_efficientnet"}, 10), timm.create_model("test_efficientnet", num_classes=10)),
        (
            build_network({"torchvision": "mobilenet_v3_small"}, 10),
            torchvision.models.mobilenet_v3_small(num_classes=10),
        ),
    ):
        save_weights(path, network)
        plain.load_state_dict(load_file(path))
        images = torch.randn(2, 3, 40, 40)
        assert torch.equal(network.eval()(images)[0], plain.eval()(images))
        torch.save({"model": plain.state_dict()}, tmp_path / "model.pth")
        other = build_unseeded(network.architecture, 7)
        with pytest.raises(RunError, match=r"of 10 classes, here are 7; init: .* draws a new classifier"):
            load_weights(path, other)
        load_weights(tmp_path / "model.pth", other, fresh_classifier=True)
        assert torch.equal(next(other.parameters()), next(plain.parameters()))


def test_published_files_of_other_names_and_image_sizes(tmp_path):
    """DenseNet's are of torchvision 0.3; a transformer's positions are for one size."""
    path = tmp_path / "model.pth"
    densenet = build_network({"torchvision": "densenet121"}, 10)
    names = {name: re.sub(r"(denselayer\d+\.(?:norm|conv))", r"\1.", name) for name in densenet.plain.state_dict()}
    assert names["features.denseblock1.denselayer1.norm1.weight"] == "features.denseblock1.denselayer1.norm.1.weight"
    torch.save({names[name]: value + 1 for name, value in densenet.plain.state_dict().items()}, path)
    before = {name: value.clone() for name, value in densenet.state_dict().items()}
    load_weights(path, densenet)
    assert all(torch.equal(value, before[name] + 1) for name, value in densenet.state_dict().items())
    with pytest.raises(RunError, match=r"names its weights features.conv0.weight, .*, not conv1.weight"):
        load_weights(path, build_network({"block": "basic", "depths": [1]}, 10))
    torch.save(timm.create_model("test_vit", num_classes=10).state_dict(), path)
    with pytest.raises(RunError, match="of another image size: pos_embed is"):
        load_weights(path, build_network({"timm": "test_vit", "img_size": 64}, 10))


def test_buffers_that_no_file_holds():
    """A Swin's table of positions is computed when it is built, not on the meta device, and draws no random numbers."""
    settings = build_network({"timm": "swin_s3_tiny_224", "img_size": 56, "window_size": 7, "depths": [1, 1, 1, 1]}, 3)
    state = torch.get_rng_state()
    network = build_unseeded(settings.architecture, 3)
    assert not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))
    assert torch.equal(state, torch.get_rng_state())
    network.settle(56)  # its blocks are [B, H, H, C], which timm says
    assert network.block_channels == (96, 192, 384, 768)
    assert [x.shape[1:3] for x in network.blocks(torch.zeros(1, 3, 56, 56))] == [(96, 14), (192, 7), (384, 4), (768, 2)]


def test_blocks_end_behind_the_last_that_is_wanted():
    network = build_network(TIMM, 10).eval()
    network.settle(64)
    plain, images, ran = network.plain, torch.randn(2, 3, 64, 64), []
    for name, module in plain.named_modules():
        if name in ("blocks.1", "blocks.2", "blocks.3", "classifier"):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    stem = plain.bn1(plain.conv_stem(images))
    expected = plain.blocks[1](plain.blocks[0](stem))
    teacher = Teacher(network)
    ran.clear()
    assert torch.allclose(teacher.blocks(images, 1)[0], expected, atol=1e-5)
    assert ran == ["blocks.1"]
    assert [x.shape[1] for x in teacher.blocks(images, 2)] == [24, 32] == [*teacher.block_channels]
    logits, blocks = teacher.outputs(images)
    assert torch.allclose(logits, plain(images), atol=1e-5) and torch.allclose(blocks[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("network", "left"),
    [
        (TIMM, []),  # norms that activate too
        ({**TIMM, "blocks": ["conv_stem"]}, ["bn1"]),  # its convolution is a block, as it is
        ({"own": "Branches"}, ["shared", "skipped"]),
        ({"own": "Branches", "detached": True}, ["read", "shared", "skipped"]),  # read unseen by autograd
    ],
    ids=str,
)
def test_norms_are_folded_where_nothing_else_reads_the_convolution(network, left):
    torch.manual_seed(0)
    network = build_network(network, 10, NETS).eval()
    norms = {name: each for name, each in network.plain.named_modules() if isinstance(each, nn.BatchNorm2d)}
    for norm in norms.values():
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias)
    network.settle(32)
    folded = fold_batch_norms(network)
    assert sorted(name for name in norms if isinstance(folded.plain.get_submodule(name), nn.BatchNorm2d)) == left
    images = torch.randn(2, 3, 32, 32)
    (logits, blocks), (expected, expected_blocks) = folded.outputs(images), network.outputs(images)
    for x, y in zip((logits, *blocks), (expected, *expected_blocks), strict=True):
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # weights are as autocast would make them
        assert torch.equal(Teacher(network, dtype=torch.bfloat16).logits(images), Teacher(network).logits(images))


def test_blocks_of_a_graph_are_the_same(monkeypatch):
    """torch.compile gets a graph that ends behind the last block."""
    monkeypatch.setattr(nn.Module, "compile", lambda _: None)
    network = build_network(TIMM, 10).eval()
    network.settle(32)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = network.blocks(images)
        network.is_compiled = True
        traced = network.blocks(images, 1)
    assert torch.allclose(traced[0], expected[0], atol=1e-5)


def test_outputs_that_a_layer_would_overwrite():
    network = own("Auxiliary", blocks=["conv"])
    assert (network.blocks(torch.randn(2, 3, 16, 16))[0] < 0).any()


def test_grey_images_tuples_unused_heads_and_shared_weights(tmp_path):
    network = own("Auxiliary")
    network.settle(16)
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(network(images)[0], network.plain(images.mean(1, keepdim=True))[0])
    network.freeze_unused(16)
    assert {name for name, each in network.named_parameters() if not each.requires_grad} == {"module.auxiliary.weight", "module.auxiliary.bias"}  # fmt: skip
    average = MovingAverage(network)
    before = network.plain.conv.weight.clone()
    with torch.no_grad():
        network.plain.conv.weight.zero_()
    with average.applied():
        assert torch.equal(network.plain.conv.weight, before)
    assert not network.plain.conv.weight.any()
    save_weights(tmp_path / "model.safetensors", network)
    assert {"conv.weight", "again.weight"} <= load_file(tmp_path / "model.safetensors").keys()


def test_synchronised_norms_still_activate():
    network = build_network({"timm": "test_resnet"}, 10).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = network(images)[0]
    assert torch.allclose(synchronised(network)(images)[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("teacher", "student", "stage", "line"),
    [
        ({"timm": "vit_tiny_patch16_224"}, THIN, KL, r"networks.wide: \{timm: vit_tiny_patch16_224\}: cannot take images of 28 px: Input height .28. .* such as img_size"),
        ({"timm": "test_efficientnet"}, THIN, BLOCKS, r"\(blocks.0 16x14x14, .*\) do not match those of network 'thin' \(1 8x7x7, 2 16x4x4\); choose by networks.wide.blocks"),
        ({"torchvision": "resnet18"}, THIN, BLOCKS, r"teacher: the blocks of teacher/wide \(none named\)"),
        (TIMM, {"own": "Auxiliary"}, BLOCKS, "cannot be walked block by block: it lacks num_blocks"),
        (TIMM, {"timm": "test_resnet"}, BLOCKS, "stages.learn.train: {timm: test_resnet} cannot be walked block by block"),
        (TIMM, THIN, {**BLOCKS, "classifier": "teacher"}, "classifier: that of {timm: test_efficientnet} fits no other network; take classifier: fresh"),
        (TIMM, THIN, {**KL, "start": "teacher"}, "stages.learn.start: teacher is for networks of ours"),
        (TIMM, {"own": "Staged"}, {**KL, "blocks_weight": 1.0}, "stages.learn.blocks_weight"),
        (TIMM, {"own": "Staged"}, {**BLOCKS, "inputs": "teacher"}, "do not match"),
        (TIMM, THIN, {**BLOCKS, "block_weights": [1.0]}, "has 1 weights, but the student has 2 blocks"),
        ({"widen": "thin", "by": 2}, {"timm": "test_resnet"}, LABELS, "networks.wide.widen: thin is another's network"),
        ({"own": "Loose"}, THIN, KL, "scale is in no submodule that a block or the head calls"),
        ({"own": "Staged", "says": [1, 2]}, THIN, KL, r"says block_channels \[1, 2\], gives \[8, 16\]"),
        ({"own": "Pair"}, THIN, KL, r"cannot take images of 28 px"),
        ({"own": "frozen"}, THIN, KL, "frozen}: its code freezes all its parameters, and teacher/wide is to train it"),
        ({"own": "features"}, THIN, KL, r"gives \[10, 26, 26\] for an image, not logits of 10 classes"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_what_does_not_fit_is_told_before_anything_is_trained(tmp_path, teacher, student, stage, line):
    with pytest.raises(RecipeError, match=line):
        loaded = load_recipe(recipe(tmp_path, teacher, student, **stage), networks=NETS)
        check_fit(loaded, loaded.instances.values(), 10)


def test_a_network_that_no_stage_has_is_checked_too(tmp_path):
    values = chain(tmp_path, networks={"wide": THIN, "thin": THIN, "spare": {"timm": "test_resnot"}})
    values["stages"] = {"teacher": {"train": "wide", **LABELS}, "learn": {"train": "thin", **LABELS}}
    loaded = load_recipe(write_job(tmp_path, values))
    with pytest.raises(RecipeError, match=r"networks.spare: \{timm: test_resnot\}: .* did you mean 'test_resnet'"):
        check_foreign(loaded.model_copy(update={"data": loaded.data.model_copy(update={"classes": 10})}), [])


@pytest.mark.parametrize(
    ("network", "drawn"),
    [
        ({"timm": "deit_tiny_distilled_patch16_224", "depth": 1}, ["head", "head_dist"]),
        ({"own": "Auxiliary"}, ["auxiliary", "fc"]),
        ({"own": "rearranging"}, ["1"]),  # its first convolution has 48 channels; images have 3
    ],
    ids=lambda value: str(value)[:40],
)
def test_every_head_is_drawn_anew(tmp_path, network, drawn):
    """Each layer of a file's network that the number of classes shapes, under whatever name."""
    torch.save(build_network(network, 7, NETS).plain.state_dict(), tmp_path / "model.pth")
    other = build_network(network, 10, NETS)
    before = {name: tensor.clone() for name, tensor in other.plain.state_dict().items() if tensor.any()}
    load_weights(tmp_path / "model.pth", other, fresh_classifier=True)
    after = other.plain.state_dict()
    kept = {name.rpartition(".")[0] for name, tensor in before.items() if torch.equal(after[name], tensor)}
    assert {name for name in kept if "norm" not in name} == set(drawn)
    with pytest.raises(RunError, match=r"of 7 classes, here are 10; .* draws a new classifier"):
        load_weights(tmp_path / "model.pth", other)
    other.settle(224 if "timm" in network else 16)


def test_features_that_timm_misnames():
    """An HRNet's `stem` is none of its submodules; it teaches by its logits all the same."""
    small = {"timm": "hrnet_w18_small"}
    named = Timm.model_validate({**small, "blocks": ["stage2"]})
    network = build_on_meta(Timm.model_validate(small), 3)
    network.settle(32)
    assert network.num_blocks == 0
    with pytest.raises(RecipeError, match=r"block stage2 gives list for an image, not \[channels, H, H\]"):
        build_on_meta(named, 3).settle(32)


def test_a_network_that_looks_at_values_costs_what_it_costs_otherwise(tmp_path):
    """The meta device has none: it is counted on the CPU."""
    state = torch.get_rng_state()
    costs = []
    for name in ("Staged", "Values"):
        loaded = load_recipe(recipe(tmp_path, {"own": name}, THIN, **KL), networks=NETS)
        check_fit(loaded, loaded.instances.values(), 10)
        costs.append([stage_cost(each, loaded, 10).macs for each in loaded.instances.values()])
    assert costs[0] == costs[1]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("prefix", ["frozen", "trained"])
def test_an_own_student_of_blocks(prefix):
    """Its blocks read each other's outputs; transforms serve the comparison alone, and what remains is its own class."""
    torch.manual_seed(0)
    student, teacher = own("Staged"), build_network(TIMM, 10)
    for network in (student, teacher):
        network.settle(32)
    stage = BlocksStage.model_validate({"train": "thin", **BLOCKS, "prefix": prefix})
    objective = build_objective(stage, student, Teacher(teacher))
    images, labels = torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)
    for phase in range(2):
        objective.begin_phase(phase)
        objective.train()
        objective(images, labels)["loss"].backward()
        trained = {name for name, each in objective.named_parameters() if each.grad is not None and each.grad.any()}
        blocks = (0, 1) if phase and prefix == "trained" else (phase,)
        expected = {f"up.{phase}", *(f"student.module.stages.{i}.{layer}" for i in blocks for layer in (0, 1))}
        assert {name.rpartition(".")[0] for name in trained} == expected
        objective.zero_grad()
    objective.eval()
    target = objective.teacher.blocks(images, 2)[1]
    x = student.plain.block(1, student.plain.block(0, images))
    error = (objective.up[1](x) - target).square().flatten(1).mean(1)
    assert torch.allclose(objective.evaluate(images, labels)["mse_block2"], error)
    assert objective.finished() is student


def test_a_login_node_imports_neither_torch_nor_timm(tmp_path):
    job = recipe(tmp_path, {"timm": "test_efficientnet"}, {"own": "Staged"}, **KL)
    cluster = Path(__file__).parents[2] / "slurm" / "clusters" / "gpu8.yaml"
    for arguments in (["submit", str(job), "batch_size=64", "--cluster", str(cluster), "--networks", str(NETS), "--runs", "/shared", "--dry-run"],):  # fmt: skip
        code = (
            "import sys, json\nfrom gowide_dist.cli import main\n"
            f"sys.argv = ['gowide', *{arguments!r}]\n"
            "try:\n    main()\nexcept SystemExit as end:\n"
            "    print(json.dumps([end.code or 0, sorted({'torch', 'timm'} & set(sys.modules))]))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert json.loads(done.stdout.splitlines()[-1]) == [0, []], done.stderr
        assert done.stdout.count("#SBATCH --job-name") == 2


def test_the_documentations_examples(tmp_path):
    """docs/networks.md: each can be built, and fits."""
    page = DOCS / "networks.md"
    [code] = fenced_blocks(page, "python")
    (tmp_path / "nets.py").write_text(code)
    weights = {"mobilenetv4_conv_small": timm.create_model("mobilenetv4_conv_small", num_classes=1000)}
    weights["efficientnet_b0"] = torchvision.models.efficientnet_b0()
    examples = [
        text for text in fenced_blocks(page, "yaml") if "timm:" in text or "torchvision:" in text or "own:" in text
    ]
    assert len(examples) == 3
    for text in examples:
        values = {**chain(tmp_path), **yaml.safe_load(text)}
        values["data"] |= {"resolution": 224, "augment": {"crop": {}}, "center_crop": 0.875}
        for stage in values["stages"].values():
            if isinstance(stage.get("init"), dict):
                file = tmp_path / stage["init"]["file"]
                torch.save(weights[file.stem].state_dict(), file)
                stage["init"]["file"] = str(file)
        loaded = load_recipe(write_job(tmp_path, values), networks=tmp_path / "nets.py")
        check_fit(loaded, loaded.instances.values(), 1000)
