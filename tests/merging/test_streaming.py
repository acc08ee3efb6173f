"""A plan that is written file by file: the same bytes as at once, and no byte of the base given up too early."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mapconv.merging.plan import CopyJob, plan_merge
from mapconv.merging.shards import Holding, shards_of
from mapconv.merging.streaming import room_for, stream_shards
from mapconv.merging.writer import write_weights
from mapconv.placement.adapters import place_adapters
from mapconv.placement.kept_codes import keep_codes
from tests.hub.conftest import files_of
from tests.models import save_adapter
from tests.quantized import quantize, save_plain


@pytest.mark.parametrize(("storage", "size"), [(None, None), (None, 9_000), ("ct-int4", 5_000)])
def test_files_one_by_one_are_the_files_at_once(storage, size, tmp_path):
    """In ct-int4 with small files, codes and their scales lie in two: such a weight is merged for each of them."""
    base = save_plain(tmp_path / "plain")
    adapter = save_adapter(base, tmp_path / "lora", target_modules=["q_proj", "down_proj"], use_dora=True)
    if storage is not None:
        base = quantize(base, storage, tmp_path / "quantized")
    placed = place_adapters([adapter], base)
    if storage is not None:
        placed = keep_codes(placed, rewrite=True)
    plan = plan_merge(placed, max_shard_size=size)
    shards = shards_of(plan)
    jobs = Counter(id(job) for shard in shards for job in shard.jobs)
    assert (max(jobs.values()) > 1) is (storage is not None)
    for folder in ("once", "apart"):
        (tmp_path / folder).mkdir()
    once = write_weights(plan, tmp_path / "once", quiet=True)
    found, merged = {}, {}
    with closing(stream_shards(plan, shards, tmp_path / "apart", recompute=False, quiet=True)) as stream:
        for shard, path, items in stream:
            assert [file.name for file in (tmp_path / "apart").iterdir()] == [shard.file.name]
            found[shard.file.name] = path.read_bytes()
            assert merged.keys().isdisjoint(item.tensor for item in items)
            merged |= {item.tensor: item for item in items}
    assert found == files_of(tmp_path / "once")
    assert merged == {item.tensor: item for item in once}
    assert room_for(shards, whole_base=True) == max(len(data) for data in found.values())
    assert not any((tmp_path / "apart").iterdir())


spans = st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 40), st.integers(0, 15))


@given(st.lists(spans, min_size=1))
def test_a_byte_is_free_when_the_last_job_that_needs_it_is_done(spans):
    jobs = [CopyJob(Path(file), start, Path("out"), 0, count) for file, start, count in spans]
    bytes_of = [{(job.source, at) for at in range(job.source_offset, job.source_offset + job.nbytes)} for job in jobs]
    holding, freed = Holding(jobs), set()
    for number, job in enumerate(jobs):
        free = {(file, at) for file, start, stop in holding.done(job) for at in range(start, stop)}
        needed = set().union(*bytes_of[number + 1 :])
        assert free == bytes_of[number] - needed
        freed |= free
    assert freed == set().union(*bytes_of)
