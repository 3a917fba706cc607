from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gan_dist.data.classes import NO_CLASSES, Classes
from gan_dist.model.augment import Augment
from gan_dist.model.penalty import GradientPenalty
from gan_dist.training.draws import draw_flips, draw_latents
from gan_dist.training.update import STATS, Update, real_and_fake, to_signed
from tests.helpers import games
from tests.helpers.games import CPU, STYLES, batches, game, moves, tensors, worst

STAT = {name: i for i, name in enumerate(STATS)}


class _PlainGenerator(nn.Module):
    def __init__(self, z: int, c: int) -> None:
        super().__init__()
        self.convt1 = nn.ConvTranspose2d(z, 4 * c, 4, 1, 0, bias=False)
        self.bn1 = nn.BatchNorm2d(4 * c)
        self.convt2 = nn.ConvTranspose2d(4 * c, 2 * c, 4, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * c)
        self.convt3 = nn.ConvTranspose2d(2 * c, c, 4, 2, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c)
        self.convt4 = nn.ConvTranspose2d(c, 3, 4, 2, 1, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.convt1(z.view(*z.shape, 1, 1))))
        x = F.relu(self.bn2(self.convt2(x)))
        return torch.tanh(self.convt4(F.relu(self.bn3(self.convt3(x)))))


class _PlainDiscriminator(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, c, 4, 2, 1, bias=False)
        self.conv2 = nn.Conv2d(c, 2 * c, 4, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * c)
        self.conv3 = nn.Conv2d(2 * c, 4 * c, 4, 2, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * c)
        self.conv4 = nn.Conv2d(4 * c, 1, 4, 1, 0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(x), 0.2)
        x = F.leaky_relu(self.bn2(self.conv2(x)), 0.2)
        return torch.sigmoid(self.conv4(F.leaky_relu(self.bn3(self.conv3(x)), 0.2))).flatten()


def _plain(steps: int, d_steps: int, loss: str, real_target: float, generator_target: float) -> dict[str, Tensor]:
    """Plays the game as the tutorials write it: separate passes, probabilities, nn.BCELoss, torch.optim.Adam."""
    generator, discriminator = _PlainGenerator(games.LATENT_DIM, games.CHANNELS), _PlainDiscriminator(games.CHANNELS)
    ours = games.networks()
    generator.load_state_dict(ours[0].state_dict())
    discriminator.load_state_dict(ours[1].state_dict())
    generator.double(), discriminator.double()
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.999))
    bce = nn.BCELoss()
    feeder = game(d_steps=d_steps)
    for step in range(steps):
        reals, latents = batches(feeder, step)
        for real, z in zip(reals, latents, strict=True):
            fake = generator(z)
            optimizer_d.zero_grad()
            p_real = discriminator(real.double() / 127.5 - 1)
            p_fake = discriminator(fake.detach())
            d_loss = bce(p_real, torch.full_like(p_real, real_target)) + bce(p_fake, torch.zeros_like(p_fake))
            d_loss.backward()
            optimizer_d.step()
        optimizer_g.zero_grad()
        p_fake = discriminator(fake)
        target = torch.full_like(p_fake, generator_target)
        g_loss = torch.log(1 - p_fake).mean() if loss == "minimax" else bce(p_fake, target)
        g_loss.backward()
        optimizer_g.step()
    named = {f"generator.{name}": value for name, value in generator.state_dict().items()}
    named |= {f"discriminator.{name}": value for name, value in discriminator.state_dict().items()}
    for part, optimizer in (("optimizer_g", optimizer_g), ("optimizer_d", optimizer_d)):
        for index, moments in optimizer.state_dict()["state"].items():
            named |= {f"{part}.{index}.{name}": value for name, value in moments.items()}
    return named


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("d_steps", [1, 2])
@pytest.mark.parametrize(
    ("loss", "real_target", "generator_target"), [("minimax", 1.0, None), ("non_saturating", 0.9, 0.8)]
)
def test_a_step_equals_plain_torch(
    steps: int, d_steps: int, loss: Any, real_target: float, generator_target: float | None
) -> None:
    update = game(d_lr=2e-3, d_steps=d_steps, loss=loss, real_target=real_target, generator_target=generator_target)
    for step in range(steps):
        update.step(*batches(update, step))
    assert worst(tensors(update), _plain(steps, d_steps, loss, real_target, generator_target or 1.0)) < 1e-11


