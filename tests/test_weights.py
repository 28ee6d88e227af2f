"""Backbone weights and checkpoints: what is read, what is refused, and that code in a file never runs."""
import hashlib
import pickle
import threading
import zipfile
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torchvision
from efficientnet_pytorch import EfficientNet
from torch import nn

from models import APR_NAMES, backbones, build_pose_encoder, get_model, load_apr
from models.checkpoints import (
    fill,
    fingerprint,
    read_about,
    read_checkpoint,
    read_module_tensors,
    read_weights,
    save_weights,
)
from models.pose_encoder import PoseEncoder
from models.pose_refiner import PoseRefiner
from util.errors import UserError

BACKBONES = {
    "efficientnet": lambda: EfficientNet.from_name("efficientnet-b0"),
    "resnet50": torchvision.models.resnet50,
    "mobilenet": torchvision.models.mobilenet_v2,
}
SMALL = {"hidden_dim": 16, "num_scenes": 3, "dim_feedforward": 8, "nhead": 2,
         **{f"num_{branch}_{part}_layers": 2 for branch in ("t", "rot") for part in ("encoder", "decoder")}}


def posenet(backbone_type, path="none"):
    return get_model("posenet", path, {"backbone_type": backbone_type, "hidden_dim": 8})


def assert_backbone_equals(model, network):
    """Assert that the model's backbone has every tensor of the network but the classifier's, in order."""
    ours, theirs = ([tensor for key, tensor in module.state_dict().items()
                     if not key.startswith(backbones.CLASSIFIERS)] for module in (model.backbone, network))
    assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("backbone_type", BACKBONES)
def test_a_library_state_dict_fills_the_backbone(tmp_path, backbone_type):
    network = BACKBONES[backbone_type]()
    torch.save(network.state_dict(), tmp_path / "backbone.pth")
    assert_backbone_equals(posenet(backbone_type, tmp_path / "backbone.pth"), network)


@pytest.mark.parametrize("zip_format", [True, False])
def test_the_published_pickled_module_is_read_in_both_formats(tmp_path, zip_format):
    network = BACKBONES["efficientnet"]()
    torch.save(network, tmp_path / "efficient-net-b0.pth", _use_new_zipfile_serialization=zip_format)
    model = posenet("efficientnet", tmp_path / "efficient-net-b0.pth")
    assert all(map(torch.equal, model.backbone._blocks.state_dict().values(), network._blocks.state_dict().values()))
    body = get_model("ems-transposenet", tmp_path / "efficient-net-b0.pth", SMALL).backbone[0].body
    assert torch.equal(body._conv_stem.weight, network._conv_stem.weight)


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("zip_format", [True, False])
@pytest.mark.parametrize("inside", [False, True])
def test_code_in_a_file_never_runs(tmp_path, zip_format, inside):
    marker = tmp_path / "code-ran"
    if inside:  # within an otherwise genuine module, which is read further
        loaded = BACKBONES["efficientnet"]()
        loaded._conv_stem.extra = Hostile(marker)
    else:
        loaded = Hostile(marker)
    torch.save(loaded, tmp_path / "hostile.pth", _use_new_zipfile_serialization=zip_format)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Hostile(marker)))
    for read in (read_weights, read_module_tensors):
        for name in ("hostile.pth", "plain.pth"):
            with pytest.raises(UserError, match=name):
                read(tmp_path / name)
    assert not marker.exists()


MARK = "from-torchscript"  # a file that the TorchScript's code makes in the working directory


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    @torch.jit.export
    def __getstate__(self):
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        self.weight, self.training = state
        # Printed, since the compiler leaves unused values out.
        print(torch.from_file("from-torchscript", True, 4, dtype=torch.uint8).fill_(65))

    def forward(self, x):
        return x


def test_torchscript_disguised_as_the_format_before_1_6_never_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = b"x" * 50
    torch.jit.save(torch.jit.script(Scripted()), "script.pt", _extra_files={"persistent_load": record})
    with zipfile.ZipFile("script.pt") as script, zipfile.ZipFile("hostile.pth", "w") as hostile:
        for member in script.infolist():
            hostile.writestr(member.filename, script.read(member))
    content = bytearray(Path("hostile.pth").read_bytes())
    # The reader names this record in its error, as the pickles of the legacy format name their function.
    content[content.find(record)] ^= 1
    content[14:24] = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")
    Path("hostile.pth").write_bytes(content)
    Path(MARK).unlink(missing_ok=True)
    for read in (read_weights, read_module_tensors):
        with pytest.raises(UserError, match="hostile.pth: not a readable weights file"):
            read("hostile.pth")
    assert not Path(MARK).exists()
    torch.jit.load("script.pt")
    assert Path(MARK).exists()


