"""Generators as files: out, back in, in from elsewhere, and refused where a file could do more than hold tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from gan_dist.config.schema import Upsample
from gan_dist.data.classes import NO_CLASSES, Classes
from gan_dist.model.networks import Generator
from gan_dist.sampling.export import export_generator, load_weights
from gan_dist.sampling.generate import generate
from gan_dist.utils.errors import UserError


def learned(resolution: int = 32, upsample: Upsample = "transposed", classes: Classes = NO_CLASSES) -> Generator:
    """Returns a generator whose every number, running statistics included, differs from where it began."""
    generator = Generator(resolution, 8, 4, upsample, classes=classes)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in generator.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(7)
            elif name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=source) + 0.5)
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=source) * 0.3)
    return generator.eval()


class Tutorial(nn.Module):
    """The usual tutorial's generator: everything in one nn.Sequential called main."""

    def __init__(self, latent_dim: int = 8, width: int = 4) -> None:
        super().__init__()
        widths = [width * 8, width * 4, width * 2, width]
        layers: list[nn.Module] = [nn.ConvTranspose2d(latent_dim, widths[0], 4, 1, 0, bias=False)]
        for wide, narrow in zip(widths, [*widths[1:], 3], strict=True):
            layers += [nn.BatchNorm2d(wide), nn.ReLU(True), nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False)]
        self.main = nn.Sequential(*layers, nn.Tanh())

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        images: torch.Tensor = self.main(latents)
        return images


class Thesis(nn.Module):
    """The thesis' generator: convt1..5 and bn1..4 as attributes."""

    def __init__(self, latent_dim: int = 8, width: int = 4) -> None:
        super().__init__()
        self.convt1 = nn.ConvTranspose2d(latent_dim, width * 8, 4, 1, 0, bias=False)
        self.bn1 = nn.BatchNorm2d(width * 8)
        self.convt2 = nn.ConvTranspose2d(width * 8, width * 4, 4, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width * 4)
        self.convt3 = nn.ConvTranspose2d(width * 4, width * 2, 4, 2, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * 2)
        self.convt4 = nn.ConvTranspose2d(width * 2, width, 4, 2, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(width)
        self.convt5 = nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(1, 5):
            x = torch.relu(getattr(self, f"bn{i}")(getattr(self, f"convt{i}")(x)))
        return torch.tanh(self.convt5(x))


def stirred(network: nn.Module) -> nn.Module:
    """Returns `network` after a few passes in train mode, so that its running statistics are its own."""
    torch.manual_seed(0)
    for _ in range(5):
        network(torch.randn(16, 8, 1, 1))
    return network.eval()


def test_the_exported_file_gives_the_same_images(tmp_path: Path) -> None:
    generator = learned()
    weights, card = export_generator(generator, tmp_path / "g.safetensors", {"run": "r", "step": 3})
    latents = torch.randn(9, 8)
    with torch.no_grad():
        torch.testing.assert_close(load_weights(weights)(latents), generator(latents), rtol=0, atol=1e-5)
    with safe_open(str(weights), framework="pt") as file:
        assert file.metadata()["resolution"] == "32"
    text = card.read_text()
    assert "- run: r" in text and "- step: 3" in text and "{" not in text.split("```")[0]


@pytest.mark.parametrize("classes", [NO_CLASSES, Classes(("a", 'b "c" {d}'), (1, 2, 3))])
def test_the_cards_snippet_loads_it_without_us(classes: Classes, tmp_path: Path) -> None:
    generator = learned(64, classes=classes)
    weights, card = export_generator(generator, tmp_path / "g.safetensors", {})
    latents = torch.randn(16, 8, generator=torch.Generator().manual_seed(5))
    torch.save(latents, tmp_path / "latents.pt")
    snippet = card.read_text().split("```python\n")[1].split("```")[0]
    program = (
        f"import sys\nsys.modules['gan_dist'] = None\n{snippet}\n"
        "given = torch.cat([torch.load('latents.pt')[:, :, None, None], latents[:, 8:]], 1)\n"
        "with torch.no_grad():\n    torch.save(stack(given), 'images.pt')\n"
        "assert images.shape == (16, 3, 64, 64)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    if classes.names:  # the snippet asks for the largest one
        latents = generator.with_classes(latents, torch.full((16,), 2))
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "images.pt"), generator(latents), rtol=0, atol=1e-5)
    assert weights.is_file()