def test_statistics_are_means_of_the_game() -> None:
    update = game(real_target=0.9)
    before = copy.deepcopy((update.g.network, update.d.network))
    (real,), (z,) = batches(update, 0)
    stats = update.step([real], [z], requests=(1.0, 0.0))
    assert stats.shape == (len(STATS),)
    with torch.no_grad():
        fake = before[0](z)
        l_real, l_fake = before[1](to_signed(real, torch.float64)), before[1](fake)
        after = copy.deepcopy(update.d.network)(fake)
    expected = {
        "probability/real": l_real.sigmoid().mean(),
        "probability/fake": l_fake.sigmoid().mean(),
        "probability/fake_after_update": after.sigmoid().mean(),
        # the value is the game's own, whatever smoothing D trains with
        "value/minimax": torch.log(l_real.sigmoid()).mean() + torch.log(1 - l_fake.sigmoid()).mean(),
        "loss/generator": -torch.log(after.sigmoid()).mean(),
        "loss/discriminator": F.binary_cross_entropy(l_real.sigmoid(), torch.full_like(l_real, 0.9))
        + F.binary_cross_entropy(l_fake.sigmoid(), torch.zeros_like(l_fake)),
        "gradient_norm/generator": torch.cat([v.flatten() for v in update.g.gradients.views]).norm(),
        "control/stop": torch.tensor(1.0),
        "control/save": torch.tensor(0.0),
        "control/skipped": torch.tensor(0.0),
    }
    for name, value in expected.items():
        assert stats[STAT[name]].item() == pytest.approx(value.item(), rel=1e-12), name


@pytest.mark.parametrize("d_steps", [1, 2])
@pytest.mark.parametrize("who", ["discriminator", "generator"])
def test_an_update_that_is_not_finite_is_skipped_with_its_buffers(
    monkeypatch: pytest.MonkeyPatch, who: str, d_steps: int
) -> None:
    update = game(d_steps=d_steps)
    update.step(*batches(update, 0))
    before = tensors(update)
    method = "discriminator_pass" if who == "discriminator" else "generator_pass"
    honest = getattr(update, method)

    def broken(*args: Tensor) -> tuple[Tensor, Tensor]:
        loss, extras = honest(*args)
        return loss * math.inf, extras

    monkeypatch.setattr(update, method, broken)
    stats = update.step(*batches(update, 1), requests=(1.0, 0.0))
    after = tensors(update)
    mine = (who, "optimizer_" + who[0])
    for name, value in before.items():
        if name.split(".")[0] in mine and not ("num_batches" in name or "running" in name):
            assert torch.equal(value, after[name]), f"{name} moved in a skipped update"
    moved = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert {"generator", "discriminator"} - {who} <= moved  # the other one has played on
    assert stats[STAT["control/skipped"]] == (d_steps if who == "discriminator" else 1)
    assert stats[STAT["control/stop"]] == 1  # the control word survives
    if who == "generator":
        assert torch.equal(before["generator.bn1.running_mean"], after["generator.bn1.running_mean"]) == (d_steps == 1)
    # Passes that batch norm still counts: G's whose fakes an update used that was played, the last ones being its own
    # update's; two for each update of D that was (real and fake), and one for G's.
    counts = [f"{network}.bn2.num_batches_tracked" for network in ("generator", "discriminator")]
    passes = {name.split(".")[0]: int(after[name] - before[name]) for name in counts}
    if who == "generator":
        assert passes == {"generator": d_steps - 1, "discriminator": 2 * d_steps}
    else:
        assert passes == {"generator": 1, "discriminator": 1}
    for network in ("generator", "discriminator"):
        same = torch.equal(before[f"{network}.bn2.running_var"], after[f"{network}.bn2.running_var"])
        assert same == (passes[network] == 0)
    monkeypatch.undo()
    stats = update.step(*batches(update, 2))
    assert stats[STAT["control/skipped"]] == 0
    assert torch.isfinite(stats).all()


def test_a_network_that_has_gone_wrong_moves_nothing_at_all() -> None:
    update = game()
    with torch.no_grad():
        update.g.network.get_parameter("convt2.weight")[0, 0, 0, 0] = math.nan
    before = tensors(update)
    stats = update.step(*batches(update, 0))
    assert stats[STAT["control/skipped"]] == 2
    after = tensors(update)
    assert all(torch.equal(before[name].nan_to_num(7), after[name].nan_to_num(7)) for name in before)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_a_saved_state_continues_bit_for_bit_and_in_the_default_layout(precision: Any) -> None:
    straight = game(precision=precision)
    for step in range(2):
        straight.step(*batches(straight, step))
    state = straight.state_dict()
    resumed = game(precision=precision)
    resumed.load_state_dict(copy.deepcopy(state))
    assert resumed.g.network.get_parameter("convt2.weight").is_contiguous(memory_format=torch.channels_last)
    for name, value in tensors(straight).items():
        assert value.is_contiguous(), f"{name} leaks the layout that trains"
        assert torch.equal(value, tensors(resumed)[name]), name
    for step in range(2, 4):
        straight.step(*batches(straight, step))
        resumed.step(*batches(resumed, step))
    after = tensors(straight)
    for name, value in tensors(resumed).items():
        assert torch.equal(value, after[name]), name
    assert not torch.equal(state["generator"]["convt1.weight"], after["generator.convt1.weight"])  # a copy, not a view


