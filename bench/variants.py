"""The models that the benchmarks time, each in a precision, ready to train and to test."""
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from engine.evaluation import milliseconds
from models import build_pose_encoder, freeze, load_apr
from models.backbones import EndpointBackbone
from models.cpu import Dropout, keep_freed_memory
from models.iapr import IAPR, moved_back, relative_pose
from models.pose_refiner import PoseRefiner
from models.precision import DTYPES, autocast
from models.transformer import CrossAttention, SelfAttention
from util.config import DEFAULTS, Config
from util.losses import CameraPoseLoss

CAP_GIB = 7.5  # of an 8 GB card
CONFIG = {"hidden_dim": 256, "num_scenes": 7, "dim_feedforward": 256, "learnable": True, "s_x": -3.0, "s_q": -6.5,
          "norm": 2}
MODELS = {  # name: (model, its config, published batch size)
    "posenet-mobilenet": ("posenet", {"backbone_type": "mobilenet"}, 32),
    "posenet-resnet50": ("posenet", {"backbone_type": "resnet50"}, 32),
    "posenet-efficientnet": ("posenet", {"backbone_type": "efficientnet"}, 32),
    "ms-transposenet": ("ms-transposenet", {}, 8),
    "ems-transposenet": ("ems-transposenet", {}, 8),
}
APR = "posenet-mobilenet"  # whose latents a PAE and a refiner are trained on
SIZE = 224  # of images, height and width
MATRIX = {"cpu": 2048, "cuda": 8192}  # side of the matrices whose product tells the machine's peak


def matrix_side(device, size):
    """The side of the matrices for the machine's peak; with smaller images they are smaller too."""
    return MATRIX[torch.device(device).type] * size // SIZE


class Sketch(nn.Module):
    """The bare arithmetic of MS-Transformer, a lower bound of its time.

    EfficientNet's blocks 0 to 10, and six pre-norm encoder layers on 196 and on 784 tokens; nothing else.
    """

    def __init__(self, precision):
        super().__init__()
        self.precision = precision
        self.backbone = EndpointBackbone(["reduction_4", "reduction_3"], "none")
        self.projections = nn.ModuleList(nn.Conv2d(channels, 256, kernel_size=1) for channels in (112, 40))
        self.branches = nn.ModuleList(nn.Sequential(*(SketchLayer() for _ in range(6))) for _ in range(2))

    def forward(self, data):
        """A batch of images -> 7 numbers per image, which mean nothing."""
        with autocast(self.precision, data["img"].device):
            maps = self.backbone(data["img"])
            tokens = [branch(projection(x).flatten(2).transpose(1, 2))
                      for x, projection, branch in zip(maps, self.projections, self.branches)]
        return {"pose": torch.cat([x.float().mean(dim=1) for x in tokens], dim=1)[:, :7]}


