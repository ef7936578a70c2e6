"""Faults put into the CUDA sources, each behind a switch of the machine: one build serves to try them all."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Fault(NamedTuple):
    """`new` in place of `old` in a file of csrc/cuda, where FAULT stands for 'this fault is switched on'.

    Attributes:
        area: what shows it, 'conv', 'direct' or 'passes'.
        survives: why nothing can show it, for those that are no faults to a CPU.
    """

    name: str
    file: str
    old: str
    new: str
    area: str = "conv"
    survives: str = ""


def _wrong(
    name: str, file: str, old: str, wrong: str, area: str = "conv", context: tuple[str, str] = ("", ""), survives: str = ""
) -> Fault:
    """An expression that has another value."""
    before, after = context
    return Fault(name, file, before + old + after, f"{before}(FAULT ? ({wrong}) : ({old})){after}", area, survives)


def _missing(name: str, file: str, statement: str, area: str = "conv", context: tuple[str, str] = ("", "")) -> Fault:
    """A statement that is not there."""
    before, after = context
    return Fault(name, file, before + statement + after, f"{before}if (!FAULT) {statement}{after}", area)


FAULTS = (
    # ---- order of threads and copies
    _missing("no barrier in the main loop", "tile.h", "block_barrier();", context=("", "  // the stage to read is there")),
    _missing("no barrier behind the main loop", "tile.h", "block_barrier();", context=("", "  // the last copies were")),
    Fault(
        "a warp passes the barrier by",
        "tile.h",
        "block_barrier();  // the stage to read is there",
        "if (!(FAULT && threadIdx.x / 32 == 1)) block_barrier();  // the stage to read is there",
    ),
    Fault(
        "a wait that is too lax",
        "tile.h",
        "copy_async_wait<kStages - 2>();",
        "if (FAULT) copy_async_wait<kStages - 1>(); else copy_async_wait<kStages - 2>();",
    ),
    _missing("no wait", "tile.h", "copy_async_wait<kStages - 2>();"),
    Fault(
        "copies begin before the barrier",
        "tile.h",
        "for (int step = 0; step < steps; ++step) {\n",
        "for (int step = 0; step < steps; ++step) {\n    if (FAULT && step + kStages - 1 < steps) fill(writing);\n",
    ),
    _wrong("the stage to write is one too early", "tile.h", "kStages - 1", "kStages - 2", context=("writing = ", ";")),
    _missing(
        "no commit in the main loop", "tile.h", "copy_async_commit();", context=("fill(writing);\n    ", "\n    const")
    ),
    Fault(
        "half a warp leaves a product out",
        "tile.h",
        "      for (int j = 0; j < S::kAcross; ++j) multiply_fragments",
        "      for (int j = 0; j < S::kAcross; ++j) if (!(FAULT && threadIdx.x % 32 < 16)) multiply_fragments",
    ),
    _missing("no barrier before tiles leave", "conv.h", "block_barrier();", context=("", "\n  constexpr int kLineChunks")),
    _missing("no barrier before pooled tiles leave", "conv.h", "block_barrier();", context=("", "\n  const int64_t pitch")),
    # ---- fragments and where they lie
    _wrong("columns are read from another chunk", "tile.h", "2 * step + lane / 8 % 2", "(2 * step + lane / 8 % 2) ^ 1"),
    _wrong("rows are read from another chunk", "tile.h", "2 * step + lane / 16", "(2 * step + lane / 16) ^ 1"),
    _wrong("no permutation: conflicts in banks", "tile.h", "line / 2 % 4", "0"),
    _wrong("no permutation of transposed operands", "tile.h", "line % 8", "0", context=("sizeof(T) == 2 ? ", " :")),
    _wrong("quadrants of a fragment of rows swapped", "tile.h", "row + lane % 16", "row + lane % 8 + lane / 16 * 8"),
    _wrong(
        "a transposed fragment of rows turned",
        "tile.h",
        "lane % 8 + lane / 16 * 8",
        "lane % 8 + lane / 8 % 2 * 8",
        context=("16 * step + ", ";"),
    ),
    _wrong(
        "a transposed fragment of columns turned",
        "tile.h",
        "lane % 8 + lane / 8 % 2 * 8",
        "lane % 8 + lane / 16 * 8",
        context=("16 * step + ", ";"),
    ),
    _wrong("words of a TF32 fragment swapped", "tile.h", "lane % 4 + i / 2 * 4", "lane % 4 + i % 2 * 4"),
    _wrong("TF32 cut off in place of rounded", "tile.h", "round_to_tf32(a[i][e])", "a[i][e]"),
    _wrong(
        "less shared memory than is used", "conv_kernels.h", "shared_bytes<S, kRoute>()", "shared_bytes<S, kRoute>() - 1024"
    ),
    # ---- what is summed
    _wrong(
        "a tap to the side",
        "operands.h",
        "left[pass] + tap.column * horizontal.step",
        "left[pass] + (tap.column + 1) * horizontal.step",
    ),
    _wrong(
        "padding above is read",
        "operands.h",
        "is_inside(row, p.height)",
        "row < p.height",
        context=("tap.row < vertical.taps && ", " && is_inside(column, p.width)"),
    ),
    _wrong("taps beyond the last", "operands.h", "tap.row < vertical.taps", "true", context=("nullptr && ", " &&")),
    _wrong("weights beyond the last tap", "operands.h", "k < depth", "true", context=("row[i] != nullptr && ", ";")),
    _wrong(
        "weights beyond the last channel",
        "operands.h",
        "channel < p.out_channels",
        "true",
        context=("row[i] = ", " ? static_cast"),
    ),
    _wrong("pixels beyond the last", "conv.h", "index < rows", "true", context=("is_there = ", ";")),
    _wrong(
        "a group reads the first one's channels", "operands.h", "group * p.channels", "0", context=("image_size + ", ";")
    ),
    _wrong("a group has the first one's weights", "operands.h", "group * group_size", "0"),
    _wrong(
        "an input gradient's taps not turned",
        "operands.h",
        "vertical.first_tap + at[i].row * vertical.tap_step",
        "vertical.first_tap + (vertical.taps - 1 - at[i].row) * vertical.tap_step",
    ),
    _wrong(
        "a phase begins a pixel late",
        "operands.h",
        "(phase + pad - first * dilation) / stride",
        "(phase + pad - first * dilation) / stride + 1",
    ),
    _wrong("another stride in one dimension", "operands.h", "at.row * p.stride_h", "at.row * p.stride_w"),
    _wrong("pixels beyond a gradient's last", "operands.h", "at < pixels && channel < channels", "channel < channels"),
    _wrong("an image forgets the next", "walk.h", "step_n + next_image", "step_n"),
    _wrong("splits overlap", "conv_wgrad.h", "split * p.split_steps * S::kDepth", "split * (p.split_steps - 1) * S::kDepth"),
    _wrong("a split left out", "sum_rows.h", "row < p.count", "row < p.count - (p.count > 1)"),
    _wrong("rows beyond the last output channel", "conv_wgrad.h", "row >= p.out_channels", "false"),
    # ---- what becomes of sums
    _wrong("the next channel's bias", "conv.h", "column + e", "(column + e) / 2 * 2", context=("p.out_channels + ", "))")),
    _wrong(
        "another lane's value in a window",
        "conv.h",
        "shuffle_xor(as_bits(best[e]), 4 * bit)",
        "shuffle_xor(as_bits(best[e]), 2 * bit)",
    ),
    _wrong("the later of equal values wins", "conv.h", "is_update(other, best[e])", "other >= best[e]"),
    _wrong("closed windows keep their code", "conv.h", "best[e] <= 0.0f", "false", context=("if (", ") code[e] = 0;")),
    _wrong("ReLU loses NaN", "values.h", "value < 0.0f ? 0.0f : value", "value > 0.0f ? value : 0.0f"),
    _wrong("NaN does not win a window", "values.h", "later > earlier || later != later", "later > earlier"),
    _wrong("columns beyond the last", "conv.h", "e >= count", "false"),
    _wrong("whole chunks where there is none", "conv.h", "p.stores_chunks && p.out_channels % Out::kVector == 0", "true"),
    _wrong("chunks to addresses that allow none", "conv.h", "p.stores_chunks && p.out_channels % kVector == 0", "true"),
    # ---- direct kernels of narrow groups
    _missing("no barrier before weights are read", "conv_direct.cu", "block_barrier();", "direct"),
    _wrong("a weight's neighbour", "conv_direct.cu", "line % p.channels", "(line + 1) % p.channels", "direct"),
    _wrong("a sliding window left a row early", "conv_direct.cu", "j >= r + kHeight", "j >= r + kHeight - 1", "direct"),
    _wrong("pixels of a run beyond the map", "conv_direct.cu", "row + r < runs.height", "true", "direct"),
    _wrong("another channel of the group", "conv_direct.cu", "i / G * G + c", "i / G * G + (c + 1) % G", "direct"),
    _wrong(
        "a part's last column left out",
        "conv_direct_wgrad.cu",
        "column >= p.kernel_w",
        "column >= p.kernel_w - 1",
        "direct",
        context=("row >= p.kernel_h || ", ")"),
    ),
    _wrong(
        "a line of pixels left out",
        "conv_direct_wgrad.cu",
        "line < pixel_lines",
        "line < pixel_lines - 1",
        "direct",
        context=("int line = 0; ", ";"),
    ),
    _missing(
        "no barrier between sums", "conv_direct_wgrad.cu", "block_barrier();", "direct", context=("", "\n    for (int index")
    ),
    # ---- passes
    _missing("no barrier before threads' sums are added", "pixels.h", "block_barrier();", "passes"),
    _wrong("a run's last pixel left out", "pixels.h", "pixel < last", "pixel < last - 1", "passes"),
    _wrong("a thread's sum left out", "pixels.h", "i < lines", "i < lines - 1", "passes"),
    _wrong("vectors at addresses that allow none", "pixels.h", "is_vector && is_aligned(address)", "is_vector", "passes"),
    _wrong(
        "no winner among −∞", "max_pool.cu", "is_first || is_update(x[i], best[i])", "is_update(x[i], best[i])", "passes"
    ),
    _wrong("an odd map's border keeps what it held", "max_pool.cu", "(rows.size + 1) / 2", "rows.size / 2", "passes"),
    _wrong(
        "a window too few above a pixel",
        "windows.h",
        "beyond > 0 ? (beyond + stride - 1) / stride : 0",
        "beyond > 0 ? (beyond + stride - 1) / stride + 1 : 0",
        "passes",
    ),
    _wrong("padding counted where it must not be", "avg_pool.cu", "!count_include_pad", "false", "passes"),
    _wrong("means added without their weights", "batch_norm.cu", "other_count / total", "0.5f", "passes"),
    _wrong("the gradient's mean not taken off", "batch_norm_backward.cu", "grad[i] - grad_mean[i]", "grad[i]", "passes"),
    # ---- what a CPU cannot show
    _wrong(
        "more than 48 KiB of shared memory without asking",
        "launch.h",
        "shared_bytes > kAlwaysAllowed",
        "false",
        survives="kernels are not launched by CUDA here: the emulation does not come to this line",
    ),
    _wrong(
        "registers for too few blocks",
        "tile.h",
        "S::kThreads == 256 ? 2 : 3",
        "1",
        survives="it costs speed, not results: the C++ compiler has registers of its own",
    ),
)


def put_in(folder: Path) -> None:
    """Every fault into the copy of csrc/cuda in `folder`."""
    for number, fault in enumerate(FAULTS, 1):
        path = folder / fault.file
        text = path.read_text()
        # Faults before this one may stand around its text, but not within.
        assert text.count(fault.old) == 1, f"{fault.name}: {text.count(fault.old)} places in {fault.file}"
        path.write_text(text.replace(fault.old, fault.new.replace("FAULT", f"emu::fault({number})")))
