"""Named weights from a hub on this machine: fetched, resumed, refused, and used."""

from __future__ import annotations

import hashlib
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_hub import FILE, REPO, FakeHub
from filelock import FileLock
from safetensors.torch import load_file

from nnunet_sam2.errors import InputError, StageError
from nnunet_sam2.frames import Frames
from nnunet_sam2.sam2.backend import load_backend
from nnunet_sam2.sam2.config import UNTRAINED, load_config
from nnunet_sam2.sam2.model import build_untrained
from nnunet_sam2.sam2.weights import fetch as weights_fetch
from nnunet_sam2.sam2.weights import registry as weights_registry
from nnunet_sam2.sam2.weights.cache import cache_folder, find_weights, kept_path, read_record, weights_identity
from nnunet_sam2.sam2.weights.fetch import fetch_weights
from nnunet_sam2.sam2.weights.registry import ENTRIES, WeightsEntry

NAME = "tiny_test"
SIZE = 64
CHUNK = 256 * 1024
"""What the hub's library writes at once; 10 MB in use, more than the whole test file."""


def saved(state, path):
    torch.save({"model": state}, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The untrained model's weights as a .pt of the published form, and the same with one weight changed."""
    state = build_untrained(load_config(UNTRAINED), SIZE).state_dict()
    folder = tmp_path_factory.mktemp("published")
    changed = {**state, "no_mem_embed": state["no_mem_embed"] + 1}
    return SimpleNamespace(
        state=state,
        path=folder / FILE,
        content=saved(state, folder / FILE),
        changed=saved(changed, folder / "changed.pt"),
    )


@pytest.fixture(scope="module")
def images():
    return Frames.from_images(np.random.default_rng(0).uniform(size=(2, 3, SIZE, SIZE)).astype(np.float32))


@pytest.fixture
def hub(published, tmp_path, monkeypatch):
    """A hub that serves `published` under the name ``tiny_test``, with an empty folder for what is fetched."""
    from huggingface_hub import constants, file_download

    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("NNUNET_SAM2_WEIGHTS_CACHE", str(tmp_path / "kept"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr(weights_fetch, "_WAIT_SECONDS", 0.0)
    entry = WeightsEntry(
        name=NAME,
        title="Tiny test",
        config=UNTRAINED,
        publisher="Someone",
        licence="MIT",
        native_size=512,
        repo=REPO,
        file=FILE,
    )
    monkeypatch.setitem(ENTRIES, NAME, entry)
    server = FakeHub(content=published.content)
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    yield server
    server.close()


def weight_files():
    """Return what lies in the folder beside locks: nothing half, nothing left over."""
    return sorted(
        str(path.relative_to(cache_folder()))
        for path in cache_folder().rglob("*")
        if path.is_file() and path.suffix != ".lock"
    )


def kept():
    return kept_path(read_record(NAME))


def test_fetched_weights_are_kept_bit_by_bit_and_embed_as_the_published_file_does(hub, published, images):
    fetched = fetch_weights(NAME)
    assert fetched.done == "fetched"
    assert weight_files() == sorted([f"{NAME}.json", kept().name])
    stored = load_file(kept())
    assert stored.keys() == published.state.keys()
    assert all(torch.equal(stored[key], published.state[key]) for key in stored)
    record = fetched.record
    assert record.published_sha256 == record.source_sha256 == hashlib.sha256(published.content).hexdigest()
    assert (record.licence, record.commit, record.config) == ("MIT", hub.commit, UNTRAINED)

    named = load_backend(NAME, device="cpu", image_size=SIZE, precision="float32")
    from_file = load_backend(str(published.path), device="cpu", image_size=SIZE, precision="float32")
    assert named.spec.name == NAME
    assert "Someone" in named.spec.origin
    assert torch.equal(named.embed(images).top(0), from_file.embed(images).top(0))
    assert named.spec.checkpoint_hash == weights_identity(NAME) == record.tensors_sha256


def test_fetching_again_asks_the_origin_and_downloads_nothing(hub):
    fetch_weights(NAME)
    before = len(hub.downloads)
    assert "unchanged at its origin" in fetch_weights(NAME).done
    assert len(hub.downloads) == before


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub):
    hub.breaks = [9 * CHUNK, 7 * CHUNK]
    fetch_weights(NAME)
    assert [request.asked_range for request in hub.downloads] == [
        None,
        f"bytes={9 * CHUNK}-",
        f"bytes={16 * CHUNK}-",
    ]
    assert hub.bytes_sent == len(hub.content)


def test_a_download_that_was_given_up_goes_on_with_the_next_call(hub):
    hub.breaks = [9 * CHUNK] + 50 * [0]
    with pytest.raises(StageError, match=r"2\.4 of 9\.4 MB are kept, the same command goes on"):
        fetch_weights(NAME)
    assert read_record(NAME) is None
    hub.breaks = []
    fetch_weights(NAME)
    assert hub.downloads[-1].asked_range == f"bytes={9 * CHUNK}-"
    assert hub.bytes_sent == len(hub.content)


def test_a_server_that_cannot_send_the_rest_alone_is_read_from_the_start(hub, published):
    hub.breaks, hub.ignore_range = [9 * CHUNK], True
    assert fetch_weights(NAME).record.source_sha256 == hashlib.sha256(published.content).hexdigest()


def test_a_part_that_belongs_to_another_file_is_not_continued(hub, published):
    hub.breaks = [9 * CHUNK] + 50 * [0]
    with pytest.raises(StageError):
        fetch_weights(NAME)
    hub.breaks, hub.content = [], published.changed
    fetch_weights(NAME)
    assert hub.downloads[-1].asked_range is None
    assert not list((cache_folder() / "partial").iterdir())


def test_the_token_stays_with_the_hub_when_the_file_lies_elsewhere(hub):
    hub.elsewhere, hub.breaks = True, [9 * CHUNK]
    fetch_weights(NAME)
    there = [request for request in hub.downloads if request.path.startswith("/storage/")]
    assert [request.asked_range for request in there] == [None, f"bytes={9 * CHUNK}-"]
    assert {request.authorization for request in there} == {None}
    assert {r.authorization for r in hub.requests if r.path.startswith(f"/{REPO}/")} == {"Bearer hf_secret"}


@pytest.mark.parametrize("stored_by_hash", [True, False])
def test_a_file_that_changed_at_its_origin_is_refused_and_the_old_one_stays(hub, published, stored_by_hash):
    hub.stored_by_hash = stored_by_hash
    old = fetch_weights(NAME).record
    sent = hub.bytes_sent
    hub.content, hub.commit = published.changed, 40 * "b"
    with pytest.raises(InputError, match=rf"{NAME}: .*other weights than were recorded.*stay in use.*--accept-changed"):
        fetch_weights(NAME)
    # Announced by its hash, a changed file is not even downloaded.
    assert (hub.bytes_sent == sent) is stored_by_hash
    assert read_record(NAME) == old
    assert load_backend(NAME, device="cpu", image_size=SIZE).spec.checkpoint_hash == old.tensors_sha256
    assert weight_files() == sorted([f"{NAME}.json", old.file])

    new = fetch_weights(NAME, accept_changed=True).record
    assert new.replaced == (old.source_sha256,)
    assert load_backend(NAME, device="cpu", image_size=SIZE).spec.checkpoint_hash == new.tensors_sha256
    assert weight_files() == sorted([f"{NAME}.json", new.file])


def test_a_lost_file_is_fetched_again_and_still_held_against_its_record(hub, published):
    fetch_weights(NAME)
    kept().unlink()
    with pytest.raises(InputError, match=f"weights fetch {NAME}"):
        load_backend(NAME)
    hub.content = published.changed
    with pytest.raises(InputError, match="other weights than were recorded"):
        fetch_weights(NAME)
    hub.content = published.content
    fetch_weights(NAME)
    assert kept().is_file()


def test_a_file_that_is_not_the_publishers_is_refused_before_it_is_downloaded(hub, monkeypatch):
    named = {**vars(ENTRIES[NAME]), "sha256": 64 * "a", "size": 9}
    monkeypatch.setitem(ENTRIES, NAME, WeightsEntry(**named))
    with pytest.raises(InputError, match=rf"is not the file that Someone names \(9 bytes, sha256 {64 * 'a'}\)"):
        fetch_weights(NAME)
    assert not hub.downloads


def test_a_byte_that_flips_on_the_way_is_noticed_and_nothing_is_kept(hub):
    hub.flip_a_byte = True
    with pytest.raises(StageError, match=r"damaged on its way: sha256 .*fetch again"):
        fetch_weights(NAME)
    assert weight_files() == []


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_web_page_instead_of_the_file_is_named_and_thrown_away(hub, elsewhere):
    hub.page_instead, hub.elsewhere = True, elsewhere
    with pytest.raises(StageError, match=r"did not send tiny\.pt but a web page"):
        fetch_weights(NAME)
    assert weight_files() == []


def test_a_server_that_is_no_hub_is_named(hub):
    hub.hub_headers = False
    with pytest.raises(StageError, match="not as the Hugging Face hub does"):
        fetch_weights(NAME)


def test_a_file_shorter_than_announced_is_refused_with_both_sizes(hub):
    hub.announce_more = 1000
    size = len(hub.content)
    with pytest.raises(StageError, match=rf"sent {size} bytes of tiny\.pt, announced were {size + 1000}"):
        fetch_weights(NAME)
    assert read_record(NAME) is None


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ((404, "EntryNotFound"), r"has no file tiny\.pt .*weights add tiny_test FILE"),
        ((404, "RepoNotFound"), "has no repository someone/tiny-sam2"),
        ((401, ""), "HF_TOKEN"),
        ((403, "GatedRepo"), r"gated: accept its terms at https://huggingface\.co/someone/tiny-sam2"),
        ((403, ""), "answered 403 .*HF_TOKEN"),
        ((503, ""), "answered 503"),
    ],
)
def test_a_refusal_of_the_hub_is_told_with_the_way_out(hub, error, says):
    hub.error = error
    with pytest.raises(StageError, match=says):
        fetch_weights(NAME)