def _by_autocast(update: Update) -> Update:
    """Returns the update with weights that autocast casts in each pass, instead of copies."""
    assert update.g.working.by_name
    for player in (update.g, update.d):
        player.working.by_name.clear()
        player.working._sources.clear()
        player.leaves = list(player.parameters)
    return update


@pytest.mark.parametrize("model", [{}, {"upsample": "nearest", "d_norm": "spectral"}, {"d_norm": "none"}])
def test_working_copies_change_no_bit(model: dict[str, Any]) -> None:
    ours, autocast = (game(precision="bf16", model=model) for _ in range(2))
    _by_autocast(autocast)
    for step in range(3):
        assert torch.equal(*(each.step(*batches(each, step)) for each in (ours, autocast)))
    reference = tensors(autocast)
    for name, value in tensors(ours).items():
        assert value.dtype == reference[name].dtype
        assert torch.equal(value, reference[name]), name


def test_working_copies_follow_a_state_that_is_loaded() -> None:
    old, new = game(precision="bf16"), game(precision="bf16")
    old.step(*batches(old, 0))
    new.load_state_dict(old.state_dict())
    for player in (new.g, new.d):
        for name, copy_ in player.working.by_name.items():
            assert torch.equal(copy_, player.network.get_parameter(name).to(torch.bfloat16)), name
            assert copy_.stride() == player.network.get_parameter(name).stride()


def test_new_learning_rates_win_over_a_states() -> None:
    old, new = game(), game(g_lr=5e-4)
    old.step(*batches(old, 0))
    new.load_state_dict(old.state_dict())
    assert new.g.optimizer.param_groups[0]["lr"] == 5e-4


def test_the_generators_step_gives_the_discriminator_no_gradient() -> None:
    update = game()
    update.step(*batches(update, 0))
    gradient = update.d.gradients.flat.clone()
    needed: list[bool] = []
    honest = update.generator_pass

    def watched(fake: Tensor, real: Tensor, *draws: Tensor) -> tuple[Tensor, Tensor]:
        needed.extend(parameter.requires_grad for parameter in update.d.parameters)
        return honest(fake, real)

    update.generator_pass = watched  # type: ignore[method-assign]
    update.step(*batches(update, 1))
    assert not any(needed)
    assert all(parameter.requires_grad for parameter in update.d.parameters)
    assert not torch.equal(gradient, update.d.gradients.flat)


@pytest.mark.parametrize("classes", [NO_CLASSES, STYLES], ids=["plain", "classes"])
def test_pairs_are_judged_apart_as_together_without_a_way_back_through_reals(classes: Classes) -> None:
    penalty = GradientPenalty(0.1, 0.1, 2, 2)
    found = []
    for apart in (True, False):
        model = {"d_norm": "none", "classes": classes}
        update = game(model=model, loss="relativistic", penalty=penalty, augment=Augment(colour=True, translation=True))
        assert update._judges_alone
        update._judges_alone = apart
        judged: list[bool] = []
        honest = update._judge

        def watched(images: Tensor, *rest: Any, honest: Any = honest, judged: list[bool] = judged) -> Tensor:
            logits: Tensor = honest(images, *rest)
            judged.append(logits.requires_grad)
            return logits

        update._judge = watched  # type: ignore[method-assign, assignment]
        stats = [update.step(*moves(update, step)) for step in range(3)]
        assert judged == ([True, False, True] if apart else [True, True]) * 3
        found.append(tensors(update) | {"stats": torch.stack(stats)})
    assert worst(*found) < 1e-12