def test_weights_of_another_backbone_are_refused(tmp_path):
    torch.save(BACKBONES["mobilenet"]().state_dict(), tmp_path / "mobilenet.pth")
    with pytest.raises(UserError, match="mobilenet.pth: not the weights of a resnet50 backbone: it lacks"):
        posenet("resnet50", tmp_path / "mobilenet.pth")


def wrapped(weights, kind):
    """Return a state dict as other trainings save it."""
    prefix = {"module": "module.", "compiled": "_orig_mod.", "both": "module._orig_mod.",
              "averaged": "module."}.get(kind, "")
    weights = {f"{prefix}{key}": value for key, value in weights.items()}
    if kind == "averaged":
        return {"n_averaged": torch.tensor(7), **weights}
    if kind == "inner":  # a compiled or parallel part of the model
        return {key.replace("backbone.", "backbone._orig_mod.").replace("encoder.", "encoder.module."): value
                for key, value in weights.items()}
    if kind in ("state_dict", "model_state_dict", "model"):
        return {"epoch": 3, "optimizer": {"state": {}}, kind: weights}
    return {"model": {"state_dict": wrapped(weights, "module")}} if kind == "deep" else weights


@pytest.mark.parametrize("kind", ["module", "compiled", "both", "averaged", "inner", "state_dict", "model_state_dict",
                                  "model", "deep"])
def test_wrapped_checkpoints_are_loaded_and_reported(tmp_path, caplog, kind):
    caplog.set_level("INFO")
    torch.manual_seed(0)
    apr, pae, refiner = posenet("mobilenet"), PoseEncoder(8), PoseRefiner(8)
    network = BACKBONES["mobilenet"]()
    for name, module in (("apr", apr), ("pae", pae), ("refiner", refiner), ("backbone", network)):
        torch.save(wrapped(module.state_dict(), kind), tmp_path / f"{name}.pth")
    config = {"backbone_type": "mobilenet", "hidden_dim": 8}
    other = PoseRefiner(8)
    fill(tmp_path / "refiner.pth", other, read_checkpoint(tmp_path / "refiner.pth", "refiner", config))
    loaded = {"apr": load_apr("posenet", "none", dict(config), tmp_path / "apr.pth"), "refiner": other,
              "pae": build_pose_encoder("posenet", config, tmp_path / "pae.pth")}
    for module, name in ((apr, "apr"), (pae, "pae"), (refiner, "refiner")):
        assert all(map(torch.equal, module.state_dict().values(), loaded[name].state_dict().values()))
    assert loaded["pae"].takes_unit_quaternions
    assert_backbone_equals(posenet("mobilenet", tmp_path / "backbone.pth"), network)
    reports = [message for message in caplog.messages if "the weights are" in message]
    assert len(reports) == (2 if kind == "inner" else 4)  # the refiner and torchvision's backbone have no such parts
    if kind == "deep":
        assert ("refiner.pth: the weights are its entry 'model', its entry 'state_dict', without module. in its names"
                in reports[0])


def test_a_wrapped_pae_keeps_the_version_in_its_metadata(tmp_path):
    published = PoseEncoder(8)
    published._version = 1
    module = nn.Module()
    module.module = published
    state = module.state_dict()
    torch.save(state, tmp_path / "pae.pth")
    assert not build_pose_encoder("posenet", {"hidden_dim": 8}, tmp_path / "pae.pth").takes_unit_quaternions
    torch.save({"module.x_reg.bias": torch.zeros(3), "x_reg.bias": torch.zeros(3)}, tmp_path / "twice.pth")
    problem = "twice.pth: holds two tensors of the same name, with and without module. before it"
    with pytest.raises(UserError, match=problem):
        read_weights(tmp_path / "twice.pth")


@pytest.mark.parametrize("backbone_type, key", [
    ("mobilenet", "features.3.conv.0.0.weight"), ("resnet50", "layer1.0.bn1.running_var"),
    ("efficientnet", "_bn0.bias")])
