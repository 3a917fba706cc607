"""Batch norm and its activation as one operation for GPUs: Triton kernels, for one rank and for many.

torch's own kernels read or write a map 13 times for a layer's forward and backward pass, and more than twice as often
where statistics are merged over ranks; these do it 8 times, the least there is unless maps stay on the chip. Sums are
made in a fixed order, without atomics, so equal inputs give equal bits.

Forward: each program sums up a chunk of pixels, and the chunks, then the ranks, are merged (Chan et al. 1979).
Backward: sum(dy) and sum(dy xhat) over chunks, then over ranks. The activation is leaky ReLU; whether it let a value
pass is computed again from x, by the same instructions, so its output need not be kept.

A group's statistics are a *record* of 2 C + 1 numbers: C means, C times M2 (the sum of squared distances from the
mean), and the count. Everything is computed in float32, or in float64 where x is that.

Maps are channels_last: R rows (pixels) of C channels for each group. Triton comes with torch on Linux, and is imported
nowhere else: a machine without a GPU may lack it. With TRITON_INTERPRET=1 the kernels run on a CPU, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gan_dist.distributed.exchange import OneShot, gathered, summed
from gan_dist.model.custom_ops import define, exact, require_close

TILE = 4096
"""Values that a program has in hand at a time: 32 a thread, so that each load and store can be of 16 bytes."""
MAX_CHANNELS = 64
"""Channels of a tile: 128 bytes of bfloat16, a whole cache line."""
PROGRAMS = 264
"""About as many programs sum up chunks of two maps, and twice as many those of one: two and four for each
multiprocessor of an H100, where all are at work at once (measured: 1.7 times as fast as eight). Fixed, and not asked of
the device, because the number of chunks decides the order of sums, and so the bits."""
WARPS = 4
MERGED_PARTS, MERGED_CHANNELS = 128, 16
"""Records that one program of a merge has in hand at a time, and how many of their channels."""
COUNTS = ("rows", "chunk", "parts", "groups")
"""Numbers for which Triton is to build no kernel of its own where they are 1 or divisible by 16: each would be one more
to build at a start, and whether accesses are wide depends on the channels alone."""


@triton.jit(do_not_specialize=COUNTS)
def _statistics_kernel(x, records, rows, channels, chunk, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Writes the record of a chunk of rows of one group. Grid: channel tiles, chunks, groups."""
    dtype = records.dtype.element_ty
    part, group = tl.program_id(1), tl.program_id(2)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    first = part * chunk
    count = tl.minimum(chunk, rows - first)
    x += (group.to(tl.int64) * rows + first) * channels
    # Distances from one of the chunk's own values: squares of what is left lose no digits to a large mean.
    pivot = tl.load(x + channel, mask=inside, other=0.0).to(dtype)
    total = tl.zeros([ROWS, CHANNELS], dtype)
    squares = tl.zeros([ROWS, CHANNELS], dtype)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        here = (row < count)[:, None] & inside[None, :]
        value = tl.load(x + row[:, None] * channels + channel[None, :], mask=here, other=0.0).to(dtype)
        distance = tl.where(here, value - pivot[None, :], 0.0)
        total += distance
        squares += distance * distance
    shift = tl.sum(total, 0) / count.to(dtype)
    m2 = tl.maximum(tl.sum(squares, 0) - shift * shift * count.to(dtype), 0.0)
    record = records + (part * tl.num_programs(2) + group) * (2 * channels + 1)
    tl.store(record + channel, pivot + shift, mask=inside)
    tl.store(record + channels + channel, m2, mask=inside)
    tl.store(record + 2 * channels, count.to(dtype))