def test_both_passes_see_the_same_changed_images(monkeypatch: pytest.MonkeyPatch) -> None:
    update = game(model={"d_norm": "none"}, loss="relativistic", augment=Augment(colour=True, translation=True))
    judged: list[Tensor] = []
    drawn: list[Tensor] = []
    judge, generate = update._judge, update.generate

    def watched(images: Tensor, *rest: Any) -> Tensor:
        judged.append(images.detach().clone())
        return judge(images, *rest)

    def kept(latents: Tensor, *classes: Tensor) -> Tensor:
        drawn.append(generate(latents, *classes))
        return drawn[-1]

    monkeypatch.setattr(update, "_judge", watched)
    monkeypatch.setattr(update, "generate", kept)
    reals, latents, requests, draws = moves(update, 0)
    update.step(reals, latents, requests, draws)
    plain = [to_signed(reals[0], torch.float64), drawn[0].detach()]
    changed = [update.augment(one, draws[0][kind], update.probability) for kind, one in enumerate(plain)]
    assert not any(torch.equal(one, other) for one, other in zip(plain, changed, strict=True))
    assert torch.equal(judged[0], torch.cat(changed))  # D's pass
    assert torch.equal(judged[1], changed[0]) and torch.equal(judged[2], changed[1])  # G's


@pytest.mark.parametrize(
    "model", [{"d_norm": "batch"}, {"d_norm": "spectral"}, {"d_norm": "none", "minibatch_std": True}]
)
def test_pairs_are_judged_together_where_a_pass_leaves_something_behind(model: dict[str, Any]) -> None:
    assert not game(model=model, loss="relativistic")._judges_alone


def test_draws_are_keyed_by_seed_and_position_and_sliced() -> None:
    whole = draw_latents(1, 640, 8, 5, 0, 8, CPU)
    parts = [draw_latents(1, 640, 8, 5, lo, hi, CPU) for lo, hi in ((0, 3), (3, 4), (4, 8))]
    assert torch.equal(torch.cat(parts), whole)
    others = [draw_latents(2, 640, 8, 5, 0, 8, CPU), draw_latents(1, 648, 8, 5, 0, 8, CPU)]
    others += [draw_latents(1, 640, 8, 5, 0, 8, CPU, purpose=1), draw_latents(1, 640 + 2**32, 8, 5, 0, 8, CPU)]
    assert not any(torch.equal(other, whole) for other in others)
    flips = draw_flips(1, 640, 4000, 0, 4000, CPU)
    assert flips.dtype == torch.bool
    assert 0.45 < flips.float().mean() < 0.55
    assert torch.equal(draw_flips(1, 640, 4000, 100, 200, CPU), flips[100:200])


def test_draws_are_normal_and_positions_do_not_correlate() -> None:
    many = torch.stack([draw_latents(0, position, 16, 10, 0, 16, CPU).flatten() for position in range(500)]).double()
    assert abs(many.mean().item()) < 0.02
    assert abs(many.std().item() - 1) < 0.02
    neighbours = (many[1:] * many[:-1]).mean().item()
    assert abs(neighbours) < 0.02
    assert len({tuple(row[:4].tolist()) for row in many}) == 500


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_reals_and_fakes_are_one_batch(dtype: torch.dtype) -> None:
    real = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    fake = torch.rand(3, 3, 8, 8).to(dtype)
    both = real_and_fake(real, fake)
    assert both.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(both, torch.cat([to_signed(real, dtype), fake]))
    # one rounding in all
    assert torch.equal(both[:3], ((real.double() - 127.5) / 127.5).to(dtype))


def test_pixels_span_the_signed_range() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    assert to_signed(pixels, torch.float32).flatten().tolist() == [-1.0, 1.0]


GAMES: dict[str, dict[str, Any]] = {
    "thesis": {},
    "bf16": {"precision": "bf16"},
    "penalty": {
        "penalty": GradientPenalty(0.1, kinds=2),
        "model": {"d_norm": "none", "upsample": "nearest"},
    },
    "classes": {"model": {"classes": games.STYLES}, "d_steps": 2},
}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", GAMES)
def test_no_graph_outlives_its_step(name: str, kept: bool) -> None:
    """A leaf's AccumulateGrad node remembers the stream on which it was made; one that is left of an eager step breaks
    the capture of the next. (The control keeps what the discriminator returned.)"""
    update, marked, outputs = game(**GAMES[name]), set[int](), list[Any]()
    leaves: list[Any] = [leaf for player in (update.g, update.d) for leaf in player.leaves]

    def facts(leaf: Any) -> Any:
        """Returns the notes on the node of a leaf, which live as long as the node."""
        with torch.enable_grad():
            node = leaf.view_as(leaf).grad_fn
        return node.next_functions[0][0].metadata

    def mark(index: int) -> None:
        facts(leaves[index])["in a step"] = True
        marked.add(index)

    for index, leaf in enumerate(leaves):
        leaf.register_hook(lambda gradient, index=index: mark(index))
    if kept:
        update.d.network.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    for step in range(2):
        update.step(*games.moves(update, step))
    assert len(marked) == len(leaves)
    assert any("in a step" in facts(leaf) for leaf in leaves) == kept