@pytest.mark.parametrize("network", [Tutorial, Thesis])
@pytest.mark.parametrize("wrap", ["plain", "parallel", "checkpoint", "old"])
def test_generators_of_other_programs(network: type[nn.Module], wrap: str, tmp_path: Path) -> None:
    theirs = stirred(network())
    state = dict(theirs.state_dict())
    if wrap == "parallel":
        state = {f"module.{name}": value for name, value in state.items()}
    if wrap == "old":
        state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    saved = {"epoch": 3, "netD": {"x": torch.zeros(1)}, "netG": state} if wrap == "checkpoint" else state
    torch.save(saved, tmp_path / "G.pth")
    latents = torch.randn(5, 8)
    ours = load_weights(tmp_path / "G.pth")
    with torch.no_grad():
        torch.testing.assert_close(ours(latents), theirs(latents[:, :, None, None]), rtol=0, atol=1e-5)
    assert generate(ours, latents).shape == (5, 3, 64, 64)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


def test_a_file_with_more_than_tensors_is_refused_unexecuted(tmp_path: Path) -> None:
    torch.save({"generator": dict(Tutorial().state_dict()), "extra": Bomb(tmp_path / "boom")}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=r"holds more than tensors .*mkdir.*was not opened"):
        load_weights(tmp_path / "bad.pt")
    torch.save(Tutorial(), tmp_path / "module.pt")
    with pytest.raises(UserError, match=r"holds more than tensors .*state_dict\(\)"):
        load_weights(tmp_path / "module.pt")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: {"weights": {"a": 1}}, "no generator in it.*found weights"),
        (lambda: [torch.zeros(1)], "expected a state_dict, found list"),
        (lambda: {"fc.weight": torch.zeros(2, 2)}, "no transposed convolution"),
        (lambda: {"main.0.weight": torch.zeros(8, 4, 4, 4)}, "1 transposed convolutions"),
        (lambda: {**Tutorial().state_dict(), "main.0.bias": torch.zeros(32)}, "convt1.bias has no place"),
        (lambda: {k: v for k, v in Thesis().state_dict().items() if k != "bn2.bias"}, "no bn2.bias"),
        (lambda: {**Thesis().state_dict(), "bn1.bias": torch.zeros(3)}, r"bn1.bias has shape \[3\]"),
    ],
)
def test_what_is_no_generator_is_named(make: object, message: str, tmp_path: Path) -> None:
    torch.save(make(), tmp_path / "x.pt")  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        load_weights(tmp_path / "x.pt")


def test_files_that_are_none(tmp_path: Path) -> None:
    for name in ("junk.pt", "junk.safetensors"):
        (tmp_path / name).write_bytes(b"\x01not tensors at all" * 9)
        with pytest.raises(UserError, match=r"is not a|holds more than"):
            load_weights(tmp_path / name)
    with pytest.raises(UserError, match="no file"):
        load_weights(tmp_path / "none.pt")
    with pytest.raises(UserError, match=r"ending in \.safetensors"):
        export_generator(learned(), tmp_path / "g.bin", {})


def test_what_doubles_by_nearest_neighbours_is_exported_as_plain_transposed_convolutions(tmp_path: Path) -> None:
    generator = learned(upsample="nearest")
    export_generator(generator, tmp_path / "g.safetensors", {})
    loaded = load_weights(tmp_path / "g.safetensors")
    assert loaded.upsample == "transposed" and loaded.get_parameter("convt2.weight").shape[2:] == (4, 4)
    latents = torch.randn(5, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(latents), generator(latents), rtol=1e-4, atol=1e-5)


def test_a_generator_whose_width_was_capped_comes_back(tmp_path: Path) -> None:
    generator = Generator(64, 8, 4, "nearest", max_channels=10).eval()  # 10, 10, 8 and 4 maps
    export_generator(generator, tmp_path / "g.safetensors", {})
    latents = torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            load_weights(tmp_path / "g.safetensors")(latents), generator(latents), rtol=0, atol=1e-5
        )
    torch.save(
        {"convt1.weight": torch.zeros(8), **{f"convt{i}.weight": torch.zeros(4, 4) for i in (2, 3, 4)}},
        tmp_path / "x.pt",
    )
    with pytest.raises(UserError, match=r"convt1.weight has shape \[8\]"):
        load_weights(tmp_path / "x.pt")