def test_weights_that_are_there_serve_when_the_origin_does_not_answer(hub):
    fetch_weights(NAME)
    hub.error = (503, "")
    assert "answered 503" in fetch_weights(NAME).done
    hub.close()
    assert "is there" in fetch_weights(NAME).done
    load_backend(NAME, device="cpu", image_size=SIZE)


def test_the_offline_variable_is_respected_with_the_ways_out(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE forbids.*copy the folder .*kept.*weights add tiny_test FILE"):
        fetch_weights(NAME)
    assert hub.requests == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    fetch_weights(NAME)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(hub.requests)
    assert "is there" in fetch_weights(NAME).done
    load_backend(NAME, device="cpu", image_size=SIZE)
    assert len(hub.requests) == asked


@pytest.mark.parametrize("offline", [False, True])
def test_what_the_hubs_own_cache_holds_is_not_downloaded_again(hub, tmp_path, monkeypatch, offline):
    from huggingface_hub import hf_hub_download

    hf_hub_download(REPO, FILE, endpoint=hub.endpoint, cache_dir=tmp_path / "hub_cache")
    sent = hub.bytes_sent
    if offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch_weights(NAME).done == "was in the hub's cache"
    assert hub.bytes_sent == sent
    assert read_record(NAME).commit == hub.commit


class Payload:
    target = ""

    def __reduce__(self):
        return (os.mkdir, (Payload.target,))


def test_a_pickle_with_code_is_refused_by_its_address_and_not_run(hub, published, tmp_path):
    Payload.target = str(tmp_path / "was_run")
    torch.save({"model": published.state, "extra": Payload()}, tmp_path / "evil.pt")
    hub.content = (tmp_path / "evil.pt").read_bytes()
    with pytest.raises(InputError, match=rf"{REPO}/resolve/.*Python objects beside tensors"):
        fetch_weights(NAME)
    assert not (tmp_path / "was_run").exists()
    assert weight_files() == []


def test_another_architecture_than_the_names_is_refused(hub, monkeypatch):
    monkeypatch.setitem(ENTRIES, NAME, WeightsEntry(**{**vars(ENTRIES[NAME]), "config": "sam2.1_hiera_tiny"}))
    with pytest.raises(InputError, match=r"weights of untrained small SAM 2, but tiny_test is SAM 2\.1 Hiera-tiny"):
        fetch_weights(NAME)
    assert weight_files() == []


@pytest.mark.parametrize("how", ["interrupt", "full disk", "killed"])
def test_a_conversion_that_is_interrupted_leaves_nothing_half(hub, monkeypatch, how):
    import safetensors.torch

    save = safetensors.torch.save_file

    def broken(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt if how == "interrupt" else OSError(28, "No space left on device", str(path))

    if how != "killed":
        monkeypatch.setattr(safetensors.torch, "save_file", broken)
        with pytest.raises(KeyboardInterrupt if how == "interrupt" else StageError, match=r"make room|"):
            fetch_weights(NAME)
        assert read_record(NAME) is None
        assert not [name for name in weight_files() if "partial" not in name]
        monkeypatch.setattr(safetensors.torch, "save_file", save)
    else:
        cache_folder().mkdir(parents=True)
        leftover = cache_folder() / f".nnunet_sam2_tmp_0123456789ab_{NAME}-0123456789ab.safetensors"
        leftover.write_bytes(b"half")
    fetch_weights(NAME)
    assert weight_files() == sorted([f"{NAME}.json", kept().name])


def test_what_is_kept_has_the_same_bytes_on_every_machine(hub, tmp_path, monkeypatch):
    first = fetch_weights(NAME).record
    monkeypatch.setenv("NNUNET_SAM2_WEIGHTS_CACHE", str(tmp_path / "another"))
    second = fetch_weights(NAME).record
    assert (first.sha256, first.file, first.tensors_sha256) == (second.sha256, second.file, second.tensors_sha256)


def test_a_copied_folder_serves_on_a_machine_without_internet(hub, tmp_path, monkeypatch):
    fetch_weights(NAME)
    shutil.copytree(cache_folder(), tmp_path / "hospital")
    hub.close()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NNUNET_SAM2_WEIGHTS_CACHE", str(tmp_path / "hospital"))
    assert find_weights(NAME).path.parent == tmp_path / "hospital"
    load_backend(NAME, device="cpu", image_size=SIZE)


def test_two_processes_do_not_fetch_the_same_name_at_once(hub):
    cache_folder().mkdir(parents=True)
    with FileLock(cache_folder() / f".{NAME}.lock"), pytest.raises(StageError, match="another process is fetching"):
        fetch_weights(NAME)


def test_a_disk_without_room_is_named_before_the_download(hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000_000))
    with pytest.raises(StageError, match="has room for 10 MB, 18 MB are needed"):
        fetch_weights(NAME)
    assert not hub.downloads


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (UNTRAINED, "comes with the package"),
        ("sam2.1_hiera_tni", r"did you mean sam2\.1_hiera_tiny\?"),
        ("facebook/sam2.1-hiera-large", r"did you mean sam2\.1_hiera_large\?"),
        ("MedSAM2_latest.pt", r"did you mean medsam2\?"),
        ("resnet", "There are: embedded, untrained"),
    ],
)
def test_a_name_that_cannot_be_fetched_is_refused_with_the_names_that_can(hub, name, says):
    with pytest.raises(InputError, match=says):
        fetch_weights(name)
    assert hub.requests == []


def test_the_hashes_that_are_named_are_whole_and_only_metas():
    named = {name: entry.sha256 for name, entry in weights_registry.ENTRIES.items() if entry.sha256}
    assert all(len(sha256) == 64 and set(sha256) <= set("0123456789abcdef") for sha256 in named.values())
    assert {ENTRIES[name].publisher for name in named} == {"Meta"}
    assert len(set(named.values())) == len(named)
