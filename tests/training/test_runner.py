"""Every runner plays the same game, and one that the device cannot do is refused."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gan_dist.distributed.world import World, join
from gan_dist.model.augment import Augment
from gan_dist.model.penalty import GradientPenalty
from gan_dist.training import runner as runners
from gan_dist.training import setup
from gan_dist.training.control import ControlRing
from gan_dist.training.runner import Captured, Compiled, make_runner, native_bf16, resolve_precision
from gan_dist.training.statistics import StepStatistics
from gan_dist.training.torch_settings import torch_settings
from gan_dist.training.trainer import train
from gan_dist.training.update import Update
from gan_dist.utils.errors import GanDistError, UserError
from gan_dist.utils.tensors import assert_ranks_agree, state_digest
from tests import PRECISION
from tests.helpers.fake_cuda import play_cuda
from tests.helpers.games import CPU, STYLES, batches, game, moves, tensors, worst
from tests.helpers.ranks import run_ranks
from tests.helpers.training import small

STEPS = 3  # the graphs that were silently wrong before torch 2.14 need more than one to be seen
needs_compiler = pytest.mark.skipif(runners.compiler() is None, reason="torch.compile needs a C++ compiler")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _difference(world: World, backend: str, **settings: Any) -> tuple[float, float]:
    """Returns how far compiled is from eager after three steps: in the state, and in the statistics."""
    eager, compiled = game(world, **settings), game(world, **settings)
    runner = Compiled(compiled, "a test", backend)
    for step in range(STEPS):
        expected = eager.step(*moves(eager, step))
        found = runner.step(*moves(compiled, step))
    return worst(tensors(compiled), tensors(eager)), worst({"stats": found[:8]}, {"stats": expected[:8]})


# Traces and differentiates as inductor does, which is where old releases go wrong, without a minute of C++ compiling.
TRACED = "aot_eager"
INDUCTOR = pytest.param("inductor", marks=[pytest.mark.chaos, needs_compiler, pytest.mark.timeout(400)])


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("backend", [TRACED, INDUCTOR])
def test_compiled_equals_eager(backend: str) -> None:
    state, stats = _difference(World(), backend)
    assert state < 1e-12
    assert stats < 1e-12


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(
    ("loss", "d_norm"),
    [
        pytest.param("least_squares", "none", marks=pytest.mark.chaos),
        ("hinge", "spectral"),
        ("wasserstein", "batch"),
        ("relativistic", "none"),
    ],
)
def test_other_games_compile_too(loss: str, d_norm: str) -> None:
    torch._dynamo.reset()  # it compiles a function for 8 games, and then no more
    model: dict[str, Any] = {"d_norm": d_norm, "upsample": "nearest", "init": "he"}
    game: dict[str, Any] = {"augment": Augment(True, True, True, target=0.1, images_to_full=20)}
    if loss == "hinge":
        model["classes"] = STYLES
    if d_norm == "batch":
        model |= {"minibatch_std": True, "blocks": "residual"}
    else:
        game["penalty"] = GradientPenalty(0.5, kinds=2, every=2)
    assert max(_difference(World(), TRACED, loss=loss, model=model, **game)) < 1e-12


def _rank(rank: int, folder: str, backend: str) -> None:
    dist.init_process_group("gloo")
    group: Any = dist.new_group([0, 1])
    world = World(rank=rank, size=2, device=CPU, group=group, control=group)
    results: dict[str, Any] = {"difference": _difference(world, backend, global_batch=7)}  # shares of 3 and 4

    update = game(world)
    results["digest"] = state_digest(update.state_dict())
    assert_ranks_agree(world.gather_objects(results["digest"]))
    with torch.no_grad():
        update.d.parameters[0][0, 0, 0, 0] += 1e-9 * rank
    try:
        assert_ranks_agree(world.gather_objects(state_digest(update.state_dict())))
    except GanDistError as error:
        results["stray"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _two_ranks(backend: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(2, _rank, folder, backend)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("backend", [pytest.param(TRACED, marks=pytest.mark.chaos), INDUCTOR])
def test_compiled_equals_eager_on_two_ranks_and_ranks_that_differ_are_named(backend: str) -> None:
    found = _two_ranks(backend)
    for result in found:
        assert max(result["difference"]) < 1e-12
        assert "rank(s) 1 of 2 do not hold rank 0's parameters" in result["stray"]
    assert found[0]["digest"] == found[1]["digest"]


def test_the_digest_sees_every_part_of_the_state() -> None:
    update = game()
    seen = {state_digest(update.state_dict())}
    touched = [
        update.g.parameters[0],
        update.d.parameters[-1],
        update.g.network.get_buffer("bn1.running_var"),
        update.d.optimizer.state[update.d.parameters[1]]["exp_avg"],
    ]
    for tensor in touched:
        with torch.no_grad():
            tensor[(0,) * tensor.dim()] += 1e-12
        seen.add(state_digest(update.state_dict()))
    assert len(seen) == 1 + len(touched)


def test_auto_says_what_it_chose_and_why() -> None:
    runner = make_runner("auto", game())
    assert runner.name == "eager"
    assert "CPU" in runner.reason
    assert make_runner("eager", game()).reason == "set by train.runner"


def _flaky(update: Update, fails_at: int) -> None:
    """Makes the update's step fail once, inside a capture that then fails as torch's does, and hides why."""
    step, calls = update.step, iter(range(1, 99))

    def failing(*words: Any) -> torch.Tensor:
        if next(calls) == fails_at:
            try:
                raise RuntimeError("cuBLAS was out of sorts")
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")
        return step(*words)

    update.step = failing  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("fails_at", [1, 3, runners.WARM_UP_STEPS + 1])
def test_a_capture_that_fails_leaves_the_state_alone_and_says_why(
    monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    play_cuda(monkeypatch)
    update, eager = game(), game()
    _flaky(update, fails_at)
    runner = Captured(update, "a test", may_fall_back=True)
    try:
        raise KeyError("of the caller's own")
    except KeyError:
        runner.step(*batches(update, 0))
    eager.step(*batches(eager, 0))
    assert all(torch.equal(value, tensors(eager)[name]) for name, value in tensors(update).items())
    assert (runner.name, runner.reason) == ("eager", "the step could not be captured (cuBLAS was out of sorts)")
    _flaky(update, fails_at)
    with pytest.raises(GanDistError, match=r"captured \(cuBLAS was out of sorts\); set train\.runner=eager"):
        Captured(update, "a test").step(*batches(update, 0))


def test_captured_compiled_records_the_compiled_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(function: Any, **options: Any) -> Any:
        def call(*words: Any) -> Any:
            called.append(function.__name__)
            return function(*words)

        return call

    called: list[str] = []
    monkeypatch.setattr(torch, "compile", compiled)
    play_cuda(monkeypatch)
    penalty, augment = GradientPenalty(0.5, kinds=1), Augment(translation=True)  # so that all passes are played
    settings: dict[str, Any] = {"model": {"d_norm": "none"}, "penalty": penalty, "augment": augment}
    update, eager = game(**settings), game(**settings)
    runner = Captured(update, "a test", compiled=True)
    assert runner.name == "captured_compiled"
    runner.step(*moves(update, 0))
    assert called == list(runners.PASSES) * (runners.WARM_UP_STEPS + 1)
    eager.step(*moves(eager, 0))  # what is recorded is done once, by this stand-in for a graph
    assert all(torch.equal(value, tensors(eager)[name]) for name, value in tensors(update).items())
    runner.step(*moves(update, 1))  # its noise is copied in
    assert torch.equal(runner.inputs[-1], moves(update, 1)[3][-1])
    assert not torch.equal(runner.inputs[-1], moves(update, 0)[3][-1])
    _flaky(update, 1)
    with pytest.raises(GanDistError, match=r"set train\.runner=captured$"):
        Captured(update, "a test", compiled=True).step(*batches(update, 0))


@pytest.mark.parametrize("deterministic", [False, True])
def test_convolutions_are_chosen_by_trial_unless_bits_must_repeat(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    play_cuda(monkeypatch)
    update, trials = game(), []
    step = update.step

    def watched(*words: Any) -> torch.Tensor:
        trials.append(torch.backends.cudnn.benchmark)
        return step(*words)

    update.step = watched  # type: ignore[method-assign, assignment]
    with torch_settings(torch.device("cuda"), deterministic):
        Captured(update, "a test").step(*batches(update, 0))
    assert trials == [not deterministic] * (runners.WARM_UP_STEPS + 1)
    assert not torch.backends.cudnn.benchmark


def _capture_with_failures(rank: int) -> None:
    """Captures on two ranks, of which some cannot: what becomes of it is the same on both."""
    with join("cpu") as world, pytest.MonkeyPatch.context() as patch:
        waits = play_cuda(patch)
        sorry = f"rank 1 on {world.host}: cuBLAS was out of sorts"

        def captured(failing: tuple[int, ...], at: int, error: type[RuntimeError] = RuntimeError) -> Captured:
            """Returns a runner whose step fails on some ranks; devices do not wait for one another in it."""
            update, count = game(world), iter(range(99))

            def step(*words: Any) -> torch.Tensor:
                if next(count) == at and rank in failing:
                    raise error("cuBLAS was out of sorts")
                return torch.empty(0)

            update.step = step  # type: ignore[method-assign, assignment]
            return Captured(update, "a test", may_fall_back=True)

        for failing, at in (((1,), runners.WARM_UP_STEPS), ((0, 1), 1)):  # in the recording; everywhere
            runner = captured(failing, at)
            runner.step(*batches(runner.update, 0))
            first = sorry if failing == (1,) else sorry.replace("rank 1", "rank 0")
            assert (runner.name, runner.reason) == ("eager", f"the step could not be captured ({first})")
        waits.clear()
        for error, words in (
            (RuntimeError, f"the step could not be warmed up for capture ({sorry}); set train.runner=eager"),
            (torch.OutOfMemoryError, sorry),
        ):
            runner = captured((1,), 1, error)
            expected: Any = error if rank and error is not RuntimeError else GanDistError
            with pytest.raises(expected) as caught:
                runner.step(*batches(runner.update, 0))
            assert waits == []  # a device that waits for rank 1 would never be done
            if expected is GanDistError:
                assert str(caught.value) == words and caught.value.exit_now
                assert caught.value.reported_elsewhere == (rank == 0)


def test_ranks_of_which_one_cannot_capture_fall_back_or_end_together() -> None:
    run_ranks(2, _capture_with_failures)


def test_a_fallback_is_in_the_runs_history(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flaky_runner(name: str, update: Update) -> Captured:
        _flaky(update, 1)
        return Captured(update, "a test", may_fall_back=True)

    play_cuda(monkeypatch)
    monkeypatch.setattr(setup, "make_runner", flaky_runner)
    train(small(dataset), run_dir=tmp_path / "run", max_steps=2, console=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (warning,) = [line for line in lines if line.get("event") == "warning"]
    assert warning["step"] == 1
    assert warning["reason"].startswith("falling back to the eager runner: the step could not be captured (cuBLAS")


def test_gloos_collectives_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    update = SimpleNamespace(world=SimpleNamespace(device=torch.device("cuda"), group=object()))
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cpu:gloo,cuda:gloo")
    assert make_runner("auto", update).name == "eager"  # type: ignore[arg-type]
    assert "gloo" in make_runner("auto", update).reason  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cannot record gloo's collectives"):
        make_runner("captured", update)  # type: ignore[arg-type]
    for config in ("cuda:nccl", "cpu:gloo,cuda:nccl"):  # the second is torch's own choice
        monkeypatch.setattr(dist, "get_backend_config", lambda group, config=config: config)
        assert make_runner("auto", update).name == "captured"  # type: ignore[arg-type]


def test_what_the_device_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("captured", "captured_compiled"):
        with pytest.raises(UserError, match=rf"train\.runner={name} records a CUDA graph, but this rank drives cpu"):
            make_runner(name, game())
    with pytest.raises(UserError, match="expected auto, eager, compiled, captured, captured_compiled, found 'fast'"):
        make_runner("fast", game())
    monkeypatch.setattr(runners, "compiler", lambda: None)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        make_runner("compiled", game())


def test_precision_is_resolved_by_what_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "native_bf16", lambda device: False)
    assert resolve_precision("auto", CPU)[0] == "fp32"
    with pytest.raises(UserError, match=r"train\.precision=bf16, but this cpu has no bf16 of its own"):
        resolve_precision("bf16", CPU)
    monkeypatch.setattr(runners, "native_bf16", lambda device: True)
    assert resolve_precision("auto", CPU)[0] == "bf16"
    assert resolve_precision("bf16", CPU)[0] == "bf16"
    assert resolve_precision("fp64", CPU) == ("fp64", "set by train.precision")
    with pytest.raises(UserError, match="tf32 is an NVIDIA GPU's"):
        resolve_precision("tf32", CPU)
    with pytest.raises(UserError, match="expected auto, bf16, tf32, fp32, fp64, found 'fp16'"):
        resolve_precision("fp16", CPU)


@pytest.mark.skipif(bool(PRECISION), reason="GAN_DIST_TEST_PRECISION answers for the machine")
def test_native_bf16_agrees_with_the_machine() -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or "flags" not in flags.read_text():
        pytest.skip("only x86 Linux lists its flags so")
    text = flags.read_text()
    assert native_bf16(CPU) == ("amx_tile" in text or "avx512_bf16" in text)


def test_bf16_keeps_master_weights_and_statistics_in_float32() -> None:
    update = game(precision="bf16")
    stats = update.step(*batches(update, 0))
    assert torch.isfinite(stats).all()
    assert stats.dtype == torch.float32
    assert {tensor.dtype for tensor in tensors(update).values()} == {torch.float32, torch.int64}
    exact = game(precision="fp64")
    expected = exact.step(*batches(exact, 0))
    assert not torch.equal(stats.double(), expected)
    torch.testing.assert_close(stats[:6].double(), expected[:6], rtol=0.05, atol=0.02)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("d_steps", [1, 2])
def test_captured_equals_eager(precision: str, d_steps: int) -> None:
    world = World(device=torch.device("cuda", 0))
    settings: dict[str, Any] = {"precision": precision, "d_steps": d_steps}
    # Bit for bit: a sum in another order may turn the sign of a tiny gradient, and with it all of Adam's first step.
    with torch_settings(world.device, deterministic=True, precision=precision):
        eager, captured = game(world, **settings), game(world, **settings)
        runner = make_runner("captured", captured)
        assert isinstance(runner, Captured)
        for step in range(STEPS):
            expected = eager.step(*batches(eager, step), (float(step == 2), float(step == 1)))
            found = runner.step(*batches(captured, step), (float(step == 2), float(step == 1)))
    assert all(torch.equal(value, tensors(eager)[name]) for name, value in tensors(captured).items())
    assert torch.equal(found, expected)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Within it, an operation that waits for the device raises."""
    try:
        with warnings.catch_warnings():  # torch says once that this is a prototype, after it has changed the mode
            warnings.simplefilter("ignore")
            torch._C._cuda_set_sync_debug_mode(2)
        yield
    finally:
        torch._C._cuda_set_sync_debug_mode(0)


