"""Classes that are asked of a generator: from the words of a command to a grid, a walk and an exported file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gan_dist.data.classes import Classes
from gan_dist.model.initialise import initialise
from gan_dist.model.networks import Generator
from gan_dist.sampling.classes import Asked, arrange, ask
from gan_dist.sampling.export import export_generator, load_weights
from gan_dist.sampling.generate import draw_latents, generate
from gan_dist.sampling.sample import sample_run
from gan_dist.utils.errors import UserError
from gan_dist.utils.pictures import from_pil, grid

STYLES = Classes(("Baroque", "Cubism", "Rococo"), (10, 5, 0, 5))


@pytest.fixture(scope="module")
def generator() -> Generator:
    made = Generator(32, 8, 4, classes=STYLES)
    initialise(made, 0.3, torch.Generator().manual_seed(0))
    return made.eval()


@pytest.fixture(scope="module")
def file(generator: Generator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_generator(generator, tmp_path_factory.mktemp("file") / "styles.safetensors", {})[0]


def drawn(file: Path, out: Path, **words: Any) -> torch.Tensor:
    sample_run(file, out=out, **words)
    with Image.open(out) as picture:
        return from_pil(picture)


def test_classes_have_a_row_each_of_the_same_latents(generator: Generator, file: Path, tmp_path: Path) -> None:
    page = drawn(file, tmp_path / "rows.png", count=8, seed=5, classes="rococo,Baroque")
    latents = draw_latents(8, 4, 5)
    rows = [generate(generator, generator.with_classes(latents, torch.full((4,), label))) for label in (3, 1)]
    assert torch.equal(page, grid(torch.cat(rows), 4)) and not torch.equal(*rows)
    one = drawn(file, tmp_path / "one.png", count=4, seed=5, class_name="rococo")
    assert torch.equal(one, grid(rows[0]))


def test_without_a_class_they_are_as_frequent_as_in_the_dataset(generator: Generator) -> None:
    plan = arrange(generator, Asked(), 400, 1)
    assert plan.vectors is not None and plan.columns is None
    table = generator.vectors_of(torch.arange(4))
    counts = torch.cdist(plan.vectors, table).argmin(1).bincount(minlength=4).tolist()
    assert counts[2] == 0 and 160 < counts[0] < 240 and min(counts[1], counts[3]) > 70  # of 10, 5, 0 and 5
    assert torch.equal(plan.latents, draw_latents(8, 400, 1))


def test_a_walk_goes_from_class_to_class_in_one_latent(generator: Generator) -> None:
    plan = arrange(generator, Asked((1, 3, 2)), 14, 0, walk=True)
    assert plan.vectors is not None and plan.columns == 4
    rows = plan.vectors[:12].view(3, 4, -1)
    ends = generator.vectors_of(torch.tensor([1, 2]))
    assert torch.equal(rows[0], rows[2])
    torch.testing.assert_close(rows[0, [0, 3]], ends)
    lengths, steps = rows[0].norm(dim=1), (rows[0, 1:] - rows[0, :-1]).norm(dim=1)
    assert lengths.min() > 0.99 * lengths.max() and steps.min() > 0.3 * steps.max() > 0
    latents = plan.inputs()[:12, :8].view(3, 4, -1)
    others = torch.randn(plan.latents.shape)  # in a film, latents move, and each row stays one
    assert torch.equal(plan.inputs(others)[:, :8], others.repeat_interleave(4, 0)[:14])
    assert torch.equal(latents, latents[:, :1].expand(-1, 4, -1)) and not torch.equal(latents[0], latents[1])
    middle = arrange(
        generator, Asked((1, 3, 2)), 25, 0, walk=True
    ).vectors  # of five columns the third is the second class
    assert middle is not None
    torch.testing.assert_close(middle[2], generator.vectors_of(torch.tensor([3]))[0])


def test_a_walk_leaves_no_class_out(generator: Generator) -> None:
    asked = Asked((1, 3, 2, 1, 2))
    plan = arrange(generator, asked, 4, 0, walk=True)
    assert plan.columns == 5 and plan.vectors is not None
    assert torch.allclose(plan.vectors[:4], generator.vectors_of(torch.tensor(asked.labels))[:4], atol=1e-5)


def test_a_walk_between_latents_keeps_its_class(generator: Generator) -> None:
    for asked in (Asked((2,)), Asked()):
        plan = arrange(generator, asked, 9, 0, walk=True)
        assert plan.vectors is not None
        rows = plan.vectors.view(3, 3, -1)
        assert torch.equal(rows, rows[:, :1].expand(-1, 3, -1))
        assert torch.equal(plan.latents, draw_latents(8, 9, 0, True))


def test_strength_exaggerates(generator: Generator) -> None:
    none, plain, strong = (arrange(generator, Asked((1,), w), 4, 0).vectors for w in (0.0, 1.0, 2.0))
    assert none is not None and plain is not None and strong is not None
    torch.testing.assert_close(strong - plain, plain - none)
    torch.testing.assert_close(none, generator.vectors_of(torch.zeros(4, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"class_name": "barok"}, r"^--class: no class 'barok'; did you mean 'Baroque'\?$"),
        ({"classes": "Baroque,cubizm"}, r"^--classes: no class 'cubizm'; did you mean 'Cubism'\?$"),
        ({"classes": ""}, r"^--classes: no class ''; there are 'Baroque', 'Cubism', 'Rococo' \(of styles with model"),
        ({"class_name": "Cubism", "classes": "Cubism"}, "say different things"),
        ({"class_name": "Cubism", "strength": -1.0}, "^--strength: expected a number from 0 to 1000, found -1$"),
        ({"strength": float("nan")}, "^--strength: expected a number from 0 to 1000, found nan$"),
        ({"class_name": "Cubism", "strength": 1e39}, r"^--strength: expected .*, found 1e\+39$"),
    ],
)
def test_what_cannot_be_asked_is_a_line(file: Path, tmp_path: Path, words: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        sample_run(file, out=tmp_path / "grid.png", **words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [{"one": "Baroque"}, {"several": "Baroque,Rococo"}, {"strength": 2.0}])
def test_a_generator_without_classes_says_so(words: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"one": None, "several": None, "strength": 1.0, **words}
    with pytest.raises(
        UserError, match=r"^--\w+: step 3 of run knows no classes; a run with model.classes=dataset lear"
    ):
        ask(Generator(32, 8, 4), "step 3 of run", **asked)


def test_an_exported_generator_and_its_card_know_the_classes(generator: Generator, file: Path, tmp_path: Path) -> None:
    again = load_weights(file)
    assert again.classes == STYLES and again.latent_dim == 8
    latents, labels = torch.randn(4, 8), torch.arange(4)
    assert torch.equal(again(again.with_classes(latents, labels)), generator(generator.with_classes(latents, labels)))
    assert "3 classes (and the images of each that it learned from): Baroque (5); Cubism (0); Rococo (5)." in (
        file.with_suffix(".md").read_text()
    )
    save_file(load_file(file), tmp_path / "bare.safetensors")  # its names are lost; it is a generator nevertheless
    assert load_weights(tmp_path / "bare.safetensors").classes.names == ("1", "2", "3")
    torch.save(load_file(file), tmp_path / "bare.pt")
    assert load_weights(tmp_path / "bare.pt").latent_dim == 8


@pytest.mark.parametrize(
    "named", [{"names": ["a"]}, {"names": "no list"}, 3, {"names": ["a", "b", "c"], "images": [1]}]
)
def test_names_that_do_not_fit_are_refused(file: Path, tmp_path: Path, named: Any) -> None:
    save_file(load_file(file), tmp_path / "g.safetensors", {"classes": json.dumps(named)})
    with pytest.raises(UserError, match=r"g.safetensors: .*classes"):
        load_weights(tmp_path / "g.safetensors")