class SketchLayer(nn.Module):
    """A pre-norm encoder layer without dropout and positions."""

    def __init__(self):
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(256, 768), nn.Linear(256, 256)
        self.linear1, self.linear2 = nn.Linear(256, 256), nn.Linear(256, 256)
        self.norm1, self.norm2 = nn.LayerNorm(256), nn.LayerNorm(256)

    def forward(self, tokens):
        """N x L x 256 -> N x L x 256."""
        query, key, value = self.in_proj(self.norm1(tokens)).unflatten(2, (3, 8, 32)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.out_proj(attended.transpose(1, 2).flatten(2))
        return tokens + self.linear2(F.gelu(self.linear1(self.norm2(tokens))))


class PlainSelfAttention(nn.MultiheadAttention):
    """SelfAttention by PyTorch's own forward."""

    def forward(self, tokens, added):
        """As SelfAttention.forward."""
        return super().forward(tokens + added, tokens + added, tokens)[0]


class PlainCrossAttention(nn.MultiheadAttention):
    """CrossAttention by PyTorch's own forward."""

    def forward(self, query, keys, values):
        """As CrossAttention.forward."""
        return super().forward(query, keys, values)[0]


PLAIN = {SelfAttention: PlainSelfAttention, CrossAttention: PlainCrossAttention, Dropout: nn.Dropout}


class Variant:
    """A model in a precision, ready to train and test. On a GPU its process may take CAP_GIB of memory.

    precision: fp32, bf16 or fp16; or 'plain', which is fp32 without any of our ways. size: of the images, in pixels.
    """

    def __init__(self, name, precision, batch_size, device, size=SIZE):
        torch.manual_seed(0)
        self.device = torch.device(device)
        self.plain = precision == "plain"
        self.precision = "fp32" if self.plain else precision
        if self.device.type == "cuda":
            cap = CAP_GIB * 2 ** 30 / torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(cap, 1.0), self.device)
        elif not self.plain:
            keep_freed_memory()
        self.images = torch.randn(batch_size, 3, size, size, device=self.device)
        if not self.plain:
            self.images = self.images.to(memory_format=torch.channels_last)
        self.scenes = torch.arange(batch_size, device=self.device) % CONFIG["num_scenes"]
        self.poses = F.normalize(torch.randn(batch_size, 7, device=self.device))
        self.model = self.on_device(self.build(name))
        self.loss = CameraPoseLoss(CONFIG).to(self.device)
        parameters = [*self.model.parameters(), *self.loss.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=not self.plain)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def build(self, name):
        """The model of a name of MODELS, or 'sketch', as the scripts build it."""
        if name == "sketch":
            return Sketch(self.precision).to(memory_format=torch.channels_last)
        model, config, _ = MODELS[name]
        return load_apr(model, "none", {**CONFIG, **config, "precision": self.precision})

    def on_device(self, model):
        """The model on the device, written plainly where the variant is plain."""
        if self.plain:
            # As one would write it first: memory and attention as PyTorch has them by default, weights of attention
            # included.
            model = model.to(memory_format=torch.contiguous_format)
            for module in model.modules():
                module.__class__ = PLAIN.get(type(module), type(module))
        return model.to(self.device)

    def training_loss(self):
        """The loss of the batch, and the poses that the model estimates, as a script's step returns them."""
        result = self.model({"img": self.images, "scene": self.scenes})
        loss = self.loss(result["pose"], self.poses)
        if "scene_log_distr" in result:
            loss = loss + F.nll_loss(result["scene_log_distr"], self.scenes)
        return loss, result["pose"]

    def first(self, n):
        """The batch's first n images, scenes and poses; more than it has are its first, n times."""
        return [rows[:n] if n <= len(rows) else rows[:1].expand(n, *rows.shape[1:])
                for rows in (self.images, self.scenes, self.poses)]

    def predict(self, n):
        """Run the model over n images, as in a test."""
        self.model({"img": self.first(n)[0], "scene": None})

    def train(self):
        """A training step."""
        loss, _ = self.training_loss()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    @torch.inference_mode()
    def test(self):
        """A test of one batch."""
        self.predict(len(self.images))

    @torch.inference_mode()
    def test_one(self):
        """A test of a single image."""
        self.predict(1)

    @torch.inference_mode()
    def test_published_batch(self):
        """A test of one batch of the published size."""
        self.predict(DEFAULTS["test_batch_size"])

    def multiply(self):
        """A product of two large matrices, for the machine's peak."""
        side, dtype = matrix_side(self.device, self.images.shape[3]), DTYPES.get(self.precision, torch.float32)
        matrix = torch.ones(side, side, dtype=dtype, device=self.device)
        return matrix @ matrix

    def gflop(self):
        """GFLOP per image of a test."""
        self.model.eval()
        with FlopCounterMode(display=False) as counter:  # which needs gradients
            self.predict(1)
        return counter.get_total_flops() / 1e9

    def peak_gib(self):
        """The peak of memory so far: the allocator's on a GPU, the whole process's on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device) / 2 ** 30
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 2 ** 20

    def measure(self, what, n, seconds):
        """Milliseconds of each of at least n calls of the method `what`, for at least some seconds.

        On a GPU ten calls are timed at once: as in a training, nothing waits between them.
        """
        self.model.train(what == "train")
        on_gpu = self.device.type == "cuda"
        at_once = 10 if on_gpu and what != "test_one" else 1
        elapsed_ms = []
        end = time.monotonic() + seconds
        while len(elapsed_ms) < n or time.monotonic() < end:
            total_ms, _ = milliseconds(lambda: [getattr(self, what)() for _ in range(at_once)], self.device)
            elapsed_ms.append(total_ms / at_once)
        if on_gpu:
            torch.cuda.empty_cache()  # for the variants whose turn is next
        return elapsed_ms


class LatentVariant(Variant):
    """A PAE or a refiner, trained on latents that a frozen PoseNet has computed; 'plain': computes in every step."""

    def build(self, name):
        """The model: 'pae' or 'refiner'."""
        self.apr = self.on_device(super().build(APR))
        freeze(self.apr)
        self.is_pae = name == "pae"
        self.latents = self.teach()
        config = {**CONFIG, **MODELS[APR][1]}
        return build_pose_encoder("posenet", config) if self.is_pae else PoseRefiner(CONFIG["hidden_dim"])

    @torch.no_grad()
    def teach(self):
        """The APR's outputs for the batch."""
        return self.apr({"img": self.images})

    def training_loss(self):
        """As Variant.training_loss."""
        latents = self.teach() if self.plain else self.latents
        if not self.is_pae:
            pose = self.model(torch.cat((latents["latent_x"], latents["latent_q"]), dim=1), latents["pose"])
            return self.loss(pose, self.poses), pose
        encoded = self.model(self.poses)
        pose = self.apr.regress(*encoded)
        return (F.mse_loss(encoded[0], latents["latent_x"]) + F.mse_loss(encoded[1], latents["latent_q"])
                + self.loss(pose, self.poses)), pose

    def predict(self, n):
        """Run the APR over n images, and the model over its output, as in a test."""
        result = self.apr({"img": self.first(n)[0]})
        if self.is_pae:
            self.apr.regress(*self.model(result["pose"]))
        else:
            self.model(torch.cat((result["latent_x"], result["latent_q"]), dim=1), result["pose"])


class IterativeVariant(Variant):
    """iAPR."""

    def build(self, name):
        """The model, which begins with random weights."""
        model = IAPR(Config({**CONFIG, "precision": self.precision}))
        model.precision = self.precision
        return model

    def training_loss(self):
        """As Variant.training_loss, of relative poses to those of other frames."""
        others = self.poses.roll(1, 0)
        relative = self.model(self.images, self.scenes, others)
        return self.loss(relative, relative_pose(self.poses, others)), moved_back(others, relative)

    def predict(self, n):
        """Refine n poses by their images."""
        self.model.refine(*self.first(n), DEFAULTS["num_iterations"])


CLASSES = {"pae": LatentVariant, "refiner": LatentVariant, "iapr": IterativeVariant}


def build(name, *arguments):
    """The variant of a model: a name of MODELS, 'sketch', 'pae', 'refiner' or 'iapr'. arguments: as Variant takes."""
    return CLASSES.get(name, Variant)(name, *arguments)
