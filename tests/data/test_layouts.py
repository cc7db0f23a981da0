"""The same images in every layout in which people hold ImageNet."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.io import savemat

from gowide_dist.data import encode as encoders
from gowide_dist.data.beton import Beton
from gowide_dist.data.encode import Options, encode
from gowide_dist.data.sources.labels import read_labels
from gowide_dist.errors import DataError
from tests.command import gowide
from tests.data.conftest import photo

WNIDS = ("n01440764", "n01443537", "n02105855", "n03000684", "n07753592")
ILSVRC_IDS = {"n01440764": 3, "n01443537": 5, "n02105855": 1, "n03000684": 2, "n07753592": 4}  # not their order
KEEP = Options(jpg_share=None, workers=1)
Images = dict[str, dict[str, tuple[str, bytes]]]  # by split and name: class and content


@pytest.fixture(scope="module")
def images() -> Images:
    """300 images of 24 to 40 px, named as ImageNet's."""
    rng = np.random.default_rng(0)

    def jpeg() -> bytes:
        file = io.BytesIO()
        Image.fromarray(photo(rng, *rng.integers(24, 41, 2))).save(file, "JPEG", quality=95)
        return file.getvalue()

    train = {f"{wnid}_{number}": (wnid, jpeg()) for wnid in WNIDS for number in rng.choice(20_000, 48, replace=False)}
    labels = rng.permutation(np.repeat(np.arange(5), 12))
    val = {f"ILSVRC2012_val_{number:08}": (WNIDS[label], jpeg()) for number, label in enumerate(labels, 1)}
    return {"train": train, "val": val}


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_tar(path: Path, files: dict[str, bytes]) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path.read_bytes()


def shuffled(samples: dict) -> list:
    items = list(samples.items())
    return [items[index] for index in np.random.default_rng(1).permutation(len(items))]


def write_train_folders(root: Path, images: Images) -> None:
    for name, (wnid, content) in images["train"].items():
        write(root / "train" / wnid / f"{name}.JPEG", content)


def write_flat_val(root: Path, images: Images) -> None:
    for name, (_, content) in images["val"].items():
        write(root / "val" / f"{name}.JPEG", content)


def write_devkit(root: Path, images: Images) -> None:
    data = root / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    dtype = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(float(ILSVRC_IDS[wnid]), wnid, wnid, 0.0) for wnid in sorted(WNIDS, key=ILSVRC_IDS.get)]
    synsets = np.array([*rows, (6.0, "n00000006", "inner", 2.0)], dtype).reshape(-1, 1)
    savemat(data / "meta.mat", {"synsets": synsets}, do_compression=True)
    truth = "".join(f"{ILSVRC_IDS[wnid]}\n" for wnid, _ in images["val"].values())
    write(data / "ILSVRC2012_validation_ground_truth.txt", truth)


def class_folders(root: Path, images: Images) -> None:
    write_train_folders(root, images)
    for name, (wnid, content) in images["val"].items():
        write(root / "val" / wnid / f"{name}.JPEG", content)


def official_archives(root: Path, images: Images) -> None:
    inner = {}
    for wnid in reversed(WNIDS):
        own = {f"{name}.JPEG": content for name, (cls, content) in shuffled(images["train"]) if cls == wnid}
        inner[f"{wnid}.tar"] = write_tar(root / "inner.tar", own)
    write_tar(root / "ILSVRC2012_img_train.tar", inner)
    (root / "inner.tar").unlink()
    write_tar(root / "ILSVRC2012_img_val.tar", {f"{name}.JPEG": c for name, (_, c) in shuffled(images["val"])})
    write_devkit(root, images)
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        archive.add(root / "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12")
    shutil.rmtree(root / "ILSVRC2012_devkit_t12")


def archives_by_class(root: Path, images: Images) -> None:
    """The outer archive unpacked, the inner ones not; validation images unpacked."""
    for wnid in WNIDS:
        own = {f"{name}.JPEG": content for name, (cls, content) in images["train"].items() if cls == wnid}
        write_tar(root / "train" / f"{wnid}.tar", own)
    write_flat_val(root, images)
    write_devkit(root, images)


def unpacked_under_their_names(root: Path, images: Images) -> None:
    class_folders(root, images)
    for split in images:
        (root / split).rename(root / f"ILSVRC2012_img_{split}")


def flat_val_with_names(root: Path, images: Images) -> None:
    write_train_folders(root, images)
    write_flat_val(root, images)
    write(root / "val_labels.txt", "".join(f"{name}.JPEG {wnid}\n" for name, (wnid, _) in shuffled(images["val"])))


