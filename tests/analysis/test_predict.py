import csv
import dataclasses
import io
import os

import jax
import numpy as np
import pytest
from PIL import Image

from cnn_jax import main, models
from cnn_jax.analysis import predict
from cnn_jax.analysis.predict import find_images, read_image
from cnn_jax.cli import tables
from cnn_jax.common import decode
from cnn_jax.common.errors import ConfigError, DataError, NotFiniteError
from cnn_jax.config import Config, DataConfig
from cnn_jax.train import loop
from tests.quick import make_run, unoptimised
from tests.tiny import CLASS_NAMES, make_examples, png_file

GRAY, COLOUR = (28, 28, 1), (28, 28, 3)
GREEN = (20, 180, 60)


@pytest.fixture(scope="module", autouse=True)
def _unoptimised():
    with unoptimised():
        yield


def noise(height=28, width=28, channels=3, seed=0):
    random = np.random.default_rng(seed)
    shape = (height, width, channels) if channels else (height, width)
    return random.integers(0, 256, shape, dtype=np.uint8)


def save(folder, picture, name="image.png", **options):
    path = folder / name
    picture.save(path, **options)
    return str(path)


# ------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("size", [(28, 28), (300, 200), (1, 1), (7, 90), (27, 28)])
def test_any_size_is_resized(tmp_path, size):
    path = save(tmp_path, Image.new("RGB", size, GREEN))
    image = read_image(path, COLOUR)
    assert image.shape == COLOUR
    assert (image == GREEN).all()


def test_resizing_keeps_the_picture(tmp_path):
    halves = np.zeros((100, 200), np.uint8)
    halves[:, :100] = 200
    image = read_image(save(tmp_path, Image.fromarray(halves)), GRAY)[..., 0]
    assert (image[:, :13] == 200).all()
    assert (image[:, 15:] == 0).all()


def test_own_size(tmp_path):
    for size, expected in [
        ((64, 40), (40, 64, 1)),
        ((28, 28), (28, 28, 1)),
        ((27, 64), (28, 28, 1)),
        ((64, 27), (28, 28, 1)),
    ]:
        path = save(tmp_path, Image.new("L", size))
        assert read_image(path, GRAY, own_size=True).shape == expected
        assert read_image(path, GRAY).shape == GRAY


def test_own_size_has_a_limit(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(predict, "MAX_MAP_PIXELS", 10_000)
    path = save(tmp_path, Image.new("L", (400, 100)))
    assert read_image(path, GRAY, own_size=True).shape == (50, 200, 1)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"warning: {path}: reduced from 400x100 to 200x50"
    path = save(tmp_path, Image.new("L", (1000, 30)), "long.png")
    assert read_image(path, GRAY, own_size=True).shape == (28, 577, 1)
    caplog.clear()
    path = save(tmp_path, Image.new("L", (100, 100)), "fits.png")
    assert read_image(path, GRAY, own_size=True).shape == (100, 100, 1)
    assert not caplog.records


# --------------------------------------------------------------------------- what is not read


def encoded(kind, **options):
    file = io.BytesIO()
    Image.fromarray(noise(60, 60)).save(file, kind, **options)
    return file.getvalue()


def broken_files():
    png, jpeg = encoded("PNG"), encoded("JPEG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    return {
        "text.png": b"not an image",
        "empty.png": b"",
        "empty.jpg": b"",
        "truncated.png": png[: len(png) // 2],
        "header.png": png[:20],
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "flipped.png": bytes(flipped),
        "truncated.gif": encoded("GIF")[:1500],
        "truncated.bmp": encoded("BMP")[:5000],
        "truncated.tif": encoded("TIFF")[:5000],
        "truncated.webp": encoded("WEBP")[:300],
        "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "folder.png": None,
        "zero.png": png_file(0, 5, b""),
        "zip.png": b"PK\x03\x04" + bytes(100),
    }


@pytest.mark.parametrize("name", broken_files())
def test_a_broken_file_is_named(tmp_path, name):
    path = tmp_path / name
    content = broken_files()[name]
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_image(str(path), GRAY)
    assert str(caught.value).startswith(f"{path}: cannot be read (")
    assert "\n" not in str(caught.value)
    if name in ("text.png", "empty.png", "zip.png", "program.eps"):
        assert "not an image of a format that Pillow decodes" in str(caught.value)


@pytest.mark.parametrize(("kind", "name"), [("GIF", "a.png"), ("BMP", "b.jpg"), ("WEBP", "c")])
def test_the_content_decides_not_the_name(tmp_path, kind, name):
    path = save(tmp_path, Image.new("RGB", (28, 28), GREEN), name, format=kind)
    assert np.abs(read_image(path, COLOUR) - np.array(GREEN, float)).max() <= 3


@pytest.mark.parametrize(
    ("width", "height"),
    [(60_000, 60_000), (12_000, 12_000), (8_000, 8_000), (2**31 - 1, 2**31 - 1), (50_000_001, 1)],
)
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, monkeypatch, width, height):
    def decode(self):
        raise AssertionError("decoded")

    path = tmp_path / "bomb.png"
    path.write_bytes(png_file(width, height, b""))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(DataError) as caught:
        read_image(str(path), GRAY)
    assert str(caught.value) == f"{path}: cannot be read (more than 50,000,000 pixels)"


def test_the_limit_is_of_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 120)
    assert read_image(save(tmp_path, Image.new("L", (12, 10))), GRAY).shape == GRAY
    with pytest.raises(DataError, match="more than 120 pixels"):
        read_image(save(tmp_path, Image.new("L", (11, 11))), GRAY)


