import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quadric import tiles as tiles_module
from quadric.tiles import Tiles, combine, project, remix_, slabs

few = settings(deadline=None, max_examples=25)
cuts = st.one_of(
    st.builds(Tiles, st.lists(st.integers(1, 40), min_size=1, max_size=6), st.none()),
    st.builds(Tiles, st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 17)),
    st.builds(Tiles.runs, st.integers(1, 60), st.one_of(st.none(), st.integers(1, 70))),
)


def block_of_column(tiles):
    return torch.repeat_interleave(torch.arange(len(tiles.sizes)), torch.tensor(tiles.sizes))


@few
@given(cuts)
def test_padding_and_cutting_are_undone(tiles):
    v = torch.arange(3.0 * tiles.dim).view(3, tiles.dim) + 1
    padded = tiles.pad(v)
    assert padded.shape == (3, tiles.length)
    assert tiles.length == tiles.dim + sum(tiles.pads)
    assert torch.equal(tiles.unpad(padded), v)
    assert torch.equal(padded.sum(), v.sum())
    pieces = tiles.cut(padded)
    assert pieces.shape == (tiles.count, 3, tiles.width)
    assert pieces.data_ptr() == padded.data_ptr()
    assert torch.equal(tiles.join(pieces), padded)


@few
@given(cuts)
def test_no_tile_crosses_the_border_of_a_block(tiles):
    blocks = tiles.cut(tiles.pad(block_of_column(tiles).double() + 1))
    for tile in blocks:
        assert len(tile[tile > 0].unique()) == 1


@few
@given(cuts)
def test_totals_and_spreads(tiles):
    values = torch.randn(tiles.count, 2, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([part.double().sum(0) for part in values.split(tiles.per_block)])
    torch.testing.assert_close(tiles.total(values), expected)
    handed = tiles.spread(expected)
    assert torch.equal(handed, expected.repeat_interleave(torch.tensor(tiles.per_block), 0))


@few
@given(cuts, st.data())
def test_columns_are_read_and_written_where_they_are(tiles, data):
    start = data.draw(st.integers(0, tiles.length - 1))
    stop = data.draw(st.integers(start + 1, tiles.length))
    rows = torch.arange(2.0 * tiles.length).view(2, -1)
    held = tiles.cut(rows).clone()
    assert torch.equal(tiles.read(held, start, stop), rows[:, start:stop])
    tiles.write(held, start, stop, -rows[:, start:stop])
    expected = rows.clone()
    expected[:, start:stop] *= -1
    assert torch.equal(tiles.join(held), expected)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_products_slab_by_slab(stored, monkeypatch):
    """Also where the tiles do not fit into one slab, and the last slab is shorter."""
    original = tiles_module.slab_tiles
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 3, 5, generator=generator).to(stored)
    v, c = torch.randn(7, 2, 5, generator=generator), torch.randn(7, 2, 3, generator=generator)
    expected = rows.float()
    for step in (1, 3, 7, 100):
        monkeypatch.setattr(tiles_module, "slab_tiles", lambda rows, step=step: step)
        torch.testing.assert_close(project(rows, v), v @ expected.mT)
        torch.testing.assert_close(combine(c, rows), c @ expected)
        assert torch.equal(torch.cat([slab.clone() for slab in slabs(rows, torch.float32)]), expected)
        mixed = expected.clone()
        remix_(mixed, c)
        torch.testing.assert_close(mixed[:, :2], c @ expected)
        assert torch.equal(mixed[:, 2:], expected[:, 2:])
    assert original(torch.empty(5, 128, 8192)) == 2
    assert original(torch.empty(1, 0, 8)) >= 1


def test_width_is_that_of_the_longest_block_where_it_fits_and_pads_little():
    assert Tiles([100]).width == 100
    assert Tiles([1_000_000]).width == 8192
    assert Tiles([64] * 200).width == 64
    mixed = Tiles([3 * 3 * 64 * 64, 64, 64, 10])
    assert mixed.length <= 1.05 * mixed.dim


@pytest.mark.parametrize("sizes", [[1], [1] * 200, [1, 1000], [8192, 1], [8193], [5, 0, 3]])
def test_padding_is_bounded(sizes):
    tiles = Tiles(sizes)
    assert tiles.length <= max(1.05 * tiles.dim, 16 * len(sizes) + tiles.dim)


def test_block_size_below_one_is_refused():
    with pytest.raises(ValueError, match=r"at least 1, got 0: .+"):
        Tiles.runs(5, 0)
    assert Tiles.runs(5, 2).sizes == (2, 2, 1)
    assert Tiles.runs(6, 2).sizes == (2, 2, 2)
    assert Tiles.runs(5, 9).sizes == (5,)


def test_memory_kept_for_slabs_is_usable_after_inference_mode():
    rows = torch.randn(2, 3, 70001)
    with torch.inference_mode():
        inside = [slab.clone() for slab in slabs(rows, torch.float16)]
    outside = [slab.clone() for slab in slabs(rows, torch.float16)]
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    with torch.device("meta"):
        assert next(slabs(torch.randn(2, 3, 80001, device="cpu"), torch.float16)).device.type == "cpu"
