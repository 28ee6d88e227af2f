"""No tensor is made on the wrong device: everything that runs on a GPU, with pretended tensors on a pretended one.

FakeTensorMode computes shapes and devices only, and refuses to mix devices. What depends on values (`unique`, NumPy)
cannot run in it: the solvers' loops over scenes, which `python -m bench.gpu` runs on a real GPU.
"""
import pytest
import torch
from conftest import ROOT
from torch._subclasses import FakeTensorMode

from datasets import transforms
from models import APR_NAMES, build_pose_encoder, get_model, infer, refinement
from models.iapr import IAPR
from models.latent_memory import _differences, _kernel, _own_distances, _raw_novelty, whitening
from models.pose_refiner import PoseRefiner
from util.config import load_config
from util.losses import CameraPoseLoss
from util.metrics import pose_err

N, R, DIM = 4, 40, 32
TRANSFORMER = [f"num_{branch}_{part}_layers=1" for branch in ("t", "rot") for part in ("encoder", "decoder")]


@pytest.fixture(autouse=True)
def without_kept_tensors():
    """Forget tensors that are kept per device: a pretended one must not stay, or come from another mode."""
    transforms._imagenet.cache_clear()
    yield
    transforms._imagenet.cache_clear()


def configured(name, *overrides):
    layers = ["num_scenes=3", "dim_feedforward=32", *TRANSFORMER] if name != "posenet" else []
    return load_config(ROOT / "config.json", name, ("pose_encoder",), overrides=[
        f"hidden_dim={DIM}", *layers, *overrides])


def on_gpu(*modules):
    """Pretend that modules are on a GPU, as `to` moves them: parameters and buffers, and no other tensors."""
    def pretended(tensor):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

    for part in (part for module in modules for part in module.modules()):
        for tensors, kind in ((part._parameters, torch.nn.Parameter), (part._buffers, lambda tensor: tensor)):
            tensors.update({name: kind(pretended(tensor)) for name, tensor in tensors.items() if tensor is not None})


def tensors_on_gpu():
    """Pretended inputs: {'img', 'pose', 'scene', 'latents', 'raw_pose', 'references', ...}."""
    def tensor(*shape, dtype=torch.float):
        return torch.empty(shape, dtype=dtype, device="cuda")

    return {"img": tensor(N, 3, 224, 224), "pose": tensor(N, 7), "raw_pose": tensor(N, 7),
            "scene": tensor(N, dtype=torch.long), "latents": tensor(N, 2 * DIM), "references": tensor(R, 7),
            "encoded": tensor(R, 2 * DIM), "noise": tensor(2 * DIM, 2 * DIM)}


def all_on_gpu(*results):
    for result in results:
        for tensor in result.values() if isinstance(result, dict) else [result] if torch.is_tensor(result) else result:
            assert tensor.device.type == "cuda"
    return True


@pytest.mark.parametrize("name, override", [
    *(("posenet", f"backbone_type={backbone}") for backbone in ("mobilenet", "efficientnet", "resnet50")),
    *((name, "dropout=0.1") for name in APR_NAMES if name != "posenet")])
def test_an_apr_trains_and_tests(name, override):
    config = configured(name, override)
    apr, loss = get_model(name, "none", config), CameraPoseLoss(config)
    with FakeTensorMode():
        on_gpu(apr, loss)
        batch = tensors_on_gpu()
        result = apr.train()(batch)
        assert all_on_gpu(result, loss(result["pose"], batch["pose"]), pose_err(result["pose"], batch["pose"]))
        assert all_on_gpu(infer(apr.eval(), batch["img"]))
        assert transforms.to_input(torch.empty(N, 64, 64, 3, dtype=torch.uint8, device="cuda")).device.type == "cuda"


def test_a_tensor_on_the_cpu_is_found():
    apr = get_model("posenet", "none", configured("posenet", "backbone_type=mobilenet"))
    with FakeTensorMode():
        on_gpu(apr)
        apr.x_reg.bias = torch.nn.Parameter(torch.empty(3))
        with pytest.raises(RuntimeError, match="cpu"):
            infer(apr.eval(), tensors_on_gpu()["img"])


@pytest.mark.parametrize("name", ("posenet", "ems-transposenet"))
def test_a_pae_and_a_refiner(name):
    config = configured(name)
    apr, encoder, refiner = get_model(name, "none", config), build_pose_encoder(name, config), PoseRefiner(DIM)
    with FakeTensorMode():
        on_gpu(apr, encoder, refiner)
        given = tensors_on_gpu()
        encoded = encoder(given["pose"], given["scene"])
        assert all_on_gpu(encoded, apr.regress(*encoded), refiner(given["latents"], given["pose"]),
                          refinement.queries_of({"pose": given["pose"], "latent_x": encoded[0],
                                                 "latent_q": encoded[1]}))
        of_references = refinement.encoded_for(encoder, given["pose"], given["scene"],
                                               given["references"][None, :3].expand(N, 3, 7))
        assert all_on_gpu(of_references)


def test_what_refinement_computes():
    encoder = build_pose_encoder("posenet", configured("posenet"))
    with FakeTensorMode():
        on_gpu(encoder)
        given = tensors_on_gpu()
        known = given["references"], given["encoded"], given["noise"]
        assert all_on_gpu(
            refinement.linear_estimate(given["latents"], *known),
            refinement.pose_distances(given["pose"], given["references"]),
            refinement.published_distances(given["pose"], given["references"]),
            refinement.weighted_poses(torch.empty(N, 3, device="cuda"), given["references"][:3].expand(N, 3, 7),
                                      given["pose"], "eigen"))
        whiten = whitening(given["noise"])
        own = _own_distances(encoder, given, whiten)
        distances = torch.cdist(given["latents"] @ whiten, given["encoded"] @ whiten)
        assert all_on_gpu(whiten, own, _raw_novelty(distances, given["pose"], given["references"], own),
                          _differences(given["pose"], given["raw_pose"]), _kernel(distances, distances[0, 0]))


def test_iapr():
    iapr = IAPR(configured("ems-transposenet"))
    with FakeTensorMode():
        on_gpu(iapr)
        given = tensors_on_gpu()
        assert all_on_gpu(iapr.train()(given["img"], given["scene"], given["pose"]),
                          iapr.eval().refine(given["img"], given["scene"], given["pose"], 3))