# ------------------------------------------------------------------------------ which files


@pytest.fixture
def tree(tmp_path, monkeypatch):
    names = (
        *("b.png", "a.JPG", "c.jpeg", "d.txt", "e.gif", "sub/f.png", "x,y.png", "[z].png"),
        *("film.mpg", "drawing.eps", "table.h5", "paper.pdf", "i.WebP", "照片.tiff", "no_ending"),
        *(
            "._b.png",
            ".DS_Store",
            "Thumbs.db",
            "desktop.ini",
            ".hidden/g.png",
            "__MACOSX/sub/f.png",
        ),
        *("[2024] my photos/1.png", "[2024] my photos/2.png", "2/not_these.png"),
        *("Rome, 2024/1.png", "Rome, 2024/[a-b], c.bmp", "star*/s.png", "stars/t.png"),
    )
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "nothing").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (
            ["."],
            ["[z].png", "a.JPG", "b.png", "c.jpeg", "e.gif", "i.WebP", "x,y.png", "照片.tiff"],
        ),
        (["sub"], ["sub/f.png"]),
        (["d.txt"], ["d.txt"]),  # what is named is tried
        (["*.png"], ["[z].png", "b.png", "x,y.png"]),
        (["s*/**/*.png"], ["star*/s.png", "stars/t.png", "sub/f.png"]),
        (["sub/../**/[fg].png"], ["sub/../sub/f.png"]),
        (["c.jpeg,a.JPG"], ["c.jpeg", "a.JPG"]),
        (["c.jpeg, sub ,"], ["c.jpeg", "sub/f.png"]),
        (["b.png", "b.png,*.png", "sub"], ["b.png", "[z].png", "x,y.png", "sub/f.png"]),
        (["x,y.png"], ["x,y.png"]),
        (["[z].png"], ["[z].png"]),
        (["[ab].*"], ["a.JPG", "b.png"]),
        # What exists as it is written is taken so, also with the letters of patterns and lists.
        (["[2024] my photos/*.png"], ["[2024] my photos/1.png", "[2024] my photos/2.png"]),
        (["[2024] my photos"], ["[2024] my photos/1.png", "[2024] my photos/2.png"]),
        (["2*/*.png"], ["2/not_these.png"]),
        (["star*/*.png"], ["star*/s.png"]),
        (["Rome, 2024/*.png"], ["Rome, 2024/1.png"]),
        (["b.png,Rome, 2024/*.png,sub"], ["b.png", "Rome, 2024/1.png", "sub/f.png"]),
        (["Rome, 2024/[a-b], c.bmp,c.jpeg"], ["Rome, 2024/[a-b], c.bmp", "c.jpeg"]),
        (["照片.*"], ["照片.tiff"]),
        # Hidden and left behind: only where they are written out.
        (["*"], None),
        (["**/f.png"], ["sub/f.png"]),
        (["__MACOSX/sub", "._b.png"], ["__MACOSX/sub/f.png", "._b.png"]),
        ([".hidden", "._*"], [".hidden/g.png", "._b.png"]),
    ],
)
def test_which_files(tree, patterns, expected):
    if expected is None:
        expected = sorted(p.name for p in tree.iterdir() if p.is_file() and p.name[0] != ".")
        expected = [n for n in expected if n not in ("Thumbs.db", "desktop.ini")]
    assert find_images(patterns) == expected