def flat_val_with_numbers(root: Path, images: Images) -> None:
    """As Caffe's val.txt: numbers from 0, in the order of the sorted names."""
    write_train_folders(root, images)
    write_flat_val(root, images)
    write(root / "val.txt", "".join(f"{n}.JPEG {WNIDS.index(wnid)}\n" for n, (wnid, _) in images["val"].items()))


def flat_val_with_lines(root: Path, images: Images) -> None:
    """As TensorFlow's imagenet_2012_validation_synset_labels.txt: a class for each image, in the order of the names."""
    write_train_folders(root, images)
    write_flat_val(root, images)
    lines = "".join(f"{wnid}\n" for wnid, _ in images["val"].values())
    write(root / "imagenet_2012_validation_synset_labels.txt", lines)


def kaggle(root: Path, images: Images) -> None:
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    write_train_folders(data, images)
    write_flat_val(data, images)
    write(data / "test" / "ILSVRC2012_test_00000001.JPEG", next(iter(images["val"].values()))[1])
    rows = "".join(f"{n},{wnid} 85 1 499 272 {wnid} 3 4 5 6 \n" for n, (wnid, _) in shuffled(images["val"]))
    write(root / "LOC_val_solution.csv", f"ImageId,PredictionString\n{rows}")
    write(root / "LOC_synset_mapping.txt", "".join(f"{wnid} a name\n" for wnid in WNIDS))
    for name in ("ILSVRC/ImageSets/CLS-LOC/val.txt", "ILSVRC/Annotations/CLS-LOC/val/a.xml", "LOC_train_solution.csv"):
        write(root / name, "")


def parquet(root: Path, images: Images) -> None:
    features = {"image": {"_type": "Image"}, "label": {"names": list(WNIDS), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for split, name in (("train", "train"), ("val", "validation")):
        rows = shuffled(images[split])
        for part in range(2):
            own = rows[part::2]
            table = pa.table({
                "image": [{"bytes": c, "path": f"{n}_{wnid}.JPEG"} for n, (wnid, c) in own],
                "label": [WNIDS.index(wnid) for _, (wnid, _) in own],
            }).replace_schema_metadata(metadata)  # fmt: skip
            path = root / "data" / f"{name}-{part:05}-of-00002.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path, row_group_size=25)
    table = pa.table({"image": [{"bytes": b"", "path": "t.JPEG"}], "label": [-1]}).replace_schema_metadata(metadata)
    pq.write_table(table, root / "data" / "test-00000-of-00001.parquet")


def parquet_without_names(root: Path, images: Images) -> None:
    for split, name in (("train", "train"), ("val", "val")):
        rows = sorted(images[split].items(), key=lambda item: (item[1][0], item[0]))
        columns = {"image": [content for _, (_, content) in rows], "label": [wnid for _, (wnid, _) in rows]}
        root.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), root / f"{name}.parquet", compression="zstd")


def webdataset(root: Path, images: Images) -> None:
    for split, name in (("train", "train"), ("val", "validation")):
        rows = shuffled(images[split])
        for part in range(3):
            files = {}
            for key, (wnid, content) in rows[part::3]:
                files |= {f"{key}.cls": str(WNIDS.index(wnid)).encode(), f"{key}.jpg": content, f"{key}.json": b"{}"}
            write_tar(root / f"imagenet1k-{name}-{part:04}.tar", files)


def webdataset_in_folders(root: Path, images: Images) -> None:
    for split in ("train", "val"):
        files = {}
        for key, (wnid, content) in shuffled(images[split]):
            files |= {f"./{wnid}/{key}.JPEG": content, f"./{wnid}/{key}.cls": wnid.encode()}
        write_tar(root / split / "00000.tar", files)


def stored(out: Path) -> list[bytes]:
    return [(out / f"{name}.beton").read_bytes() for name in ("train", "val")]