@triton.jit(do_not_specialize=COUNTS)
def _merge_kernel(records, merged, parts, channels, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """Merges `records` [parts, groups, 2 C + 1] into `merged` [groups, 2 C + 1]. Grid: channel tiles, groups."""
    dtype = records.dtype.element_ty
    group, groups = tl.program_id(1), tl.num_programs(1)
    width = 2 * channels + 1
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    count = tl.sum(tl.zeros([PARTS], dtype), 0)
    mean = tl.zeros([CHANNELS], dtype)
    m2 = tl.zeros([CHANNELS], dtype)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        there = part < parts
        record = records + (part * groups + group) * width
        counts = tl.load(record + 2 * channels, mask=there, other=0.0)
        both = there[:, None] & inside[None, :]
        means = tl.load(record[:, None] + channel[None, :], mask=both, other=0.0)
        m2s = tl.load(record[:, None] + channels + channel[None, :], mask=both, other=0.0)
        more = tl.sum(counts, 0)
        centre = tl.sum(means * counts[:, None], 0) / more
        off = means - centre[None, :]
        apart = centre - mean
        both_counts = count + more
        m2 += tl.sum(m2s + off * off * counts[:, None], 0) + apart * apart * (count * more / both_counts)
        mean += apart * (more / both_counts)
        count = both_counts
    merged += group * width
    tl.store(merged + channel, mean, mask=inside)
    tl.store(merged + channels + channel, m2, mask=inside)
    tl.store(merged + 2 * channels, count)


@triton.jit
def _layer(record, weight, bias, channels, channel, inside, EPS: tl.constexpr):
    """Returns a group's mean and 1 / standard deviation (outside: 0 and that of 1), and the layer's scale and shift."""
    mean = tl.load(record + channel, mask=inside, other=0.0)
    m2 = tl.load(record + channels + channel, mask=inside, other=1.0)
    invstd = 1.0 / tl.sqrt(m2 / tl.load(record + 2 * channels) + EPS)
    scale = invstd * tl.load(weight + channel, mask=inside, other=0.0)
    return mean, invstd, scale, tl.load(bias + channel, mask=inside, other=0.0)


@triton.jit
def _affine(distance, scale, shift):
    """Returns what the activation gets, for distances from the mean. Forward and backward share it, and so its sign."""
    scale = tl.broadcast_to(scale[None, :], distance.shape)
    return tl.fma(distance, scale, tl.broadcast_to(shift[None, :], distance.shape))


@triton.jit(do_not_specialize=COUNTS)
def _normalise_kernel(
    x, record, weight, bias, y, rows, channels,
    EPS: tl.constexpr, SLOPE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Writes the normalised and activated rows. Grid: row tiles, channel tiles, groups."""
    dtype = record.dtype.element_ty
    group = tl.program_id(2)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    record += group * (2 * channels + 1)
    mean, _, scale, shift = _layer(record, weight, bias, channels, channel, inside, EPS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = (row < rows)[:, None] & inside[None, :]
    at = (group.to(tl.int64) * rows + row.to(tl.int64))[:, None] * channels + channel[None, :]
    distance = tl.load(x + at, mask=here, other=0.0).to(dtype) - mean[None, :]
    value = _affine(distance, scale, shift)
    tl.store(y + at, tl.where(value > 0, value, value * SLOPE), mask=here)


@triton.jit(do_not_specialize=COUNTS)
def _chunk_sums_kernel(
    dy, x, record, weight, bias, sums, rows, channels, chunk,
    EPS: tl.constexpr, SLOPE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Writes sum(dz) and sum(dz xhat) of a chunk; dz is dy behind the activation. Grid as _statistics_kernel's."""
    dtype = record.dtype.element_ty
    part, group = tl.program_id(1), tl.program_id(2)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    record += group * (2 * channels + 1)
    mean, invstd, scale, shift = _layer(record, weight, bias, channels, channel, inside, EPS)
    first = part * chunk
    count = tl.minimum(chunk, rows - first)
    x += (group.to(tl.int64) * rows + first) * channels
    dy += (group.to(tl.int64) * rows + first) * channels
    total = tl.zeros([ROWS, CHANNELS], dtype)
    product = tl.zeros([ROWS, CHANNELS], dtype)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        here = (row < count)[:, None] & inside[None, :]
        at = row[:, None] * channels + channel[None, :]
        distance = tl.load(x + at, mask=here, other=0.0).to(dtype) - mean[None, :]
        dz = tl.load(dy + at, mask=here, other=0.0).to(dtype)
        dz = tl.where(_affine(distance, scale, shift) > 0, dz, dz * SLOPE)
        total += dz
        product += dz * distance
    sums += (part * tl.num_programs(2) + group) * 2 * channels
    tl.store(sums + channel, tl.sum(total, 0), mask=inside)
    tl.store(sums + channels + channel, tl.sum(product, 0) * invstd, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def _add_sums_kernel(
    chunk_sums, sums, dweight, dbias, parts, groups, channels, PARTS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Adds `chunk_sums` [parts, groups, 2, C] up to `sums` [groups, 2, C] and to both parameters' gradients [C]."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    dtype = sums.dtype.element_ty
    dw = tl.zeros([CHANNELS], dtype)
    db = tl.zeros([CHANNELS], dtype)
    for group in range(groups):
        total = tl.zeros([CHANNELS], dtype)
        product = tl.zeros([CHANNELS], dtype)
        for start in range(0, parts, PARTS):
            part = start + tl.arange(0, PARTS)
            both = (part < parts)[:, None] & inside[None, :]
            at = chunk_sums + ((part * groups + group) * 2 * channels)[:, None] + channel[None, :]
            total += tl.sum(tl.load(at, mask=both, other=0.0), 0)
            product += tl.sum(tl.load(at + channels, mask=both, other=0.0), 0)
        tl.store(sums + group * 2 * channels + channel, total, mask=inside)
        tl.store(sums + group * 2 * channels + channels + channel, product, mask=inside)
        dw += product
        db += total
    tl.store(dweight + channel, dw, mask=inside)
    tl.store(dbias + channel, db, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def _input_gradient_kernel(
    dy, x, record, weight, bias, sums, dx, rows, channels,
    EPS: tl.constexpr, SLOPE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Writes dx, by the sums over all ranks. Grid as _normalise_kernel's."""
    dtype = record.dtype.element_ty
    group = tl.program_id(2)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    record += group * (2 * channels + 1)
    mean, invstd, scale, shift = _layer(record, weight, bias, channels, channel, inside, EPS)
    count = tl.load(record + 2 * channels)
    sums += group * 2 * channels
    mean_dz = tl.load(sums + channel, mask=inside, other=0.0) / count
    mean_product = tl.load(sums + channels + channel, mask=inside, other=0.0) / count * invstd
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = (row < rows)[:, None] & inside[None, :]
    at = (group.to(tl.int64) * rows + row.to(tl.int64))[:, None] * channels + channel[None, :]
    distance = tl.load(x + at, mask=here, other=0.0).to(dtype) - mean[None, :]
    dz = tl.load(dy + at, mask=here, other=0.0).to(dtype)
    dz = tl.where(_affine(distance, scale, shift) > 0, dz, dz * SLOPE)
    tl.store(dx + at, (dz - mean_dz[None, :] - distance * mean_product[None, :]) * scale[None, :], mask=here)


@triton.jit(do_not_specialize=COUNTS)
def _track_kernel(
    running_mean, running_var, num_batches, record, groups, channels, MOMENTUM: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Moves the running statistics once a group, in order, as torch does. Grid: channel tiles."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    mean = tl.load(running_mean + channel, mask=inside, other=0.0)
    var = tl.load(running_var + channel, mask=inside, other=0.0)
    for _ in range(groups):
        m2 = tl.load(record + channels + channel, mask=inside, other=0.0)
        mean += (tl.load(record + channel, mask=inside, other=0.0) - mean) * MOMENTUM
        var += (m2 / (tl.load(record + 2 * channels) - 1) - var) * MOMENTUM
        record += 2 * channels + 1
    tl.store(running_mean + channel, mean, mask=inside)
    tl.store(running_var + channel, var, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(num_batches, tl.load(num_batches) + groups)


# Each launch, or two, is an operation of torch's.


def _rows(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _tile(channels: int) -> dict[str, int]:
    width = min(MAX_CHANNELS, triton.next_power_of_2(channels))
    return {"ROWS": TILE // width, "CHANNELS": width}


def _chunks(rows: int, channels: int, groups: int, programs: int) -> tuple[int, int]:
    """Returns (chunks of a group, rows of a chunk but the last)."""
    tile = _tile(channels)
    most = max(1, programs // (triton.cdiv(channels, tile["CHANNELS"]) * groups))
    chunk = tile["ROWS"] * triton.cdiv(triton.cdiv(rows, most), tile["ROWS"])
    return triton.cdiv(rows, chunk), chunk


def _shape(x: Tensor, groups: int) -> tuple[int, int]:
    """Returns (rows of a group, channels)."""
    return x.numel() // (groups * x.shape[1]), x.shape[1]


@define("batch_statistics(Tensor x, int groups) -> Tensor", lambda x, groups: _empty_record(x, groups))
def _batch_statistics(x: Tensor, groups: int) -> Tensor:
    """Returns the record of each group, [groups, 2 C + 1]."""
    x = _rows(x)
    rows, channels = _shape(x, groups)
    chunks, chunk = _chunks(rows, channels, groups, 2 * PROGRAMS)
    records = _empty_record(x, chunks, groups)
    tile = _tile(channels)
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(channels, tile["CHANNELS"]), chunks, groups)
        _statistics_kernel[grid](x, records, rows, channels, chunk, **tile, num_warps=WARPS)
    merged: Tensor = _merge_records(records)
    return merged


def _empty_record(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty((*shape, 2 * x.shape[1] + 1), dtype=exact(x))


@define("merge_records(Tensor records) -> Tensor", lambda records: records.new_empty(records.shape[1:]))
def _merge_records(records: Tensor) -> Tensor:
    """Returns the record [groups, 2 C + 1] of all parts of `records` [parts, groups, 2 C + 1]."""
    parts, groups, width = records.shape
    merged = records.new_empty((groups, width))
    with torch.cuda.device_of(records):
        grid = (triton.cdiv(width // 2, MERGED_CHANNELS), groups)
        _merge_kernel[grid](records, merged, parts, width // 2, MERGED_PARTS, MERGED_CHANNELS)
    return merged


@define(
    "normalise(Tensor x, Tensor record, Tensor weight, Tensor bias, float eps, float slope) -> Tensor",
    lambda x, *_: torch.empty_like(_rows(x)),
)
def _normalise(x: Tensor, record: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> Tensor:
    """Returns leaky_relu(batch_norm(x)), in x's dtype."""
    x, groups = _rows(x), len(record)
    rows, channels = _shape(x, groups)
    y, tile = torch.empty_like(x), _tile(channels)
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(channels, tile["CHANNELS"]), groups)
        _normalise_kernel[grid](x, record, weight, bias, y, rows, channels, eps, slope, **tile, num_warps=WARPS)
    return y


@define(
    "gradient_sums(Tensor dy, Tensor x, Tensor record, Tensor weight, Tensor bias, float eps, float slope) "
    "-> (Tensor, Tensor, Tensor)",
    lambda dy, x, record, weight, bias, *_: (
        record.new_empty((len(record), 2, x.shape[1])),
        torch.empty_like(weight),
        torch.empty_like(bias),
    ),
)
def _gradient_sums(
    dy: Tensor, x: Tensor, record: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns [sum(dz), sum(dz xhat)] of this rank's share, [groups, 2, C], and the gradients of weight and bias."""
    dy, x, groups = _rows(dy), _rows(x), len(record)
    rows, channels = _shape(x, groups)
    chunks, chunk = _chunks(rows, channels, groups, PROGRAMS)
    parts, sums = record.new_empty((chunks, groups, 2, channels)), record.new_empty((groups, 2, channels))
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    tile = _tile(channels)
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(channels, tile["CHANNELS"]), chunks, groups)
        _chunk_sums_kernel[grid](
            dy, x, record, weight, bias, parts, rows, channels, chunk, eps, slope, **tile, num_warps=WARPS
        )
        _add_sums_kernel[(triton.cdiv(channels, MERGED_CHANNELS),)](
            parts, sums, dweight, dbias, chunks, groups, channels, MERGED_PARTS, MERGED_CHANNELS
        )
    return sums, dweight, dbias


@define(
    "input_gradient(Tensor dy, Tensor x, Tensor record, Tensor weight, Tensor bias, Tensor sums, float eps, "
    "float slope) -> Tensor",
    lambda dy, x, *_: torch.empty_like(_rows(x)),
)
def _input_gradient(
    dy: Tensor, x: Tensor, record: Tensor, weight: Tensor, bias: Tensor, sums: Tensor, eps: float, slope: float
) -> Tensor:
    """Returns dx, in x's dtype, by the sums of all ranks."""
    dy, x, groups = _rows(dy), _rows(x), len(record)
    rows, channels = _shape(x, groups)
    dx, tile = torch.empty_like(x), _tile(channels)
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(channels, tile["CHANNELS"]), groups)
        _input_gradient_kernel[grid](
            dy, x, record, weight, bias, sums, dx, rows, channels, eps, slope, **tile, num_warps=WARPS
        )
    return dx


@define(
    "track(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!) num_batches, Tensor record, float momentum) "
    "-> ()",
    lambda *_: None,
)
def _track(running_mean: Tensor, running_var: Tensor, num_batches: Tensor, record: Tensor, momentum: float) -> None:
    """Moves a layer's buffers by the records of its groups."""
    channels = running_mean.numel()
    with torch.cuda.device_of(record):
        _track_kernel[(triton.cdiv(channels, MERGED_CHANNELS),)](
            running_mean, running_var, num_batches, record, len(record), channels, momentum, MERGED_CHANNELS
        )


class _NormAndActivation(torch.autograd.Function):
    """The operations above, with a collective between them each way where there are ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        slope: float,
        group: dist.ProcessGroup | None,
        one_shot: OneShot | None,
    ) -> tuple[Tensor, Tensor]:
        ops = torch.ops.gan_dist
        record = ops.batch_statistics(x, groups)
        if group is not None:
            record = ops.merge_records(gathered(record, group, one_shot))
        y = ops.normalise(x, record, weight, bias, eps, slope)
        ctx.save_for_backward(x, record, weight, bias)
        ctx.eps, ctx.slope, ctx.group, ctx.one_shot = eps, slope, group, one_shot
        ctx.mark_non_differentiable(record)
        if not torch.compiler.is_compiling():  # which knows nothing of it, and leaves unused zeros out by itself
            ctx.set_materialize_grads(False)
        return y, record

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ops, dy = torch.ops.gan_dist, grads[0]
        x, record, weight, bias = ctx.saved_tensors
        sums, dweight, dbias = ops.gradient_sums(dy, x, record, weight, bias, ctx.eps, ctx.slope)
        if ctx.group is not None:  # the parameters' gradients stay local: the flat buffer sums them like all others
            sums = summed(sums, ctx.group, ctx.one_shot)
        dx = ops.input_gradient(dy, x, record, weight, bias, sums, ctx.eps, ctx.slope)
        return dx, dweight, dbias, None, None, None, None, None


def norm_and_activation(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches: Tensor,
    *,
    groups: int,
    momentum: float,
    eps: float,
    slope: float,
    group: dist.ProcessGroup | None,
    one_shot: OneShot | None = None,
) -> Tensor:
    """Returns leaky_relu(batch_norm(x), slope) for `x` [groups * n, C, H, W], in its dtype and in channels_last.

    Each of the groups is normalised by its own statistics, merged over the ranks of `group`, and moves the running
    ones, in place. slope 0 is ReLU, and 1 no activation at all. Gradients can be taken once, not of gradients.
    """
    y, record = _NormAndActivation.apply(x, weight, bias, groups, eps, slope, group, one_shot)
    torch.ops.gan_dist.track(running_mean, running_var, num_batches, record, momentum)
    normalised: Tensor = y
    return normalised


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Raises unless the kernels can be built for `device`, and do there what torch's do in float64.

    Raises ArithmeticError where results differ, and whatever Triton raises where it cannot build them.
    """
    source = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(8, 64, 4, 4, generator=source).mul_(2).add_(1) for _ in range(2))
    x, dy = (values.to(device, dtype).contiguous(memory_format=torch.channels_last) for values in (x, dy))
    weight, bias = (torch.randn(64, generator=source).to(device, exact(x)) for _ in range(2))
    mean, var, count = (torch.ones(shape, device=device, dtype=exact(x)) for shape in ((64,), (64,), ()))
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    y = norm_and_activation(
        x, weight, bias, mean, var, count.long(), groups=2, momentum=0.1, eps=1e-5, slope=0.2, group=None
    )
    found = [y, mean, var, *torch.autograd.grad(y, leaves, dy)]
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    x, weight, bias = leaves
    mean, var = torch.ones_like(weight), torch.ones_like(weight)
    parts = [F.batch_norm(part, mean, var, weight, bias, True, 0.1, 1e-5) for part in x.chunk(2)]
    y = F.leaky_relu(torch.cat(parts), 0.2)
    expected = [y, mean, var, *torch.autograd.grad(y, leaves, dy.double())]
    names = ("result", "running mean", "running variance", "gradient", "weight's gradient", "bias' gradient")
    require_close(dict(zip(names, zip(found, expected, strict=True), strict=True)), dtype)