def test_a_folder_that_cannot_be_listed(tree, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DataError, match=r"^--images=sub: cannot be read \(Permission denied\)$"):
        find_images(["sub"])


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 300 + "/*.png"])
def test_a_name_too_long_for_a_file(tree, name):
    with pytest.raises(DataError, match=r"no such file$"):
        find_images([name])


def test_the_home_folder(tree, monkeypatch):
    monkeypatch.setenv("HOME", str(tree))
    assert find_images(["~/b.png", "~/sub,~/c.jpeg"]) == [
        f"{tree}/b.png",
        f"{tree}/sub/f.png",
        f"{tree}/c.jpeg",
    ]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("missing.png", "no such file"),
        ("*.bmp", "no such file"),
        ("nothing", "holds no image file"),
        ("folder.png", "holds no image file"),
        ("b.png,missing.png", "no such file"),
    ],
)
def test_a_pattern_without_files(tree, pattern, said):
    with pytest.raises(DataError) as caught:
        find_images([pattern])
    assert str(caught.value) == f"--images={pattern.split(',')[-1]}: {said}"


@pytest.mark.parametrize("patterns", [[","], [" "], [" , "]])
def test_no_pattern_at_all(patterns):
    with pytest.raises(DataError, match=r"^--images: must name at least one file"):
        find_images(patterns)


# ------------------------------------------------------------------------------- predictions


def softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def mlp_in_numpy(params, pixels):
    x = (pixels / 255).reshape(-1)
    for name in ("Dense_0", "Dense_1"):
        x = x @ np.asarray(params[name]["kernel"], np.float64) + np.asarray(params[name]["bias"])
        x = np.maximum(x, 0) if name == "Dense_0" else x
    return softmax(x)


def write_digits(folder, count=4):
    """Test images as PNG files, and their pixels."""
    examples = make_examples(count, seed=3)
    folder.mkdir(exist_ok=True)
    for i in range(count):
        save(folder, Image.fromarray(examples.image[i, :, :, 0]), f"{i}.png")
    return examples.image


def test_probabilities_are_those_of_the_model(tmp_path):
    run = make_run(tmp_path, models.MLP())
    pixels = write_digits(tmp_path / "images")
    found, broken = predict.predict(run, [str(tmp_path / "images")], tmp_path / "out", top_k=10)
    assert broken == []
    for i, prediction in enumerate(found):
        expected = mlp_in_numpy(run.variables["params"], pixels[i])
        order = np.argsort(-expected)
        assert prediction.file == str(tmp_path / "images" / f"{i}.png")
        assert prediction.classes == tuple(CLASS_NAMES[k] for k in order)
        np.testing.assert_allclose(prediction.probabilities, expected[order], rtol=1e-4)
        assert prediction.class_map is None
    assert len(found) == 4


def test_scaling_is_the_trainings(tmp_path):
    data = DataConfig("x", mean=(0.5,), std=(0.25,))
    run = make_run(tmp_path, models.MLP(), data=data)
    pixels = write_digits(tmp_path / "images", 1)
    found, _ = predict.predict(run, [str(tmp_path / "images")], tmp_path / "out")
    scaled = (pixels[0] / 255 - 0.5) / 0.25 * 255
    expected = mlp_in_numpy(run.variables["params"], scaled)
    np.testing.assert_allclose(found[0].probabilities[0], expected.max(), rtol=1e-4)


def test_bfloat16(tmp_path):
    run = make_run(tmp_path, models.MLP())
    write_digits(tmp_path / "images", 1)
    coarse = dataclasses.replace(run, compute_dtype="bfloat16")
    (exact,), (found,) = (
        predict.predict(r, [str(tmp_path / "images")], tmp_path / "out")[0] for r in (run, coarse)
    )
    assert found.probabilities != exact.probabilities
    assert found.probabilities[0] == pytest.approx(exact.probabilities[0], abs=0.05)


@pytest.mark.parametrize("top_k", [0, -1, 11])
def test_top_k_out_of_range(tmp_path, top_k):
    run = make_run(tmp_path, models.MLP())
    with pytest.raises(ConfigError, match=rf"^--top_k={top_k}: must be from 1 to 10, the classes$"):
        predict.predict(run, ["missing"], tmp_path / "out", top_k)
    assert not (tmp_path / "out").exists()


def test_top_k_of_few_classes(tmp_path):
    run = make_run(tmp_path, models.MLP(num_classes=2), class_names=("cat", "dog"))
    write_digits(tmp_path / "images", 1)
    found, _ = predict.predict(run, [str(tmp_path / "images")], tmp_path / "out")
    assert sorted(found[0].classes) == ["cat", "dog"]
    assert sum(found[0].probabilities) == pytest.approx(1)


