"""Architectures and checkpoints: what is built, what is recognised, what is refused."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from nnunet_sam2.errors import InputError
from nnunet_sam2.sam2.backend import choose_device, load_backend
from nnunet_sam2.sam2.checkpoint import Checkpoint, read_checkpoint, recognise
from nnunet_sam2.sam2.config import UNTRAINED, config_names, load_config
from nnunet_sam2.sam2.model import build_model, build_untrained, load_weights

SIZE = 64


@pytest.fixture(scope="module")
def state():
    model = build_untrained(load_config(UNTRAINED), SIZE)
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def image_parts(state):
    memory = ("memory_", "maskmem", "no_mem_pos", "mask_downsample", "obj_ptr", "no_obj", "sam_mask_decoder.pred_obj")
    return {key: tensor for key, tensor in state.items() if not key.startswith(memory)}


@pytest.fixture
def on_meta(monkeypatch):
    """Build modules without allocating their weights; the trunk reads numbers out of one linspace."""
    linspace = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *args, **options: linspace(*args, **{**options, "device": "cpu"}))
    return torch.device("meta")


def stock_model(file_name, overrides=()):
    """Build a model the stock way, from sam2's own configuration files."""
    from hydra import compose
    from hydra.utils import instantiate

    extra = [
        f"++model.sam_mask_decoder_extra_args.dynamic_multimask_{x}"
        for x in ("via_stability=true", "stability_delta=0.05", "stability_thresh=0.98")
    ]
    config = compose(config_name=file_name, overrides=[*extra, *overrides])
    return instantiate(config.model, _recursive_=True)


