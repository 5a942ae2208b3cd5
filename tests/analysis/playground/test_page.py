"""What the written page holds, and what is refused."""

import base64
import hashlib
import json
import re
from pathlib import Path

import flax.linen as nn
import numpy as np
import pytest

from cnn_jax import main
from cnn_jax.analysis.playground import network, page
from cnn_jax.analysis.restore import RestoredRun
from cnn_jax.common.errors import ConfigError
from cnn_jax.models import LeNet
from cnn_jax.models.layers import Conv, Dense, Flatten
from cnn_jax.models.summary import summarise
from tests.quick import make_run, unoptimised

TEXTS = page.texts()
SCRIPT = (page.PARTS / "playground.js").read_text(encoding="utf-8")
MARKUP = (page.PARTS / "playground.html.j2").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def source(written: Path) -> str:
    return written.read_text(encoding="utf-8")


def test_the_policy_allows_this_script_and_this_style_only(source: str):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', source)[1]
    assert policy.startswith("default-src 'none';")
    for tag, name in (('script type="module"', "script"), ("style", "style")):
        text = re.search(rf"<{tag}>(.*?)</{name}>", source, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert not re.search(r"https?://(?!www\.w3\.org)", source)
    assert len(source) < 1_000_000


def test_the_steps_of_lenet(source: str, runs: list[RestoredRun]):
    content = json.loads(re.search(r'id="content">(.*?)</script>', source, re.DOTALL)[1])
    steps = content["runs"][0]["steps"]
    assert [step["kind"] for step in steps] == [
        *("conv", "activation", "pool", "conv", "activation", "pool", "flatten"),
        *("conv", "activation", "conv", "activation", "conv"),
    ]
    assert {step["name"] for step in steps if step["kind"] == "activation"} == {"ReLU"}
    assert steps[0]["padding"] == "SAME"
    assert steps[3]["padding"] == [[0, 0], [0, 0]]
    assert steps[7]["kernel"]["shape"] == [5, 5, 16, 120]
    assert steps[9]["kernel"]["shape"] == [1, 1, 120, 84]
    assert steps[3]["field"] == [14, 14, 2, 2, -2, -2]
    text = re.findall(r'class="weights">(.*?)</script>', source)[0]
    weights = np.frombuffer(base64.b64decode(text), "<f4")
    assert weights.size == 61_706
    place = steps[3]["kernel"]["at"]
    kernel = runs[0].variables["params"]["Conv_1"]["kernel"]
    np.testing.assert_array_equal(weights[place : place + kernel.size], kernel.ravel())


def test_every_text_is_in_every_language():
    english = TEXTS["en"]
    assert set(TEXTS) >= {"en", "vi"}
    for texts in TEXTS.values():
        assert texts.keys() == english.keys()
        for key, text in texts.items():
            assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", english[key]))


def test_every_text_is_used_and_every_used_one_is_there():
    calls = r'\bt\(\s*"(\w+)"'
    asked = {*re.findall(calls, SCRIPT), *re.findall(r'data-(?:t|label)="(\w+)"', MARKUP)}
    assert asked <= TEXTS["en"].keys()
    named = {*asked, *page.KINDS, *re.findall(r'"(\w+)"', SCRIPT)}
    computed = re.findall(r"\b(\w+)(?:\(|: \()", SCRIPT)  # the names of kinds of steps
    named |= {*computed, *(f"{name}_text" for name in computed)}
    assert TEXTS["en"].keys() - named <= {"_name"}


def test_test_images_of_three_kinds():
    random = np.random.default_rng(0)
    logits = random.normal(size=(300, 5))
    label = random.integers(0, 5, 300)
    chosen = page.choose(logits, label)
    places = [place for _, place in chosen]
    assert len(set(places)) == 30
    kinds = [kind for kind, _ in chosen]
    assert kinds == ["right"] * 10 + ["wrong"] * 10 + ["unsure"] * 10
    right = (logits.argmax(-1) == label)[places]
    assert right[:10].all()
    assert not right[10:20].any()
    assert sorted(label[places[:5]]) == [0, 1, 2, 3, 4]
    first, second = np.sort(logits)[:, -1], np.sort(logits)[:, -2]
    others = np.delete(first - second, places)
    assert (first - second)[places[20:]].max() <= others.min()


def test_fewer_test_images_than_places():
    chosen = page.choose(np.eye(4), np.arange(4))
    assert chosen == [("right", 0), ("right", 1), ("right", 2), ("right", 3)]


@pytest.mark.parametrize("background", [0, 200])
def test_how_drawings_become_images(background: int):
    image = np.full((6, 20, 10, 1), background, np.uint8)
    image[:, 4:14, 3:6] = 120
    assert page.drawing(image) == {"background": [background / 255], "extent": 0.5}
    noise = np.random.default_rng(0).integers(0, 256, (6, 20, 10, 1), np.uint8)
    assert page.drawing(noise)["extent"] is None


class Unknown(nn.Module):
    """A small network with one thing that the page does not compute."""

    what: str = ""

    @nn.compact
    def __call__(self, image, train=False):
        x = Conv(2, (9, 9), strides=(9, 9))(image)
        x = nn.Conv(2, (1, 1))(nn.relu(x))
        if self.what == "norm":
            x = nn.LayerNorm()(x)
        if self.what == "residual":
            x = x + nn.Conv(2, (1, 1))(x)
        return Dense(10)(Flatten()(x))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("norm", "LayerNorm_0 is a LayerNorm that the playground cannot compute"),
        (
            "residual",
            "between Conv_2 and Flatten_0 is a function that the playground does not know",
        ),
    ],
)
def test_an_unknown_layer_is_named(what: str, said: str, tmp_path: Path):
    run = make_run(tmp_path, Unknown(what))
    image = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 1), np.uint8)
    said = f"^model=Unknown: {said}; the playground computes"
    with unoptimised(), pytest.raises(ConfigError, match=said):
        network.read(run, summarise(run.model, run.image_shape), image)


