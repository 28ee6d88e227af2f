"""Optimisations do not change results: attention, dropout, precision, batches, and latents that are computed once."""
import copy

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_here, weights_of, write_labels, write_scene
from torch import nn

from datasets.camera_poses import CameraPoseDataset
from datasets.transforms import to_input
from engine import training
from engine.evaluation import compute_latents
from engine.run import Run
from models import MULTI_SCENE_APRS, build_pose_encoder, folded, get_model, infer, load_apr
from models.backbones import BACKBONES, build_backbone
from models.cpu import Dropout
from models.transformer import CrossAttention, SelfAttention
from util.config import Config
from util.losses import CameraPoseLoss
from util.rotations import mean_quaternion
from util.seeds import epoch_order

SMALL = {"backbone_type": "mobilenet", "hidden_dim": 32, "num_scenes": 2, "nhead": 4, "dim_feedforward": 32,
         **{f"num_{branch}_{part}coder_layers": 1 for branch in ("t", "rot") for part in ("en", "de")}}


@pytest.mark.parametrize("ours", [SelfAttention, CrossAttention])
def test_attention_and_its_gradients_equal_pytorchs(ours):
    torch.manual_seed(0)
    attention, reference = ours(24, 3, batch_first=True), nn.MultiheadAttention(24, 3, batch_first=True)
    nn.init.normal_(attention.in_proj_bias)  # its default of 0 would hide mistakes
    nn.init.normal_(attention.out_proj.bias)
    reference.load_state_dict(attention.state_dict())
    inputs = [torch.randn(2, 5, 24), torch.randn(2, 11, 24), torch.randn(2, 11, 24)]
    if ours is SelfAttention:
        inputs = [torch.randn(2, 11, 24), torch.randn(11, 24)]
    weight = torch.randn(2, len(inputs[0][0]), 24)

    def results(module, call):
        given = [x.clone().requires_grad_() for x in inputs]
        output = call(module, *given)
        (output * weight).sum().backward()
        # For the keys' bias, PyTorch's gradient is 0 up to rounding. In our cross-attention it is exactly 0.
        return [output, *(x.grad for x in given), *(p.grad for p in module.parameters())]

    def of_pytorch(module, *given):
        if ours is SelfAttention:
            return module(given[0] + given[1], given[0] + given[1], given[0])[0]
        return module(*given)[0]

    for mine, theirs in zip(results(attention, lambda module, *given: module(*given)), results(reference, of_pytorch)):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_dropout_drops_the_given_fraction_and_scales_the_rest():
    torch.manual_seed(0)
    for p in (0.1, 0.5):
        x = torch.full((1000, 1003), 3.0, requires_grad=True)
        y = Dropout(p)(x)
        dropped = (y == 0).float()
        assert abs(dropped.mean() - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5
        # Elements are independent: the dropped fractions of rows and of columns have binomial deviations.
        for dim in (0, 1):
            assert abs(dropped.mean(dim=dim).std() / (p * (1 - p) / x.shape[dim]) ** 0.5 - 1) < 0.15
        assert torch.allclose(y[y != 0], torch.tensor(3 / (1 - p)), rtol=1e-4)
        y.sum().backward()
        assert torch.equal(x.grad, y.detach() / 3)
        torch.manual_seed(1)
        again = Dropout(p)(x)
        torch.manual_seed(1)
        assert torch.equal(Dropout(p)(x), again) and not torch.equal(again, y)
        assert Dropout(p).eval()(x) is x


def test_attention_in_training_has_the_mean_of_attention_in_testing():
    torch.manual_seed(0)
    attention = SelfAttention(16, 2, dropout=0.2, batch_first=True)
    tokens, added = torch.randn(1, 6, 16), torch.randn(6, 16)
    with torch.no_grad():
        drawn = attention(tokens.expand(20000, -1, -1), added)
        expected = attention.eval()(tokens, added)
    assert (drawn.std(dim=0) > 0.01).any()
    assert torch.allclose(drawn.mean(dim=0), expected[0], atol=0.02)


@pytest.mark.parametrize("name", ["posenet", "ms-transposenet", "ems-transposenet"])
def test_low_precision_stays_in_the_network(name):
    torch.manual_seed(0)
    image = {"img": torch.randn(2, 3, 224, 224), "scene": torch.tensor([0, 1])}
    models = {precision: get_model(name, "none", {**SMALL, "precision": precision})
              for precision in ("fp32", "bf16", "auto")}
    weights = models["fp32"].state_dict()
    # A position in kilometres: bf16 would round it to 8 m.
    head = {"posenet": "x_reg", "ms-transposenet": "regressor_head_t.0.fc_o",
            "ems-transposenet": "regressor_head_t.fc_o"}[name]
    weights[f"{head}.bias"] += 1001.0
    for model in models.values():
        model.load_state_dict(weights)
    with torch.no_grad():
        results = {precision: model.eval()(image) for precision, model in models.items()}
    for key, exact in results["fp32"].items():
        assert torch.equal(results["auto"][key], exact)  # tests run in fp32
        assert results["bf16"][key].dtype == torch.float32
    assert any(not torch.equal(results["bf16"][key], exact) for key, exact in results["fp32"].items())
    assert (results["bf16"]["pose"][0] - results["fp32"]["pose"][0]).abs().max() < 0.1


@pytest.mark.parametrize("backbone_type", ["mobilenet", "efficientnet"])
def test_depthwise_convolutions_that_a_cpu_trains_in_fp32_compute_the_same(backbone_type):
    torch.manual_seed(0)
    found = [module for module in build_backbone(backbone_type, "none").modules()
             if isinstance(module, nn.Conv2d) and type(module).__name__.startswith("_")]
    for conv in (found[0], found[-1]):
        image = torch.randn(2, conv.in_channels, 28, 28).bfloat16().float()
        pad = conv.static_padding if backbone_type == "efficientnet" else nn.Identity()
        expected = F.conv2d(pad(image), conv.weight, stride=conv.stride, padding=conv.padding, groups=conv.groups)
        wanted = torch.autograd.grad(expected.square().sum(), conv.weight)[0]
        assert torch.equal(conv(image), expected)
        with torch.autocast("cpu", torch.bfloat16):
            low = conv(image.bfloat16())
        assert low.dtype == torch.bfloat16 and torch.allclose(low.float(), expected, rtol=0.01, atol=0.01)
        given = torch.autograd.grad(low.float().square().sum(), conv.weight)[0]
        assert F.cosine_similarity(given.flatten(), wanted.flatten(), dim=0) > 0.9999


@pytest.mark.parametrize("name, backbone_type", [*(("posenet", backbone_type) for backbone_type in BACKBONES),
                                                 *((name, "efficientnet") for name in MULTI_SCENE_APRS)])
def test_a_folded_apr_computes_the_same_without_batch_norms(name, backbone_type):
    torch.manual_seed(0)
    apr = get_model(name, "none", {**SMALL, "backbone_type": backbone_type}).eval()
    norms = [module for module in apr.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:  # as after a training
        for tensor, low, high in ((norm.weight, 0.8, 1.2), (norm.bias, -0.2, 0.2), (norm.running_mean, -0.2, 0.2),
                                  (norm.running_var, 0.5, 1.5)):
            nn.init.uniform_(tensor, low, high)
    before, image = copy.deepcopy(apr.state_dict()), torch.randn(2, 3, 96, 96)
    network = folded(apr)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    with torch.no_grad():
        wanted, given = infer(apr, image), infer(network, image)
        for norm in norms:
            norm.bias.zero_()
        changed = infer(apr, image)
    for key in ("pose", "latent_x", "latent_q"):
        assert torch.allclose(given[key], wanted[key], atol=1e-4, rtol=1e-4)
        assert not norms or not torch.allclose(changed[key], wanted[key], atol=1e-2, rtol=1e-2)
    assert all(torch.equal(value, before[key]) for key, value in apr.state_dict().items() if "bias" not in key)


@pytest.mark.parametrize("precision, scale", [("fp32", 1), ("fp16", 2 ** 16)])
def test_fp16_scales_the_loss_and_takes_the_same_steps(tmp_path, precision, scale):
    torch.manual_seed(0)
    model, data, gradients = nn.Linear(7, 7), torch.randn(6, 4, 7), []
    expected = copy.deepcopy(model)
    model.weight.register_hook(gradients.append)
    config = {"lr": 0.1, "eps": 1e-10, "weight_decay": 0, "lr_scheduler_step_size": 100, "lr_scheduler_gamma": 1,
              "n_epochs": 3, "n_freq_print": 1, "n_freq_checkpoint": 100, "precision": precision}
    run = Run(Config(config), torch.device("cpu"), prefix=str(tmp_path / precision), settings="{}")

    def step(batch):
        pose = model(batch["pose"])
        return (pose ** 2).mean(), pose

    training.train(run, model, nn.Module(), lambda epoch: [{"pose": poses} for poses in data], step, {})
    optimizer = torch.optim.Adam(expected.parameters(), lr=0.1, eps=1e-10)
    for poses in data.repeat(3, 1, 1):
        optimizer.zero_grad()
        (expected(poses) ** 2).mean().backward()
        if len(gradients) == 18:
            assert torch.allclose(gradients[0], scale * expected.weight.grad, rtol=1e-4)
            gradients.clear()
        optimizer.step()
    assert torch.allclose(model.weight, expected.weight, atol=1e-5)


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layout")
    write_labels(folder / "labels.csv", write_scene(folder, "attic", 7, "train"))

    def arguments(mode, *weights):
        return ["posenet", mode, "none", folder, folder / "labels.csv", ROOT / "config.json", *weights,
                "--output_dir", folder / "out",
                "--set", "backbone_type=mobilenet", "hidden_dim=32", "batch_size=3", "n_workers=0", "n_epochs=4"]

    torch.manual_seed(0)
    torch.save(get_model("posenet", "none", SMALL).state_dict(), folder / "apr.pth")
    return folder, arguments


def test_a_test_in_batches_has_the_errors_of_single_frames(layout):
    folder, arguments = layout
    tables = {}
    for size in (1, 5):
        output = run_here("main.py", *arguments("test"), f"test_batch_size={size}", "--verbose",
                          "--checkpoint_path", folder / "apr.pth", "--predictions_path", folder / f"{size}.csv")
        tables[size] = pd.read_csv(folder / f"{size}.csv").select_dtypes("number")
        assert len([line for line in output.splitlines() if line.startswith("Pose error")]) == 7
    assert np.allclose(tables[1], tables[5], rtol=1e-4, atol=1e-5)


def test_latents_computed_once_train_the_same_pae_as_a_teacher_in_every_epoch(layout):
    folder, arguments = layout
    settings = ["precision=fp32", "average_last=0", "lr=1e-3", "eps=1e-6", "octaves=6", "pae_input=estimated"]
    output = run_here("main_learn_pose_encoding.py", *arguments("train", folder / "apr.pth"), *settings)
    trained = torch.load(weights_of(output))

    torch.manual_seed(0)
    apr = load_apr("posenet", "none", dict(SMALL), folder / "apr.pth").eval().requires_grad_(False)
    encoder = build_pose_encoder("posenet", SMALL)
    pose_loss = CameraPoseLoss({"learnable": True, "s_x": -3.0, "s_q": -6.5, "norm": 2})
    initial = copy.deepcopy(encoder.state_dict())
    # The eps is larger than usual, so that rounding errors are not amplified.
    optimizer = torch.optim.Adam([*encoder.parameters(), *pose_loss.parameters()], lr=1e-3, eps=1e-6, weight_decay=1e-4)
    dataset = CameraPoseDataset(folder, folder / "labels.csv")
    # Positions are relative to their median, in units of the median distance from it.
    centre = dataset.poses[:, :3].median(dim=0).values
    encoder.centre[0], encoder.scale[0] = centre, (dataset.poses[:, :3] - centre).norm(dim=1).median()
    encoder.mean_orientation[0] = mean_quaternion(dataset.poses[:, 3:].double())
    for epoch in range(4):
        for rows in epoch_order(7, 0, epoch).split(3):
            result = apr({"img": to_input(torch.stack([dataset[int(row)]["img"] for row in rows]))})
            latent_x, latent_q = encoder(result["pose"])
            loss = (F.mse_loss(latent_x, result["latent_x"]) + F.mse_loss(latent_q, result["latent_q"])
                    + pose_loss(apr.regress(latent_x, latent_q), dataset.poses[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for key, value in encoder.named_parameters():
        assert torch.allclose(trained[key], value, atol=2e-4), key
        assert (trained[key] - initial[key]).abs().max() > 3e-3


@pytest.mark.parametrize("name", ["posenet", "ems-transposenet"])
def test_latents_are_what_the_apr_gives_for_each_frame(layout, name):
    folder, _ = layout
    torch.manual_seed(0)
    apr = get_model(name, "none", SMALL)
    dataset = CameraPoseDataset(folder, folder / "labels.csv")
    for module in apr.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    # With batch norm's statistics of these frames, latents differ between frames and between scenes.
    apr.train()({"img": to_input(torch.stack([dataset[i]["img"] for i in range(7)])), "scene": torch.zeros(7)})
    apr.eval()
    run = Run(Config({"test_batch_size": 3, "n_workers": 0}), torch.device("cpu"))
    latents = compute_latents(run, apr, dataset)
    for i in range(7):
        with torch.no_grad():
            single = apr({"img": to_input(dataset[i]["img"][None]), "scene": None})
        for key, value in (("latent_x", "latent_x"), ("latent_q", "latent_q"), ("estimate", "pose")):
            assert torch.allclose(latents[key][i], single[value][0], atol=1e-4)
        assert torch.equal(latents["pose"][i], dataset.poses[i])
        if name == "ems-transposenet":
            assert single["scene_log_distr"].diff().abs() > 1e-4  # not decided by rounding
            assert latents["scene"][i] == single["scene_log_distr"].argmax()
