"""Random moves of images: what each may do, and what none may."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from fastconv.train import augment
from fastconv.train.augment import Augmentation, Moves

COUNT, SIZE = 64, 16
GREY = (0.5, 0.5, 0.5)


@pytest.fixture
def images() -> Tensor:
    """uint8 [64, 3, 16, 16], none black."""
    return torch.randint(1, 256, (COUNT, 3, SIZE, SIZE), dtype=torch.uint8)


def draw(augmentation: Augmentation, seed: int = 3, stored: int = SIZE, count: int = COUNT) -> Moves:
    return augment.draw(augmentation, count, stored=stored, seen=SIZE, generator=torch.Generator().manual_seed(seed))


def moved(images: Tensor, augmentation: Augmentation, seed: int = 3) -> Tensor:
    moves = draw(augmentation, seed, images.shape[-1], len(images))
    out = augment.apply(images, moves, augmentation, seen=SIZE, fill=GREY[: images.shape[1]])
    assert out.dtype == torch.float32
    assert out.shape == (*images.shape[:2], SIZE, SIZE)
    assert out.min() >= 0
    assert out.max() <= 1
    return out


@pytest.mark.parametrize(
    "wrong",
    [
        {"turn": 181},
        {"scale": 1},
        {"shift": 1.1},
        {"crop": 0},
        {"crop": 1.5},
        {"jitter": -0.1},
        {"cutout": 2},
        {"turn": math.nan},
        {"padding": "edge"},
    ],
    ids=str,
)
def test_ranges(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"augmentation: {next(iter(wrong))} must be .* got {next(iter(wrong))}="):
        Augmentation(**wrong)


def test_defaults() -> None:
    assert augment.default("digits") == augment.default("mnist:there") == Augmentation(turn=15, scale=0.15, shift=0.1)
    assert augment.default("synthetic") == Augmentation()
    assert augment.default("cifar10").flip
    assert augment.default("folder").crop < 1
    with pytest.raises(ValueError, match=r"defaults for digits, .*, got 'imagenet'"):
        augment.default("imagenet")


def test_none_leaves_every_bit(images: Tensor) -> None:
    assert torch.equal(moved(images, Augmentation()), images / 255)


def test_an_image_stored_larger_is_resized(images: Tensor) -> None:
    ramp = torch.arange(32, dtype=torch.uint8).expand(2, 3, 32, 32)
    assert torch.allclose(moved(ramp, Augmentation()) * 255, 2 * torch.arange(SIZE) + 0.5)


@pytest.mark.parametrize("padding", ["zeros", "reflection"])
@pytest.mark.parametrize("flip", [False, True])
def test_shifts_are_of_whole_pixels(images: Tensor, padding: str, flip: bool) -> None:
    shift = Augmentation(shift=0.25, flip=flip, padding=padding)
    out = (moved(images, shift) * 255).round().to(torch.uint8)
    most, seen = 4, set()
    mode = {"zeros": "constant", "reflection": "symmetric"}[padding]
    numpy = pytest.importorskip("numpy")
    for image, result in zip(images.numpy(), out.numpy(), strict=True):
        found = [
            (mirrored, down, right)
            for mirrored in (False, True)
            for down in range(2 * most + 1)
            for right in range(2 * most + 1)
            for source in [image[:, :, ::-1] if mirrored else image]
            for padded in [numpy.pad(source, ((0, 0), (most, most), (most, most)), mode=mode)]
            if (padded[:, down : down + SIZE, right : right + SIZE] == result).all()
        ]
        assert len(found) == 1, "every image is one of the shifted ones, bit for bit"
        seen.add(found[0])
    for which in range(1, 3):
        assert {move[which] for move in seen} == set(range(2 * most + 1)), "every shift comes, up to the farthest"
    assert {move[0] for move in seen} == ({False, True} if flip else {False})


def test_half_of_the_images_are_flipped(images: Tensor) -> None:
    many = images[:1].expand(1000, -1, -1, -1)
    out = (moved(many, Augmentation(flip=True)) * 255).round().to(torch.uint8)
    flipped = (out == many.flip(3)).flatten(1).all(1)
    assert (flipped | (out == many).flatten(1).all(1)).all()
    assert 400 < flipped.sum() < 600


def test_flips_by_interpolation_are_the_same(images: Tensor) -> None:
    flip = Augmentation(flip=True)
    by_matrix = moved(images, Augmentation(flip=True, turn=1e-9))
    torch.testing.assert_close(by_matrix, moved(images, flip))


def test_turns(images: Tensor) -> None:
    """A point right of the centre comes to lie on its circle, within the angle asked for."""
    turn = draw(Augmentation(turn=30), count=2000)
    assert turn.matrix is not None
    point = turn.matrix[:, :, 0].double()
    angles = torch.rad2deg(torch.atan2(point[:, 1], point[:, 0]))
    assert_close(turn.matrix[:, :, 0].norm(dim=1), torch.ones_like(angles), torch.float32, 2)
    assert -30 <= angles.min() < -28
    assert 28 < angles.max() <= 30
    below = torch.stack((-turn.matrix[:, 1, 0], turn.matrix[:, 0, 0]), 1)
    assert torch.equal(turn.matrix[:, :, 1], below), "and a point below turns with it"
    assert not turn.matrix[:, :, 2].any()


def test_scales() -> None:
    scale = draw(Augmentation(scale=0.2), count=2000)
    assert scale.matrix is not None
    zoom = 1 / scale.matrix[:, 0, 0]
    assert torch.equal(scale.matrix[:, 0, 0], scale.matrix[:, 1, 1])
    assert 0.8 - 1e-6 <= zoom.min() < 0.81
    assert 1.19 < zoom.max() <= 1.2 + 1e-6


@pytest.mark.parametrize("least", [0.35, 0.95])
def test_crops_lie_within(least: float) -> None:
    crop = draw(Augmentation(crop=least), count=4000)
    assert crop.matrix is not None
    width, height = crop.matrix[:, 0, 0], crop.matrix[:, 1, 1]
    area, ratio = width * height, width / height
    assert least - 1e-5 <= area.min() < least + 0.01
    assert 0.99 < area.max() <= 1
    assert 3 / 4 - 1e-5 <= ratio.min() < ratio.max() <= 4 / 3 + 1e-5
    if least < 0.5:
        assert ratio.min() < 0.76
        assert ratio.max() > 1.32
    for extent, centre in ((width, crop.matrix[:, 0, 2]), (height, crop.matrix[:, 1, 2])):
        assert (centre.abs() + extent <= 1 + 1e-6).all()
        assert ((centre.abs() + extent) > 0.95).any(), "up to the edge"


def test_a_crop_shows_nothing_from_outside() -> None:
    white = torch.full((COUNT, 3, 2 * SIZE, 2 * SIZE), 255, dtype=torch.uint8)
    assert torch.allclose(moved(white, Augmentation(crop=0.05)), torch.ones(()))


@pytest.mark.parametrize("move", [{"shift": 0.3, "turn": 1e-9}, {"turn": 45}, {"scale": 0.5}], ids=str)
def test_what_lies_outside(move: dict) -> None:
    white = torch.full((COUNT, 1, SIZE, SIZE), 255, dtype=torch.uint8)
    black = moved(white, Augmentation(**move))
    assert ((black == 0).flatten(1).any(1)).sum() > COUNT / 4
    assert torch.allclose(moved(white, Augmentation(**move, padding="reflection")), torch.ones(()))


def test_jitter_is_bounded(images: Tensor) -> None:
    flat = torch.full((1000, 3, SIZE, SIZE), 100, dtype=torch.uint8)
    out = moved(flat, Augmentation(jitter=0.2))[:, 0, 0, 0] * 255
    assert 80 - 1e-3 <= out.min() < 81, "of one grey only the brightness changes"
    assert 119 < out.max() <= 120 + 1e-3
    same = moved(images, Augmentation(jitter=0.2))
    assert (same - images / 255).abs().flatten(1).amax(1).min() > 0
    factors = draw(Augmentation(jitter=0.2), count=1000).colour
    assert factors is not None
    assert factors.shape == (1000, 3)
    assert (factors - 1).abs().max() <= 0.2 + 1e-6


def test_each_factor_of_jitter(images: Tensor) -> None:
    dim = images // 4 + 90  # so that nothing is cut off at black or white

    def coloured(brightness: float, contrast: float, saturation: float) -> Tensor:
        factors = torch.tensor([[brightness, contrast, saturation]], dtype=torch.float32).expand(COUNT, 3)
        return augment.apply(dim, Moves(colour=factors), Augmentation(), seen=SIZE, fill=GREY)

    source = dim.double() / 255
    grey = (source * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    mean = grey.mean((2, 3), keepdim=True)
    for out, wanted in (
        (coloured(1, 1, 1), source),
        (coloured(1.2, 1, 1), 1.2 * source),
        (coloured(1, 0.5, 1), mean + 0.5 * (source - mean)),
        (coloured(1, 1, 0.5), grey + 0.5 * (source - grey)),
        (coloured(1, 1, 0), grey.expand_as(source)),
    ):
        assert_close(out, wanted, torch.float32, 3 * SIZE**2)


def test_cutout(images: Tensor) -> None:
    """A square of a quarter of the side, its centre anywhere, filled with the mean; all else stays bit for bit."""
    fill = (0.1, 0.2, 0.3)
    cutout = Augmentation(cutout=0.25)
    out = augment.apply(images, draw(cutout), cutout, seen=SIZE, fill=fill)
    changed = (out != images / 255).any(1)
    for erased, image in zip(changed, out, strict=True):
        rows, columns = erased.any(1).nonzero().flatten().tolist(), erased.any(0).nonzero().flatten().tolist()
        assert erased.sum() == len(rows) * len(columns), "a rectangle"
        assert rows == list(range(rows[0], rows[-1] + 1))
        for side, last in ((rows, rows[-1]), (columns, columns[-1])):
            assert len(side) == 4 or (2 <= len(side) < 4 and (side[0] == 0 or last == SIZE - 1))
        for channel, value in enumerate(fill):
            assert (image[channel][erased] == torch.tensor(value)).all()
    assert (changed.flatten(1).sum(1) == 16).any()
    assert (changed.flatten(1).sum(1) < 16).any()


def test_the_whole_image_may_be_erased(images: Tensor) -> None:
    cutout = Augmentation(cutout=1)
    out = augment.apply(images, Moves(hole=torch.zeros(COUNT, 2, dtype=torch.int64)), cutout, seen=SIZE, fill=GREY)
    assert (out == 0.5).all()


EVERYTHING = Augmentation(turn=10, scale=0.1, shift=0.1, crop=0.5, flip=True, jitter=0.3, cutout=0.2)


@pytest.mark.parametrize("augmentation", [EVERYTHING, augment.default("cifar10")], ids=["everything", "cifar10"])
def test_the_seed_decides(images: Tensor, augmentation: Augmentation) -> None:
    first = moved(images, augmentation)
    assert torch.equal(moved(images, augmentation), first)
    other = moved(images, augmentation, seed=4)
    assert (first != other).flatten(1).any(1).sum() > COUNT / 2


@pytest.mark.parametrize("augmentation", [EVERYTHING, augment.default("cifar10")], ids=["everything", "cifar10"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_part_of_a_batch_is_moved_as_in_the_whole(augmentation: Augmentation, channels: int) -> None:
    images = torch.randint(0, 256, (COUNT, channels, SIZE, SIZE), dtype=torch.uint8)
    moves, fill = draw(augmentation), [0.5] * channels
    whole = augment.apply(images, moves, augmentation, seen=SIZE, fill=fill)
    for part in (slice(0, 1), slice(3, None, 4), torch.tensor([9, 2])):
        assert torch.equal(augment.apply(images[part], moves.take(part), augmentation, seen=SIZE, fill=fill), whole[part])


def test_what_else_is_asked_for_moves_nothing_else() -> None:
    flips = [draw(Augmentation(flip=True, jitter=jitter)).flip for jitter in (0, 0.5)]
    assert flips[0] is not None
    assert flips[1] is not None
    assert torch.equal(*flips)


@pytest.mark.gpu
@pytest.mark.parametrize("augmentation", [EVERYTHING, augment.default("cifar10")], ids=["everything", "cifar10"])
def test_on_a_gpu(images: Tensor, augmentation: Augmentation) -> None:
    moves, device = draw(augmentation), torch.device("cuda")
    wanted = augment.apply(images, moves, augmentation, seen=SIZE, fill=GREY)
    out = augment.apply(images.to(device), moves.to(device), augmentation, seen=SIZE, fill=GREY).cpu()
    if moves.matrix is None:
        assert torch.equal(out, wanted)
    else:
        assert torch.allclose(out, wanted, atol=1e-3)