@pytest.mark.parametrize(
    ("shape", "most", "said"),
    [
        (
            (28, 28, 1),
            50_000,
            r"has 61,706 parameters, a page of the playground holds at most 50,000;",
        ),
        ((28, 28, 4), 100_000, r"takes images of 4 channels, the playground draws 1 or 3;"),
    ],
)
def test_networks_that_do_not_fit(shape, most, said, tmp_path, monkeypatch):
    monkeypatch.setattr(network, "MOST_PARAMETERS", most)
    run = make_run(tmp_path, LeNet(), shape)
    with pytest.raises(ConfigError, match=said):
        page.playground([run], "nowhere")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "is a folder; name a file, as in playground.html"),
        ("page.txt", "must end in .html"),
        ("mine.html", "exists and is no playground; name another file"),
        ("mine.html/page.html", "is a file; name a folder"),
    ],
)
def test_outputs_that_are_refused(name, said, runs, tmp_path):
    (tmp_path / "mine.html").write_text("<!DOCTYPE html><p>mine</p>")
    with pytest.raises(ConfigError, match=rf"^--output=.*{said}"):
        page.playground(runs[:1], "nowhere", tmp_path / name)
    assert (tmp_path / "mine.html").read_text() == "<!DOCTYPE html><p>mine</p>"


def test_runs_that_do_not_fit_each_other(runs, tmp_path):
    other = make_run(tmp_path, LeNet(), class_names=tuple("jihgfedcba"))
    with pytest.raises(ConfigError, match=r"its class_names differs from that of"):
        page.playground([runs[0], other], "nowhere")
    with pytest.raises(ConfigError, match=r"3 runs were given, a page shows one or 2"):
        page.playground([*runs, other], "nowhere")


def test_a_folder_that_is_no_run(tmp_path, caplog):
    assert main.main(["playground", str(tmp_path)]) == 4
    assert str(tmp_path) in caplog.text
