"""Named weights from files of the user: adopted, enforced, verified, and the command line over all of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from nnunet_sam2.cli.main import main
from nnunet_sam2.errors import InputError
from nnunet_sam2.sam2 import backend as backend_module
from nnunet_sam2.sam2.backend import load_backend
from nnunet_sam2.sam2.config import UNTRAINED, load_config
from nnunet_sam2.sam2.model import build_untrained
from nnunet_sam2.sam2.weights import bundled as weights_bundled
from nnunet_sam2.sam2.weights.adopt import add_weights
from nnunet_sam2.sam2.weights.cache import cache_folder, find_weights, kept_path, read_record, weights_identity
from nnunet_sam2.sam2.weights.registry import EMBEDDED, ENTRIES
from nnunet_sam2.storage import file_hash

SIZE = 64
MEMORY = ("memory_", "maskmem", "no_mem_pos", "mask_downsample", "obj_ptr", "no_obj", "sam_mask_decoder.pred_obj")


@pytest.fixture(scope="module")
def state():
    return build_untrained(load_config(UNTRAINED), SIZE).state_dict()


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NNUNET_SAM2_WEIGHTS_CACHE", str(tmp_path / "kept"))


@pytest.fixture
def own(state, tmp_path):
    """A user's checkpoint, adopted as ``own``."""
    path = tmp_path / "my best.pt"
    torch.save({"model": state, "epoch": 3}, path)
    add_weights("own", path, licence="CC0-1.0")
    return path


def changed(state):
    return {**state, "no_mem_embed": state["no_mem_embed"] + 1}


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_users_file_becomes_a_name_and_is_left_alone(own, state):
    before = file_hash(own)
    record = read_record("own")
    assert (record.config, record.licence, record.source_sha256) == (UNTRAINED, "CC0-1.0", before)
    loaded = load_backend("own", device="cpu", image_size=SIZE)
    assert loaded.spec.name == "own"
    assert "my best.pt" in loaded.spec.origin
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded._model.state_dict().items())
    assert file_hash(own) == before
    # Others may read it where the user's umask lets them, as in a shared folder.
    assert kept_path(record).stat().st_mode == (cache_folder() / "own.json").stat().st_mode