def test_a_backbone_that_is_not_finite_is_named_with_its_tensor(tmp_path, backbone_type, key):
    weights = BACKBONES[backbone_type]().state_dict()
    weights[key].view(-1)[0] = float("inf" if backbone_type == "resnet50" else "nan")
    torch.save(weights, tmp_path / "backbone.pth")
    with pytest.raises(UserError, match=f"backbone.pth: {key} is not finite"):
        posenet(backbone_type, tmp_path / "backbone.pth")


@pytest.mark.parametrize("spoil, problem", [
    (lambda tensor: tensor.to_sparse(), "q_reg.weight is sparse"),
    (lambda tensor: (100 * tensor).int(), "kind int32, but a network's weights are floats"),
    (lambda tensor: tensor.to(torch.complex64), "kind complex64")])
def test_numbers_of_other_kinds_are_refused(tmp_path, spoil, problem):
    weights = posenet("mobilenet").state_dict()
    weights["q_reg.weight"] = spoil(weights["q_reg.weight"])
    torch.save(weights, tmp_path / "apr.pth")
    with pytest.raises(UserError, match=problem):
        load_apr("posenet", "none", {"backbone_type": "mobilenet", "hidden_dim": 8}, tmp_path / "apr.pth")


def test_a_fingerprint_depends_on_the_weights_alone(tmp_path):
    apr = posenet("mobilenet")
    torch.save({f"module.{key}": value for key, value in apr.state_dict().items()}, tmp_path / "apr.pth")
    same = load_apr("posenet", "none", {"backbone_type": "mobilenet", "hidden_dim": 8}, tmp_path / "apr.pth")
    assert torch.equal(fingerprint(apr), fingerprint(same))
    with torch.no_grad():
        same.q_reg.bias[3] += 1e-6
    assert not torch.equal(fingerprint(apr), fingerprint(same))