@pytest.fixture(scope="module")
def expected(images: Images, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    root = tmp_path_factory.mktemp("expected")
    class_folders(root / "images", images)
    encode("imagefolder", root / "out", root / "images", KEEP)
    beton = Beton(root / "out" / "train.beton")
    contents = {content for _, content in images["train"].values()}
    assert {beton.image(index).data for index in range(len(beton))} == contents
    return stored(root / "out")


LAYOUTS = [
    class_folders, official_archives, archives_by_class, flat_val_with_names, flat_val_with_numbers,
    flat_val_with_lines, unpacked_under_their_names, kaggle, parquet, parquet_without_names, webdataset, webdataset_in_folders,
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_gives_the_same_files(
    tmp_path: Path, images: Images, expected: list[bytes], layout: Callable[[Path, Images], None]
):
    layout(tmp_path / "root", images)
    info = encode("imagenet", tmp_path / "out", tmp_path / "root", KEEP)
    assert info.classes == (tuple("01234") if layout is webdataset else WNIDS)
    assert stored(tmp_path / "out") == expected


def tiny_imagenet(root: Path, images: Images) -> None:
    for name, (wnid, content) in images["train"].items():
        write(root / "train" / wnid / "images" / f"{name}.JPEG", content)
        write(root / "train" / wnid / f"{wnid}_boxes.txt", "0\t0\t0\t62\t62\n")
    for name, (_, content) in images["val"].items():
        write(root / "val" / "images" / f"{name}.JPEG", content)
    rows = "".join(f"{name}.JPEG\t{wnid}\t0\t32\t44\t62\n" for name, (wnid, _) in images["val"].items())
    write(root / "val" / "val_annotations.txt", rows)
    write(root / "test" / "images" / "test_0.JPEG", next(iter(images["val"].values()))[1])
    write(root / "wnids.txt", "".join(f"{wnid}\n" for wnid in reversed(WNIDS)))


@pytest.mark.parametrize(
    ("dataset", "layout"),
    [
        ("tiny-imagenet", tiny_imagenet), ("imagenet", tiny_imagenet), ("parquet", parquet_without_names),
        ("webdataset", webdataset), ("imagefolder", flat_val_with_names),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)  # fmt: skip
def test_other_data_sets_of_these_forms(tmp_path: Path, images: Images, expected: list[bytes], dataset, layout):
    layout(tmp_path / "root", images)
    encode(dataset, tmp_path / "out", tmp_path / "root", KEEP)
    assert stored(tmp_path / "out") == expected


@pytest.mark.parametrize("root", ["", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_kaggles_folder_may_be_given_at_any_depth(tmp_path: Path, images: Images, expected: list[bytes], root: str):
    kaggle(tmp_path / "root", images)
    encode("imagenet", tmp_path / "out", tmp_path / "root" / root, KEEP)
    assert stored(tmp_path / "out") == expected


def test_an_interrupted_encode_of_parquet_files_unpacks_once(
    tmp_path: Path, images: Images, expected: list[bytes], monkeypatch: pytest.MonkeyPatch, capsys
):
    parquet(tmp_path / "root", images)
    with monkeypatch.context() as patch:
        patch.setattr(encoders, "_refuse", lambda bad, options: pytest.exit("stopped"))
        with pytest.raises(pytest.exit.Exception):
            encode("imagenet", tmp_path / "out", tmp_path / "root", KEEP)
        unpacked = [*(tmp_path / "out" / ".partial" / "unpacked").iterdir()]
        times = {path: path.stat().st_mtime_ns for path in unpacked}
        patch.setattr(
            encoders, "_refuse", lambda bad, options: times == {p: p.stat().st_mtime_ns for p in unpacked} or 1 / 0
        )
        encode("imagenet", tmp_path / "out", tmp_path / "root", KEEP)
    assert stored(tmp_path / "out") == expected


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def compress(root: Path) -> None:
    for path in root.glob("*.tar"):
        path.write_bytes(gzip.compress(path.read_bytes()))


def rewrite(root: Path, column: str, values: list) -> None:
    """Other values in the first rows of a column."""
    path = root / "data" / "train-00001-of-00002.parquet"
    table = pq.read_table(path)
    values = [*values, *table[column].to_pylist()[len(values) :]]
    at = table.schema.get_field_index(column)
    pq.write_table(table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type)), path)


def reverse_names(root: Path) -> None:
    path = root / "data" / "train-00001-of-00002.parquet"
    features = {"info": {"features": {"label": {"names": WNIDS[::-1]}}}}
    pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": json.dumps(features)}), path)


def retype(root: Path, values: list) -> None:
    """Labels of another type: `values` in turns."""
    path = root / "data" / "train-00001-of-00002.parquet"
    table = pq.read_table(path)
    at = table.schema.get_field_index("label")
    labels = pa.array([values[number % len(values)] for number in range(len(table))])
    pq.write_table(table.set_column(at, pa.field("label", labels.type), labels), path)


def rename_in_shards(root: Path, old: str, new: str) -> None:
    for path in root.glob("*.tar"):
        with tarfile.open(path) as archive:
            files = {member.name: archive.extractfile(member).read() for member in archive.getmembers()}
        write_tar(path, {name.replace(old, new): content for name, content in files.items()})


def write_label(root: Path, label: str) -> None:
    lines = (root / "val_labels.txt").read_text().splitlines()
    (root / "val_labels.txt").write_text("\n".join([lines[0].split()[0] + label, *lines[1:]]))


@pytest.mark.parametrize(
    ("layout", "damage", "message"),
    [
        (official_archives, lambda root: cut(root / "ILSVRC2012_img_train.tar"), "img_train.tar: (cut off|cannot be read)"),
        (official_archives, lambda root: cut(root / "ILSVRC2012_img_val.tar"), "img_val.tar: (cut off|cannot be read)"),
        (official_archives, lambda root: cut(root / "ILSVRC2012_devkit_t12.tar.gz"), "devkit_t12.tar.gz: cannot be read"),
        (official_archives, lambda root: (root / "ILSVRC2012_devkit_t12.tar.gz").unlink(), "its labels are in the devkit"),
        (archives_by_class, lambda root: (root / "train" / "n01440764").mkdir(), "which is not unpacked"),
        (archives_by_class, lambda root: cut(root / "ILSVRC2012_devkit_t12/data/meta.mat"), "devkit_t12: cannot be read"),
        (archives_by_class, lambda root: (root / "ILSVRC2012_devkit_t12/data/meta.mat").unlink(), "no meta.mat in it"),
        (flat_val_with_names, lambda root: (root / "val_labels.txt").unlink(), "val: no class folders in it, but 60 images; give .*--val-labels"),
        (flat_val_with_names, lambda root: write_label(root, ""), "should have lines of name and class"),
        (flat_val_with_names, lambda root: write_label(root, " n99999999"), "label n99999999 is none of the 5 classes"),
        (flat_val_with_names, lambda root: write(root / "val" / "more.JPEG", b"x"), "no label for 1 images of .*val: more.JPEG"),
        (flat_val_with_names, lambda root: (root / "my_val_labels.csv").write_text(""), "my_val_labels.csv, val_labels.txt may hold the labels"),
        (flat_val_with_lines, lambda root: write(root / "val" / "more.JPEG", b"x"), "60 labels without names, for 61 images"),
        (flat_val_with_numbers, lambda root: (root / "val.txt").write_text("a.JPEG 1\nb.JPEG 5\n"), "no label for 60 images"),
        (kaggle, lambda root: (root / "LOC_val_solution.csv").unlink(), "val: no class folders in it, but 60 images"),
        (parquet, lambda root: cut(root / "data/train-00001-of-00002.parquet"), "train-00001-of-00002.parquet: cannot be read"),
        (parquet, lambda root: (root / "data/train-00001-of-00002.parquet").unlink(), "train-00001-of-00002: missing, as 1 of 2 files"),
        (parquet, lambda root: rewrite(root, "label", [0, None, -1]), "train-00001-of-00002.parquet: 2 of 120 rows have no label, first row 1"),
        (parquet, lambda root: rewrite(root, "image", [{"bytes": None, "path": "a"}] * 120), "paths of images, not the images"),
        (parquet, lambda root: retype(root, [1.0, 2.0]), "train-00001-of-00002.parquet: its column label is double"),
        (parquet, lambda root: retype(root, [[1], [1, 2]]), "train-00001-of-00002.parquet: its column label is list<.*int64>"),
        (parquet, reverse_names, "train-00001-of-00002.parquet: its class names, or their order, are not those"),
        (webdataset, lambda root: cut(root / "imagenet1k-train-0001.tar"), "train-0001.tar: (cut off|cannot be read)"),
        (webdataset, compress, "it is compressed: unpack it"),
        (webdataset, lambda root: rename_in_shards(root, ".cls", ".txt"), r"80 of 80 images have no label KEY.cls: .* \(KEY.txt, KEY.json is not read\)"),
        (webdataset, lambda root: rename_in_shards(root, ".jpg", ".v1.jpg"), r"no images KEY.jpg in it \(KEY.v1.jpg, .*is not read\)"),
    ],
)  # fmt: skip
def test_what_is_missing_or_damaged_is_named(tmp_path: Path, images: Images, layout, damage, message: str):
    layout(tmp_path / "root", images)
    damage(tmp_path / "root")
    with pytest.raises(DataError, match=message) as error:
        encode("imagenet", tmp_path / "out", tmp_path / "root", KEEP)
    assert "\n" not in str(error.value)
    assert not any((tmp_path / "out").rglob("*.journal"))


def test_a_bad_image_of_a_parquet_file_is_named_there(tmp_path: Path, images: Images, capsys):
    parquet(tmp_path / "root", images)
    rewrite(tmp_path / "root", "image", [None, {"bytes": b"no image", "path": "my cat.jpg"}])
    with pytest.raises(
        DataError, match=r"bad images: 2, .*root/data/train-00001-of-00002.parquet: row 0 \(empty file\)"
    ):
        encode("imagenet", tmp_path / "out", tmp_path / "root", KEEP)
    assert "train-00001-of-00002.parquet: my cat: not an image in a format" in capsys.readouterr().err


def test_numbers_that_count_from_1_are_no_labels(tmp_path: Path, images: Images):
    """They may be ILSVRC ids, which are not the order of the names: taking them for it gives 0.08 % accuracy."""
    flat_val_with_numbers(tmp_path / "root", images)
    rows = "".join(f"{name}.JPEG {ILSVRC_IDS[wnid]}\n" for name, (wnid, _) in images["val"].items())
    (tmp_path / "root" / "val.txt").write_text(rows)
    with pytest.raises(
        DataError, match=r"val\.txt: label \d is none of the 5 classes.*, and numbers have to count from 0"
    ):
        encode("imagenet", tmp_path / "out", tmp_path / "root", KEEP)


def test_a_file_of_labels_can_be_given(tmp_path: Path, images: Images, expected: list[bytes]):
    flat_val_with_names(tmp_path / "root", images)
    (tmp_path / "root" / "val_labels.txt").rename(tmp_path / "mine")
    folders = ["--root", tmp_path / "root", "--out", tmp_path / "out"]
    options = ["--val-labels", tmp_path / "mine", "--write-mode", "keep", "--workers", 1]
    result = gowide("encode", "imagefolder", *folders, *options)
    assert result.returncode == 0, result.stderr
    assert stored(tmp_path / "out") == expected


def test_labels_for_images_that_have_theirs_are_refused(tmp_path: Path, images: Images):
    parquet(tmp_path / "root", images)
    with pytest.raises(DataError, match="has its labels with its images; leave out --val-labels"):
        encode("imagenet", tmp_path / "out", tmp_path / "root", Options(val_labels="mine"))


def test_archives_beside_what_was_unpacked_of_them_are_left_out_and_said(tmp_path: Path, images: Images, capsys):
    official_archives(tmp_path / "root", images)
    (tmp_path / "root" / "train" / "n01440764").mkdir(parents=True)
    with pytest.raises(DataError):
        encode("imagenet", tmp_path / "out", tmp_path / "root", KEEP)
    assert "ILSVRC2012_img_train.tar: left out; the images are taken from" in capsys.readouterr().err


@pytest.mark.parametrize("make", ["mkdir root", "mkdir -p root/a/b", "true", "touch root"])
def test_what_is_no_imagenet_says_what_is(tmp_path: Path, make: str):
    subprocess.run(make, shell=True, cwd=tmp_path, check=True)
    with pytest.raises(
        DataError, match=r"root: (no form of ImageNet that is known here .*WebDataset shards|not found)"
    ):
        encode("imagenet", tmp_path / "out", tmp_path / "root", KEEP)


@pytest.mark.parametrize("package", ["pyarrow", "scipy"])
def test_a_missing_package_is_told(tmp_path: Path, images: Images, package: str, monkeypatch: pytest.MonkeyPatch):
    (parquet if package == "pyarrow" else official_archives)(tmp_path / "root", images)
    for name in ("pyarrow", "pyarrow.parquet", "scipy.io"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=rf"needs {package}: pip install 'gowide_dist\[datasets\]'"):
        encode("imagenet", tmp_path / "out", tmp_path / "root", KEEP)


@pytest.mark.parametrize(
    ("line", "label"),
    [
        ("a.jpg cat", "cat"), ("a.jpg golden retriever", "golden retriever"), ("a.jpg\tcat\t0\t32", "cat"),
        ("a,cat 85 1 499 272 cat 3 4 5 6", "cat"), ("val/a.jpg 1", "1"), ('"a.jpg","golden retriever"', "golden retriever"),
        ("cat", "cat"), ("\ufeffa.jpg,cat\r", "cat"), ("name,label\na.jpg,cat\n\n", "cat"),
    ],
)  # fmt: skip
def test_lines_of_labels(tmp_path: Path, line: str, label: str):
    write(tmp_path / "labels.txt", line)
    labels = read_labels(tmp_path / "labels.txt", ["a.jpg"], ("cat", "golden retriever"))
    assert [*labels.values()] == [label] and {*labels} <= {"a.jpg", "a"}


def test_two_labels_for_one_name(tmp_path: Path):
    write(tmp_path / "labels.txt", "x/a.jpg cat\ny/a.jpg dog\n")
    with pytest.raises(DataError, match=r"labels\.txt: two labels for a\.jpg"):
        read_labels(tmp_path / "labels.txt", ["a.jpg"], ("cat", "dog"))