# ------------------------------------------------------------------------------- class maps


def test_fully_conv_predicts_at_the_files_own_size(tmp_path):
    run = make_run(tmp_path, models.FullyConvCNN())
    pixels = np.kron(noise(8, 6, channels=0), np.ones((8, 10), np.uint8))
    path = save(tmp_path, Image.fromarray(pixels), "wide.png")
    (found,), _ = predict.predict(run, [path], tmp_path / "out", top_k=10)
    logits = jax.jit(run.model.apply)(
        {"params": run.variables["params"]}, pixels[None, :, :, None] / np.float32(255)
    )
    logits = np.asarray(logits, np.float64)[0]
    assert logits.shape == (10, 9, 10)
    np.testing.assert_allclose(found.class_map, softmax(logits), rtol=1e-3, atol=1e-5)
    expected = softmax(logits.mean((0, 1)))
    np.testing.assert_allclose(found.probabilities, np.sort(expected)[::-1], rtol=1e-3, atol=1e-6)
    assert found.classes[0] == CLASS_NAMES[expected.argmax()]
    with Image.open(found.map_file) as picture:
        assert min(picture.size) > 400


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_map_of_one_score_is_no_picture(tmp_path, compute_dtype):
    run = make_run(tmp_path, models.FullyConvCNN(), compute_dtype=compute_dtype)
    path = save(tmp_path, Image.fromarray(noise(channels=0)))
    (found,), _ = predict.predict(run, [path], tmp_path / "out", top_k=10)
    assert found.class_map.shape == (1, 1, 10)
    np.testing.assert_allclose(np.sort(found.class_map[0, 0])[::-1], found.probabilities, rtol=1e-6)
    assert found.map_file is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.csv"]


def test_files_of_the_same_name_have_their_own_class_maps(tmp_path):
    run = make_run(tmp_path, models.FullyConvCNN())
    files = []
    for i, folder in enumerate(("one", "two")):
        (tmp_path / folder).mkdir()
        picture = Image.fromarray(noise(32, 29, channels=0, seed=i))
        files.append(save(tmp_path / folder, picture, "a.png"))
    found, _ = predict.predict(run, files, tmp_path / "out")
    maps = [prediction.map_file for prediction in found]
    assert len(set(maps)) == 2
    assert sorted(maps) == sorted((tmp_path / "out").glob("*.png"))


# ------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, splits):
    folder = tmp_path_factory.mktemp("run")
    config = Config(models.MLP(), DataConfig("tiny"), epochs=2, eval_batch_size=20)
    loop.train(config, folder, splits=splits)
    return folder


def command(*arguments):
    return main.main(["predict", *map(str, arguments)])


def said(caplog):
    return [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]


def read_csv(folder):
    with open(folder / "predictions.csv", newline="") as file:
        return [*csv.reader(file)]