@pytest.fixture
def server(tmp_path):
    """Serve a folder locally; yields the folder and its URL."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.mark.parametrize("backbone_type", BACKBONES)
def test_imagenet_weights_are_downloaded_and_verified(tmp_path, monkeypatch, server, backbone_type):
    folder, url = server
    network = BACKBONES[backbone_type]()
    torch.save(network.state_dict(), folder / "weights.pth")
    digest = hashlib.sha256((folder / "weights.pth").read_bytes()).hexdigest()[:8]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    # A file whose hash is not that in its name, as after a damaged download, then the genuine one.
    (folder / "backbone-00000000.pth").write_bytes((folder / "weights.pth").read_bytes())
    (folder / "weights.pth").rename(folder / f"backbone-{digest}.pth")
    for name, genuine in (("backbone-00000000.pth", False), (f"backbone-{digest}.pth", True),
                          ("gone-00000000.pth", False)):
        backbone = replace(backbones.BACKBONES[backbone_type], url=f"{url}/{name}")
        monkeypatch.setitem(backbones.BACKBONES, backbone_type, backbone)
        if genuine:
            assert_backbone_equals(posenet(backbone_type, "imagenet"), network)
        else:
            problem = f"imagenet: {url}/{name} could not be downloaded, or its copy under .* is damaged"
            with pytest.raises(UserError, match=problem):
                posenet(backbone_type, "imagenet")


def config_for(model_name, **changes):
    return {**SMALL, "backbone_type": "mobilenet", **changes} if model_name == "posenet" else {**SMALL, **changes}


@pytest.mark.parametrize("model_name", APR_NAMES)
def test_a_saved_checkpoint_loads_again(tmp_path, model_name):
    model = load_apr(model_name, "none", config_for(model_name)).eval()
    save_weights(tmp_path / "apr.pth", model.state_dict(), {"scene_names": ["a", "b", "c"]})
    again = load_apr(model_name, "none", config_for(model_name), tmp_path / "apr.pth").eval()
    img = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(model({"img": img, "scene": None})["pose"], again({"img": img, "scene": None})["pose"])
    assert read_about(tmp_path / "apr.pth") == {"scene_names": ["a", "b", "c"]}


@pytest.mark.parametrize("model_name, changes, problem", [
    ("posenet", {"backbone_type": "resnet50"}, "backbone_type 'mobilenet', but the config says 'resnet50'"),
    ("posenet", {"hidden_dim": 8}, "hidden_dim 16, but the config says 8"),
    ("ems-transposenet", {"num_scenes": 4}, "num_scenes 3, but the config says 4"),
    ("ems-transposenet", {"dim_feedforward": 9}, "dim_feedforward 8, but the config says 9"),
    ("ms-transposenet", {"num_scenes": 7}, "num_scenes 3, but the config says 7"),
])
def test_what_tensors_determine_is_checked_against_the_config(tmp_path, model_name, changes, problem):
    torch.save(get_model(model_name, "none", config_for(model_name)).state_dict(), tmp_path / "apr.pth")
    with pytest.raises(UserError, match=f"apr.pth: .*{problem}"):
        load_apr(model_name, "none", config_for(model_name, **changes), tmp_path / "apr.pth")


def test_the_checkpoints_numbers_of_layers_replace_the_configs(tmp_path, caplog):
    caplog.set_level("INFO")
    saved = get_model("ems-transposenet", "none", {**SMALL, "num_rot_encoder_layers": 1})
    torch.save(saved.state_dict(), tmp_path / "apr.pth")
    apr = load_apr("ems-transposenet", "none", dict(SMALL), tmp_path / "apr.pth")
    assert len(apr.transformer_rot.encoder.layers) == 1 and len(apr.transformer_t.encoder.layers) == 2
    assert [r.getMessage() for r in caplog.records if "num_rot_encoder_layers 2 -> 1" in r.getMessage()]


def test_attention_has_8_heads_unless_nhead_differs():
    config = {**SMALL, "nheads": 4}
    del config["nhead"]
    assert get_model("ems-transposenet", "none", config).transformer_t.encoder.layers[0].self_attn.num_heads == 8
    assert get_model("ems-transposenet", "none", SMALL).transformer_t.encoder.layers[0].self_attn.num_heads == 2


@pytest.mark.parametrize("model_name, built, config, problem", [
    ("posenet", {"shallow_mlp": True}, {}, "shallow_mlp True, but the config says False"),
    ("posenet", {"apply_positional_encoding": False}, {}, "apply_positional_encoding False, but the config says True"),
    ("posenet", {}, {"hidden_dim": 32}, "hidden_dim 16, but the config says 32"),
    ("ems-transposenet", {}, {}, "a checkpoint of single-scene PAE, but one of multi-scene PAE is needed"),
])
def test_a_pae_is_checked_against_the_config(tmp_path, model_name, built, config, problem):
    torch.save(PoseEncoder(16, **built).state_dict(), tmp_path / "pae.pth")
    with pytest.raises(UserError, match=problem):
        build_pose_encoder(model_name, {"hidden_dim": 16, "apply_positional_encoding": True, "shallow_mlp": False,
                                        **config}, tmp_path / "pae.pth")


def test_a_published_pae_gets_the_raw_estimate_and_ours_a_unit_quaternion(tmp_path):
    pose = torch.randn(4, 7)
    scaled = torch.cat((pose[:, :3], 45 * pose[:, 3:]), dim=1)
    ours = PoseEncoder(8)
    torch.save(ours.state_dict(), tmp_path / "ours.pth")
    published = ours.state_dict()
    published._metadata[""]["version"] = 1  # what PyTorch writes for a module without a version
    torch.save(published, tmp_path / "published.pth")
    torch.save({key: value for key, value in ours.state_dict().items() if "encoder" in key},
               tmp_path / "without_metadata.pth")
    torch.save(dict(ours.state_dict()), tmp_path / "ours_without_metadata.pth")
    for name, normalises in (("ours", True), ("ours_without_metadata", True), ("published", False),
                             ("without_metadata", False)):
        encoder = build_pose_encoder("posenet", {"hidden_dim": 8}, tmp_path / f"{name}.pth")
        for _ in range(2):  # a PAE that is saved again stays what it is
            assert encoder.takes_unit_quaternions == normalises
            with torch.no_grad():
                assert torch.allclose(encoder(pose)[1], encoder(scaled)[1], atol=1e-5) == normalises
            torch.save(encoder.state_dict(), tmp_path / "again.pth")
            encoder = build_pose_encoder("posenet", {"hidden_dim": 8}, tmp_path / "again.pth")