@pytest.mark.parametrize(
    ("ours", "stock"),
    [
        ("sam2_hiera_tiny", "configs/sam2/sam2_hiera_t.yaml"),
        ("sam2_hiera_small", "configs/sam2/sam2_hiera_s.yaml"),
        ("sam2_hiera_base_plus", "configs/sam2/sam2_hiera_b+.yaml"),
        ("sam2_hiera_large", "configs/sam2/sam2_hiera_l.yaml"),
        ("sam2.1_hiera_tiny", "configs/sam2.1/sam2.1_hiera_t.yaml"),
        ("sam2.1_hiera_small", "configs/sam2.1/sam2.1_hiera_s.yaml"),
        ("sam2.1_hiera_base_plus", "configs/sam2.1/sam2.1_hiera_b+.yaml"),
        ("sam2.1_hiera_large", "configs/sam2.1/sam2.1_hiera_l.yaml"),
    ],
)
def test_a_bundled_architecture_is_the_one_of_sam2s_own_configuration(on_meta, ours, stock):
    config = load_config(ours)
    with on_meta:
        mine = build_model(config, config.native_size)
        theirs = stock_model(stock, ["++model.binarize_mask_from_pts_for_mem_enc=true"])
    shapes = {key: tuple(tensor.shape) for key, tensor in mine.state_dict().items()}
    assert shapes == {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    plain = (bool, int, float, str, tuple)
    mismatched = {}
    for (name, left), (_, right) in zip(mine.named_modules(), theirs.named_modules(), strict=True):
        for key, value in vars(left).items():
            other = getattr(right, key)
            if key != "training" and isinstance(value, plain) and list_of(value) != list_of(other):
                mismatched[f"{name}.{key}"] = (value, other)
    assert not mismatched


def list_of(value):
    return list(value) if isinstance(value, (tuple, list)) or type(value).__name__ == "ListConfig" else value


def test_the_untrained_model_has_the_same_weights_every_time_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    first, second = (build_untrained(load_config(UNTRAINED), SIZE).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", None])
def test_a_pt_file_is_recognised_by_its_shapes_and_gives_back_its_weights(tmp_path, state, wrapper):
    path = tmp_path / "weights.pt"
    torch.save({wrapper: state} if wrapper else state, path)
    checkpoint = read_checkpoint(path)
    config = recognise(checkpoint)
    assert config.name == UNTRAINED
    model = build_model(config, SIZE)
    assert load_weights(model, checkpoint.state, where=str(path))
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)


@pytest.mark.parametrize("name", [n for n in config_names() if n != UNTRAINED])
def test_every_released_architecture_is_recognised_by_its_shapes(tmp_path, on_meta, name):
    with on_meta:
        shapes = build_model(load_config(name), SIZE).state_dict()
    checkpoint = Checkpoint(path=tmp_path / "x.pt", sha256="", state=dict(shapes))
    assert recognise(checkpoint) is load_config(name)


def test_an_image_checkpoint_makes_a_model_without_memory(tmp_path, state):
    path = tmp_path / "image.safetensors"
    save_file({key: tensor.half() for key, tensor in image_parts(state).items()}, path, {"config": UNTRAINED})
    backend = load_backend(str(path), device="cpu", image_size=SIZE)
    assert not backend.spec.has_memory
    assert not backend._model.pred_obj_scores
    assert backend._model.sam_mask_decoder.pred_obj_scores
    with pytest.raises(InputError, match="no video memory"):
        backend.propagate([], {})


@pytest.mark.parametrize("damage", ["memory", "encoder", "foreign", "shape"])
def test_a_checkpoint_with_a_part_wrong_is_refused_by_the_part(tmp_path, state, damage):
    broken = dict(state)
    if damage == "memory":
        del broken["memory_encoder.out_proj.weight"]
    elif damage == "encoder":
        del broken["image_encoder.neck.convs.0.conv.weight"]
    elif damage == "foreign":
        broken["lora.down.weight"] = torch.zeros(2, 2)
    else:
        broken["no_mem_embed"] = torch.zeros(1, 1, 32)
    path = tmp_path / "broken.safetensors"
    save_file(broken, path)
    name = {
        "memory": "memory_encoder.out_proj.weight",
        "encoder": "image_encoder.neck.convs.0.conv.weight",
        "foreign": "lora.down.weight",
        "shape": "no_mem_embed",
    }[damage]
    with pytest.raises(InputError, match=rf"broken\.safetensors .*{name}"):
        load_backend(str(path), device="cpu", image_size=SIZE)


class Payload:
    def __reduce__(self):
        return (os.mkdir, (str(Payload.target),))


@pytest.mark.parametrize("inside", ["zip", "plain"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, state, inside):
    Payload.target = tmp_path / "was_run"
    path = tmp_path / "evil.pt"
    if inside == "zip":
        torch.save({"model": state, "extra": Payload()}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Payload()}, protocol=2))
    with pytest.raises(InputError, match=r"evil\.pt"):
        read_checkpoint(path)
    assert not Payload.target.exists()


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize("part", [0.5, 0.999])
def test_a_truncated_checkpoint_is_refused_by_name(tmp_path, state, ending, part):
    path = tmp_path / f"cut{ending}"
    if ending == ".pt":
        torch.save({"model": state}, path)
    else:
        save_file(state, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(InputError, match=r"cut\..*damaged: it is cut off"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (b"", "empty"),
        (b'{"error": "Repository not found"}', "JSON text"),
        (b"GIF89a" + bytes(100), "another kind"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_for_what_it_is(tmp_path, content, says):
    path = tmp_path / "sam2_hiera_tiny.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        load_backend(str(path), device="cpu")


def test_another_networks_weights_are_refused(tmp_path):
    path = tmp_path / "resnet.safetensors"
    save_file({"conv1.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(InputError, match=r"resnet\.safetensors holds no SAM 2"):
        read_checkpoint(path)


def test_an_unknown_size_is_refused_with_what_is_known(tmp_path, state):
    changed = {key: value for key, value in state.items() if ".blocks.4." not in key}
    path = tmp_path / "odd.safetensors"
    save_file(changed, path)
    with pytest.raises(InputError, match="sam2_hiera_tiny"):
        load_backend(str(path), device="cpu")


def test_weights_that_are_not_finite_are_refused(tmp_path, state):
    broken = {**state, "no_mem_embed": torch.full_like(state["no_mem_embed"], float("nan"))}
    path = tmp_path / "nan.safetensors"
    save_file(broken, path)
    with pytest.raises(InputError, match="no_mem_embed"):
        read_checkpoint(path)


def test_a_path_that_leads_nowhere_is_refused_with_the_names_that_there_are():
    with pytest.raises(InputError, match=r"no SAM 2 checkpoint at nowhere\.pt.*sam2_hiera_tiny"):
        load_backend("nowhere.pt")


def test_a_header_that_contradicts_the_weights_is_refused_with_what_they_are(tmp_path, state):
    path = tmp_path / "mislabelled.safetensors"
    save_file(state, path, {"config": "sam2.1_hiera_small"})
    with pytest.raises(InputError, match=r"mislabelled.*sam2\.1_hiera_small.*those of untrained"):
        load_backend(str(path), device="cpu")


@pytest.mark.parametrize("options", [{"image_size": 100}, {"device": "tpu"}, {"precision": "int8"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InputError):
        load_backend(UNTRAINED, **options)


def test_a_device_that_is_absent_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(InputError, match="cuda"):
        choose_device("cuda")


class _Code:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_bare_pickle_with_code_is_called_that(protocol, tmp_path):
    path = tmp_path / "code.pt"
    path.write_bytes(pickle.dumps({"model": _Code()}, protocol=protocol))
    with pytest.raises(InputError, match="could run code when loaded"):
        read_checkpoint(path)


STEM = "image_encoder.trunk.patch_embed.proj.weight"
ODD_TENSORS = {
    "beyond the range of 32 bit": lambda t: torch.full_like(t, 1e300, dtype=torch.float64),
    "complex64 values": lambda t: t.to(torch.complex64),
    "bool values": lambda t: t > 0,
    "int64 values": lambda t: t.long(),
    "float8_e4m3fn values": lambda t: t.to(torch.float8_e4m3fn),
    "a quantised tensor": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "a sparse or nested": lambda t: t.to_sparse(),
    r"without values \(meta\)": lambda t: t.to("meta"),
    r"stands for many \(stride 0\)": lambda t: torch.zeros(1).expand(t.shape),
    "a tensor of 0 axes": lambda t: t.sum(),
}


@pytest.mark.parametrize("said", ODD_TENSORS)
@pytest.mark.parametrize("key", [STEM, "no_mem_embed"])
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_is_no_plain_float_is_refused_in_a_line(said, key, state, tmp_path):
    torch.save({**state, key: ODD_TENSORS[said](state[key])}, tmp_path / "odd.pt")
    with pytest.raises(InputError, match=said) as refused:
        read_checkpoint(tmp_path / "odd.pt")
    assert "\n" not in str(refused.value)


def test_a_header_of_ten_thousand_brackets_is_a_damaged_one(tmp_path):
    header = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    (tmp_path / "deep.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match="unreadable header"):
        read_checkpoint(tmp_path / "deep.safetensors")