def test_a_name_keeps_its_weights_whatever_file_they_come_in(own, state, tmp_path):
    recorded = read_record("own")
    save_file(state, tmp_path / "same.safetensors")
    assert add_weights("own", tmp_path / "same.safetensors").tensors_sha256 == recorded.tensors_sha256
    save_file(changed(state), tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other\.safetensors .*other weights than were recorded.*--accept-changed"):
        add_weights("own", tmp_path / "other.safetensors")
    assert weights_identity("own") == recorded.tensors_sha256
    accepted = add_weights("own", tmp_path / "other.safetensors", accept_changed=True)
    assert accepted.replaced
    assert accepted.tensors_sha256 != recorded.tensors_sha256


def test_views_half_precision_and_shared_tensors_are_kept_as_they_are(state, tmp_path):
    pool = torch.arange(10.0)
    odd = {**state, "no_mem_embed": state["no_mem_embed"].half()}
    odd["no_mem_pos_enc"] = state["no_mem_pos_enc"].expand(2, -1, -1)[1:]
    bias = "sam_mask_decoder.conv_s0.bias"
    odd[bias] = pool[: state[bias].numel()].expand(state[bias].shape)
    torch.save(odd, tmp_path / "odd.pt")
    add_weights("odd", tmp_path / "odd.pt")
    from safetensors.torch import load_file

    kept = load_file(kept_path(read_record("odd")))
    assert all(torch.equal(kept[key], odd[key]) and kept[key].dtype == odd[key].dtype for key in odd)


def test_the_publishers_hash_is_enforced_for_a_file_that_the_user_brings(state, tmp_path):
    torch.save({"model": state}, tmp_path / "sam2_hiera_tiny.pt")
    with pytest.raises(InputError, match=r"is not the file that Meta names \(155906050 bytes, sha256 65b50056"):
        add_weights("sam2_hiera_tiny", tmp_path / "sam2_hiera_tiny.pt")
    with pytest.raises(InputError, match=r"untrained small SAM 2, but sam2\.1_hiera_large is SAM 2\.1 Hiera-l"):
        add_weights("sam2.1_hiera_large", tmp_path / "sam2_hiera_tiny.pt")
    assert not [path for path in cache_folder().iterdir() if path.suffix != ".lock"]


def test_image_parts_alone_are_no_published_checkpoint_but_may_have_a_name(state, tmp_path, monkeypatch):
    image = {key: tensor for key, tensor in state.items() if not key.startswith(MEMORY)}
    save_file(image, tmp_path / "image.safetensors", {"config": UNTRAINED})
    add_weights("image_only", tmp_path / "image.safetensors")
    assert not load_backend("image_only", device="cpu", image_size=SIZE).spec.has_memory
    entry = ENTRIES["sam2.1_hiera_large"]
    monkeypatch.setitem(ENTRIES, entry.name, type(entry)(**{**vars(entry), "config": UNTRAINED}))
    with pytest.raises(InputError, match="image parts alone"):
        add_weights(entry.name, tmp_path / "image.safetensors")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"<html>Sign in</html>", "web page"),
        (b"PK\x03\x04" + bytes(200), "cut off"),
        (b"", "empty"),
        (None, "no SAM 2 checkpoint at"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_and_leaves_nothing(tmp_path, content, says):
    path = tmp_path / "file.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        add_weights("own", path)
    assert not cache_folder().exists()


@pytest.mark.parametrize("name", ["../own", "own.pt", "", "my own", "-own", EMBEDDED, UNTRAINED, "SAM2_hiera_TINY"])
def test_a_name_that_cannot_be_given_is_refused(own, name):
    with pytest.raises(InputError):
        add_weights(name, own)


@pytest.mark.parametrize("how", ["content", "length", "gone"])
def test_a_kept_file_that_changed_is_not_used_and_verify_says_so(own, capsys, how):
    path = kept_path(read_record("own"))
    assert main(["weights", "verify", "own"]) == 0
    if how == "content":
        damage(path)
    elif how == "length":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        path.unlink()
    with pytest.raises(InputError, match=r"own.*weights add own FILE"):
        load_backend("own", device="cpu")
    assert main(["weights", "verify"]) == (0 if how == "gone" else 1)
    said = {"content": "changed: other content", "length": "changed: .* bytes", "gone": "missing"}[how]
    shown = capsys.readouterr().out
    assert re.search(f"own .*{said}.*weights add own FILE", shown)
    add_weights("own", own)
    assert main(["weights", "verify", "own"]) == 0


@pytest.mark.parametrize("damaged", ["{", '{"format": 1, "name": "own"}', '{"format": 9}', "[]"])
def test_a_damaged_record_is_named(own, damaged):
    (cache_folder() / "own.json").write_text(damaged)
    with pytest.raises(InputError, match=r"own\.json"):
        find_weights("own")


def test_a_record_cannot_lead_out_of_its_folder(own):
    path = cache_folder() / "own.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "file": "../my best.pt"}))
    with pytest.raises(InputError, match="damaged record"):
        find_weights("own")


def test_a_file_works_wherever_a_name_does_and_a_name_goes_first(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_weights(str(own)).path == own
    assert find_weights("my best.pt").name == "my best"
    (tmp_path / "own").write_bytes(own.read_bytes())
    assert find_weights("own").path.parent == cache_folder()
    assert find_weights("./own").path.read_bytes() == own.read_bytes()
    with pytest.raises(InputError, match="is a folder"):
        find_weights(str(tmp_path))


def test_a_name_that_is_known_but_not_there_says_how_to_get_it():
    with pytest.raises(InputError, match=r"weights fetch sam2\.1_hiera_tiny.*copy that folder.*weights add"):
        load_backend("sam2.1_hiera_tiny")
    with pytest.raises(InputError, match=r"did you mean sam2\.1_hiera_tiny\?.*one of the names embedded, untrained"):
        load_backend("facebook/sam2.1-hiera-tiny")


def test_what_the_registry_says_is_what_the_configurations_sam2_and_the_back_end_say():
    from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES

    for entry in ENTRIES.values():
        config = load_config(entry.config)
        assert (entry.mean, entry.std) == (backend_module.IMAGE_MEAN, backend_module.IMAGE_STD)
        if entry.name == entry.config:
            assert (entry.title, entry.native_size) == (config.title, config.native_size)
    metas = {entry.repo: entry.file for entry in ENTRIES.values() if entry.publisher == "Meta"}
    assert metas == {repo: file for repo, (_, file) in HF_MODEL_ID_TO_FILENAMES.items()}


def test_the_embedded_weights_are_a_name(capsys):
    if not ENTRIES[EMBEDDED].bundled_path.is_file():
        with pytest.raises(InputError, match="install nnunet_sam2 anew"):
            load_backend(EMBEDDED)
        return
    loaded = load_backend(EMBEDDED, device="cpu", image_size=SIZE)
    assert (loaded.spec.name, loaded.spec.config, loaded.spec.has_memory) == (EMBEDDED, EMBEDDED, True)
    assert loaded.spec.checkpoint_hash == weights_identity(EMBEDDED) == file_hash(ENTRIES[EMBEDDED].bundled_path)
    assert main(["weights", "verify", EMBEDDED]) == 0
    assert main(["weights", "show", EMBEDDED]) == 0
    assert loaded.spec.origin in capsys.readouterr().out


@pytest.mark.parametrize("same", [True, False])
def test_bundled_weights_are_held_against_the_hash_of_the_installation(tmp_path, monkeypatch, same):
    import base64
    import hashlib

    path = tmp_path / "embedded.safetensors"
    path.write_bytes(b"weights")
    listed = base64.urlsafe_b64encode(hashlib.sha256(b"weights" if same else b"others").digest()).rstrip(b"=").decode()
    monkeypatch.setattr("nnunet_sam2.sam2.weights.registry.BUNDLED_FOLDER", tmp_path)
    monkeypatch.setattr(weights_bundled, "installed_sha256", lambda _: listed)
    assert weights_bundled.verify_bundled(ENTRIES[EMBEDDED]).startswith("OK" if same else "changed")


def test_list_and_help_answer_without_torch_and_without_the_network(own):
    script = (
        "import sys, socket; socket.socket.connect = None\n"
        "from nnunet_sam2.cli.main import main\n"
        "assert main(['weights', 'verify', 'own']) == 0 and main(['weights', 'show', 'own']) == 0\n"
        "assert main(['weights', 'list']) == 0\n"
        "assert not {'torch', 'httpx2', 'httpx'} & set(sys.modules)\n"
        "try: main(['weights', 'fetch', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "there" in rows["own"]
    assert "CC0-1.0" in rows["own"]
    assert "not fetched" in rows["sam2.1_hiera_large"]
    assert "CC-BY-SA-4.0" in rows["medsam2"]


def test_show_and_list_print_json(own, capsys):
    assert main(["weights", "show", "own", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["state"], shown["record"]["config"]) == ("there", UNTRAINED)
    assert main(["weights", "list", "--json"]) == 0
    listed = {facts["name"]: facts for facts in json.loads(capsys.readouterr().out)}
    assert set(ENTRIES) | {"own"} == set(listed)
    assert listed["medsam2"]["native_size"] == 512
    assert listed["sam2.1_hiera_tiny"]["page"] == "https://huggingface.co/facebook/sam2.1-hiera-tiny"


def test_the_command_line_adds_and_refuses(own, capsys):
    assert main(["weights", "add", "mine", str(own), "--origin", "clinic 7"]) == 0
    assert "--sam2 mine" in capsys.readouterr().out
    assert read_record("mine").origin == "clinic 7"
    assert main(["weights", "show", "mien"]) == 2
    assert "did you mean mine?" in capsys.readouterr().err
    assert main(["weights", "fetch", "mine"]) == 2
    assert "weights add mine FILE" in capsys.readouterr().err


def test_real_weights_at_their_real_size_become_a_name(shared_weights):
    file = shared_weights / "sam2_hiera_tiny_image.safetensors"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    record = add_weights("real_image_parts", file)
    assert record.config == "sam2_hiera_tiny"
    with pytest.raises(InputError, match="is not the file that Meta names"):
        add_weights("sam2_hiera_tiny", file)
    loaded = load_backend("real_image_parts", device="cpu", image_size=SIZE)
    assert (loaded.spec.config, loaded.spec.has_memory) == ("sam2_hiera_tiny", False)