def test_the_check_for_waits_warns_of_nothing_and_is_put_back() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with waiting_is_an_error():
            assert torch._C._cuda_get_sync_debug_mode() == 2
    assert torch._C._cuda_get_sync_debug_mode() == 0


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["eager", "captured"])
def test_a_hundred_steps_wait_for_the_device_never(name: str) -> None:
    update = game(World(device=torch.device("cuda", 0)), precision="bf16")
    runner = make_runner(name, update)
    inputs = batches(update, 0)
    for _ in range(3):
        runner.step(*inputs)
    ring, statistics = ControlRing(update.world.device, 60), StepStatistics(update, 100)
    statistics.start(0, 0, 0.0)
    ring.push(0, statistics.note(0, 0, 0.0, runner.step(*inputs)))
    torch.cuda.synchronize()
    heard = ring.drain()
    with waiting_is_an_error():
        for step in range(1, 101):
            stats = runner.step(*inputs)
            heard += ring.push(step, statistics.note(step, step, 0.0, stats) if step % 10 == 0 else stats)
    heard += ring.drain()
    assert [step for step, _ in heard] == list(range(101))
    logged = [values for step, words in heard if (values := statistics.compute(step, words, 0)) is not None]
    assert len(logged) == 11 and all(0 < values["update_ratio/generator"] < 1 for _, values in logged)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_captured_compiled_equals_eager() -> None:
    world = World(device=torch.device("cuda", 0))
    eager, other = game(world), game(world)
    runner = make_runner("captured_compiled", other)
    for step in range(STEPS):
        eager.step(*batches(eager, step))
        runner.step(*batches(other, step))
    on_cpu = [{name: value.cpu() for name, value in tensors(update).items()} for update in (other, eager)]
    assert worst(*on_cpu) < 1e-10


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_plays_the_cpus_game() -> None:
    on_cpu, on_gpu = game(), game(World(device=torch.device("cuda", 0)))
    for step in range(STEPS):
        on_cpu.step(*batches(on_cpu, step))
        on_gpu.step(*batches(on_gpu, step))
    found = {name: value.cpu() for name, value in tensors(on_gpu).items()}
    assert worst(found, tensors(on_cpu)) < 1e-10


def _nccl_rank(rank: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl")
    nccl: Any = dist.new_group([0, 1])
    gloo: Any = dist.new_group([0, 1], backend="gloo")
    games = {
        "nccl": game(World(rank=rank, size=2, device=torch.device("cuda", rank), group=nccl), global_batch=7),
        "gloo": game(World(rank=rank, size=2, device=CPU, group=gloo), global_batch=7),
    }
    captured = game(World(rank=rank, size=2, device=torch.device("cuda", rank), group=nccl), global_batch=7)
    runner = make_runner("captured", captured)
    for step in range(STEPS):
        for update in games.values():
            update.step(*batches(update, step))
        runner.step(*batches(captured, step))
    states = {name: {k: v.cpu() for k, v in tensors(update).items()} for name, update in games.items()}
    states["captured"] = {k: v.cpu() for k, v in tensors(captured).items()}
    found = {name: worst(state, states["gloo"]) for name, state in states.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    runner.close()
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_nccl_equals_gloo_eager_and_captured() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(2, _nccl_rank, folder)
        for rank in range(2):
            assert max(torch.load(Path(folder) / f"{rank}.pt").values()) < 1e-10
