"""Image classifiers on folders of images and on columns of encoded ones; views of an image."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image

from grape_ray.data.arrays import Records
from grape_ray.data.columns import Table
from grape_ray.errors import ConfigError, DataError
from grape_ray.tasks.image_classification import ImageClassification
from grape_ray.tasks.images import random_views
from grape_ray.tasks.task import loaded, resolved
from grape_ray.training.frozen_features import on_features
from tests.support.tasks import trained

CLASSES = ("cat", "dog", "emu")


def png(rng, size=(12, 9), mode="RGB"):
    file = io.BytesIO()
    channels = {"RGB": (3,), "L": ()}[mode]
    pixels = rng.integers(0, 255, (size[1], size[0], *channels)).astype(np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny ViT whose processor makes 8 x 8 of any image, one that leaves images as they are, and
    90 images of three classes, some gray.
    """
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4,
    )  # fmt: skip
    torch.manual_seed(0)
    for name, options in (("vit", {"size": {"height": 8, "width": 8}}), ("as-is", {})):
        transformers.ViTModel(config).save_pretrained(root / name)
        processor = transformers.ViTImageProcessorPil(do_resize=bool(options), **options)
        processor.save_pretrained(root / name)
    for number in range(90):
        place = root / "train" / CLASSES[number % 3] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(png(rng, mode="L" if number % 7 == 0 else "RGB"))
    return root


def task(folder, model="vit", **fields):
    own = {"model": str(folder / model), "data": str(folder / "train"), "held_out": 0.3}
    return ImageClassification(**{**own, "public": True, **fields})


def test_a_head_alone_reads_features_and_is_evaluated_as_ever(folder):
    one = task(folder, trainable=("classifier.*",))
    data = loaded(one, "")
    one = resolved(one, data)
    model = one.build_model(0)
    kept = on_features(one, model, data, half=False)
    assert kept is not one
    assert set(kept.collate(data.train, np.arange(3))) == {"features", "labels"}
    wanted = one.evaluate(model, data.validation)
    assert kept.evaluate(model, data.validation) == pytest.approx(wanted, rel=1e-5)


def test_a_folder_of_classes_trains_and_is_exported(folder, tmp_path):
    one = task(folder, views=3)
    result, out = trained(one, tmp_path)
    assert set(result.metrics) == {"accuracy", "f1", "loss"}
    again = transformers.AutoModelForImageClassification.from_pretrained(out).eval()
    assert again.config.id2label == dict(enumerate(CLASSES))
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    known = ImageClassification(str(out), str(folder / "train"), held_out=0.3, labels=CLASSES)
    files = [png(np.random.default_rng(1)), png(np.random.default_rng(2), (40, 5), "L")]
    images = Table(pa.table({"image": files}), "here")
    said = known.predict(again, Records(known.inputs(images)))
    pixels = processor(
        images=[Image.open(io.BytesIO(file)).convert("RGB") for file in files], return_tensors="pt"
    )
    wanted = again(**pixels).logits.softmax(-1)
    for row, found in enumerate(said["probabilities"]):
        torch.testing.assert_close(torch.tensor([found[c] for c in CLASSES]), wanted[row])


def test_views_are_consecutive_and_evaluation_sees_images_as_they_are(folder):
    one, several = task(folder, labels=CLASSES), task(folder, labels=CLASSES, views=4)
    records, net = one.load().train, one.build_model(0)
    torch.manual_seed(0)
    batch = several.collate(records, np.arange(5))
    torch.manual_seed(0)
    again = several.collate(records, np.arange(5))
    assert torch.equal(batch["pixel_values"], again["pixel_values"])
    assert batch["pixel_values"].shape == (20, 3, 8, 8)
    assert batch["labels"].tolist() == np.repeat(records.array("labels")[:5], 4).tolist()
    assert several.per_example_loss(net, batch).shape == (20,)
    assert several.evaluate(net, records) == one.evaluate(net, records)
    assert one.load().train.sequences("image").values.dtype == np.uint8  # kept as their files


def test_a_view_is_a_piece_of_its_own_image():
    images = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    views = random_views(images, 50, 0.25, True)
    assert views.shape == (100, 3, 8, 8)
    for number, view in enumerate(views):
        assert set(view.flatten().tolist()) <= set(images[number // 50].flatten().tolist())
        steps = view[0].diff(dim=1)  # left to right: one by one, but where it is reflected
        assert set(steps.abs().flatten().tolist()) == {1.0}
    assert torch.equal(random_views(images, 1, 0.0, False), images)
    mirrored = random_views(images[:1], 400, 0.0, True)[:, 0, 0, 0] == images[0, 0, 0, 7]
    assert 140 < int(mirrored.sum()) < 260


def test_columns_of_images_and_those_that_cannot_be_read(folder, tmp_path):
    rng = np.random.default_rng(3)
    files = [png(rng, (8, 8)) for _ in range(40)]
    labels = [row % 2 for row in range(40)]
    kept = pa.array([{"bytes": file, "path": None} for file in files])
    for name, column in (("bytes", pa.array(files)), ("datasets", kept)):
        pq.write_table(pa.table({"image": column, "label": labels}), tmp_path / f"{name}.parquet")
    loaded = [
        task(folder, data=str(tmp_path / f"{name}.parquet")).load()
        for name in ("bytes", "datasets")
    ]
    assert np.array_equal(*(data.train.sequences("image").values for data in loaded))
    bad = [*files]
    bad[3], bad[7] = files[3][:60], b"GIF89a secret"
    pq.write_table(pa.table({"image": bad, "label": labels}), tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=r"unreadable image in rows 3, 7'") as caught:
        task(folder, data=str(tmp_path / "bad.parquet")).load()
    assert "secret" not in str(caught.value)
    sizes = [*files]
    sizes[5] = png(rng, (8, 9))
    pq.write_table(pa.table({"image": sizes, "label": labels}), tmp_path / "sizes.parquet")
    with pytest.raises(DataError, match=r"another size in row 5'.*8 x 8 pixels"):
        task(folder, "as-is", data=str(tmp_path / "sizes.parquet")).load()
    with pytest.raises(DataError, match=r"column 'label'.*expected bytes"):
        task(folder, data=str(tmp_path / "bytes.parquet"), image_column="label").load()


def test_fields_and_models_that_cannot_be_are_refused(folder, tmp_path):
    for field, value in (("views", 0), ("crop_padding", 0.5)):
        with pytest.raises(ConfigError, match=rf"task\.{field}"):
            task(folder, **{field: value})
    transformers.AutoModel.from_pretrained(folder / "vit").save_pretrained(tmp_path / "other")
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(
        tmp_path / "other"
    )
    with pytest.raises(ConfigError, match=r"image processor.*3 x 16 x 16.*model takes"):
        task(folder, model=str(tmp_path / "other"), labels=CLASSES).build_model(0)