def test_the_table_and_the_csv(workdir, tmp_path, capsys):
    write_digits(tmp_path / "images")
    out = tmp_path / "out"
    assert command(f"--workdir={workdir}", f"--images={tmp_path}/images", f"--output={out}") == 0
    header, *rows = read_csv(out)
    assert header == ["file", *(f"{k}_{i}" for i in (1, 2, 3) for k in ("class", "probability"))]
    assert [row[0] for row in rows] == [f"{tmp_path}/images/{i}.png" for i in range(4)]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["file", "1", "2", "3"]
    for row, line in zip(rows, printed[1:-1], strict=True):
        probabilities = [float(p) for p in row[2::2]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0 < probabilities[0] <= 1
        expected = [f"{p:.3f}" for p in probabilities]
        assert line.split() == [
            row[0],
            row[1],
            expected[0],
            row[3],
            expected[1],
            row[5],
            expected[2],
        ]
    assert printed[-1] == f"written to {out / 'predictions.csv'}"


def test_predictions_are_the_evaluations(workdir, tmp_path):
    """The same images, once as PNG files and once as examples."""
    pixels = write_digits(tmp_path / "images", 8)
    out = tmp_path / "out"
    flags = (f"--images={tmp_path}/images/*.png", f"--output={out}", "--top_k=1")
    assert command(f"--workdir={workdir}", *flags) == 0
    from cnn_jax.analysis import restore

    params = restore.load_run(workdir).variables["params"]
    expected = [CLASS_NAMES[mlp_in_numpy(params, image).argmax()] for image in pixels]
    assert [row[1] for row in read_csv(out)[1:]] == expected


def test_the_default_output_is_in_the_workdir(workdir, tmp_path):
    write_digits(tmp_path / "images", 1)
    assert command(f"--workdir={workdir}", f"--images={tmp_path}/images") == 0
    assert len(read_csv(workdir / "predictions")) == 2


def test_broken_files_are_named_and_skipped(workdir, tmp_path, caplog):
    images = tmp_path / "images"
    write_digits(images, 3)
    (images / "1.png").write_text("text")
    (images / "bomb.png").write_bytes(png_file(60_000, 60_000, b""))
    out = tmp_path / "out"
    assert command(f"--workdir={workdir}", f"--images={images}", f"--output={out}") == 3
    assert [row[0] for row in read_csv(out)[1:]] == [f"{images}/0.png", f"{images}/2.png"]
    assert said(caplog) == [
        f"error: {images}/1.png: cannot be read (not an image of a format that Pillow decodes)",
        f"error: {images}/bomb.png: cannot be read (more than 50,000,000 pixels)",
    ]


def test_nothing_but_broken_files(workdir, tmp_path, caplog):
    (tmp_path / "a.png").write_text("text")
    out = tmp_path / "out"
    assert command(f"--workdir={workdir}", f"--images={tmp_path}/a.png", f"--output={out}") == 3
    assert said(caplog)[-1] == "error: --images: none of the 1 files could be read"
    assert not (out / "predictions.csv").exists()


@pytest.mark.parametrize(
    ("flag", "code", "message"),
    [
        ("--images={}/missing.png", 3, "--images={}/missing.png: no such file"),
        ("--images={}/nothing", 3, "--images={}/nothing: holds no image file"),
        ("--images={}/*.gif", 3, "--images={}/*.gif: no such file"),
        ("--top_k=0", 2, "--top_k=0: must be from 1 to 10, the classes"),
        ("--top_k=three", 2, "--top_k=three: must be a whole number"),
        ("--checkpoint=77", 4, "--checkpoint=77: "),
        ("--workdir={}/missing", 4, "workdir={}/missing: no such folder"),
        ("--output={}/file", 2, "--output={}/file: {}/file is a file; name a folder"),
        ("--output={}/file/below", 2, "--output={}/file/below: {}/file is a file; name a folder"),
        ("--output=/proc", 2, "--output=/proc: cannot be written: "),
        ("--output={}/taken", 2, "--output={}/taken: cannot be written: "),
    ],
)
def test_what_the_command_refuses(workdir, tmp_path, caplog, flag, code, message):
    write_digits(tmp_path / "images", 1)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "taken" / "predictions.csv").mkdir(parents=True)
    flags = [f"--workdir={workdir}", f"--output={tmp_path}/out", f"--images={tmp_path}/images"]
    flags = [usual for usual in flags if usual.partition("=")[0] != flag.partition("=")[0]]
    assert command(*flags, flag.format(tmp_path)) == code
    (line,) = said(caplog)
    assert line.startswith("error: " + message.replace("{}", str(tmp_path)))
    assert "\n" not in line


def test_a_name_that_is_no_text(workdir, tmp_path, capsys):
    path = os.fsencode(tmp_path) + b"/\xff.png"
    with open(path, "wb") as file:
        file.write(encoded("PNG"))
    out = tmp_path / "out"
    assert command(f"--workdir={workdir}", f"--images={tmp_path}", f"--output={out}") == 0
    assert [row[0] for row in read_csv(out)[1:]] == [f"{tmp_path}/\\xff.png"]
    assert f"{tmp_path}/\\xff.png" in capsys.readouterr().out


def test_names_are_no_markup(capsys):
    prediction = predict.Prediction("[red]a[/red].png", ("[/b] :dog:",), (0.5,))
    tables.print_predictions([prediction])
    assert "[red]a[/red].png" in (shown := capsys.readouterr().out)
    assert "[/b] :dog: 0.500" in shown


def test_logits_that_are_not_finite(tmp_path):
    run = make_run(tmp_path, models.MLP())
    run.variables["params"]["Dense_0"]["kernel"][:] = np.nan
    path = save(tmp_path, Image.fromarray(noise(channels=0)))
    said = r"image.png: checkpoint 7 of .* gives logits that are not finite; choose another one"
    with pytest.raises(NotFiniteError, match=said):
        predict.predict(run, [path], tmp_path / "out")
