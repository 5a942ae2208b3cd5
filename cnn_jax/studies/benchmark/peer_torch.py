"""The contender PyTorch, in its own environment. Arguments: NETWORK BATCH VARIANT [MODE...].

Variants: default, channels_last, compile (channels_last and torch.compile), bf16 (channels_last and
autocast). Adam 1e-3, cross-entropy; the batch is already a float32 tensor.
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from networks import NETWORKS, Network
from worker import serve


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """The padding before and after, as in Keras and JAX; for stride 2 it is not symmetric."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def build(network: Network) -> nn.Module:
    """`network` as an nn.Sequential over NCHW images."""
    height, _, channels = network.image_shape
    layers: list[nn.Module] = []
    for kind, *options in network.layers:
        if kind == "conv":
            features, kernel, stride, padding = options
            before, after = same_padding(height, kernel, stride) if padding == "same" else (0, 0)
            if before != after:
                layers.append(nn.ZeroPad2d((before, after, before, after)))
            inside = before if before == after else 0
            layers.append(nn.Conv2d(channels, features, kernel, stride, inside))
            layers.append(nn.ReLU())
            height, channels = (height + before + after - kernel) // stride + 1, features
        elif kind == "pool":
            layers.append(nn.MaxPool2d(options[0]))
            height //= options[0]
        elif kind == "flatten":
            layers.append(nn.Flatten())
            channels *= height * height
        elif kind == "dense":
            layers.append(nn.Linear(channels, options[0]))
            if options[1]:
                layers.append(nn.ReLU())
            channels = options[0]
        elif kind == "speedrun":
            return speedrun()
    return nn.Sequential(*layers)


def speedrun() -> nn.Module:
    """The network of the CIFAR-10 speedrun (arXiv 2404.00498), as cnn_jax.models.SpeedrunCNN."""

    class Scale(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 9

    def norm(width: int) -> nn.Module:
        layer = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
        layer.weight.requires_grad = False
        return layer

    layers, before = [nn.Conv2d(3, 24, 2), nn.GELU()], 24
    for width in (64, 256, 256):
        layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.MaxPool2d(2)]
        layers += [norm(width), nn.GELU()]
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width), nn.GELU()]
        before = width
    return nn.Sequential(
        *layers, nn.MaxPool2d(3), nn.Flatten(), nn.Linear(before, 10, bias=False), Scale()
    )


def main(network: str, batch_size: int, variant: str, *only: str) -> None:
    """Serves the modes train and eval, or `only` one of them."""
    torch.manual_seed(0)
    # The parent hides the GPU where the CPUs are compared.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # As JAX multiplies float32 on a GPU by default: TF32. Convolutions have it anyway.
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    height, width, channels = NETWORKS[network].image_shape
    model = build(NETWORKS[network]).to(device)
    image = torch.rand(batch_size, channels, height, width, device=device)
    label = torch.randint(0, 10, (batch_size,), device=device)
    if variant != "default":
        model = model.to(memory_format=torch.channels_last)
        image = image.to(memory_format=torch.channels_last)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss_of = nn.CrossEntropyLoss()
    forward = torch.compile(model) if variant == "compile" else model
    autocast = torch.autocast(device, torch.bfloat16, enabled=variant == "bf16")

    def train(steps: int) -> None:
        model.train()
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            with autocast:
                loss = loss_of(forward(image), label)
            loss.backward()
            optimizer.step()
        loss.item()  # waits for the device

    def evaluation(steps: int) -> None:
        model.eval()
        with torch.inference_mode(), autocast:
            for _ in range(steps):
                logits = forward(image)
            logits[0, 0].item()  # waits for the device

    modes = {"train": train, "eval": evaluation}
    version = f"torch {torch.__version__}"
    serve(modes, only, version=version, parameters=parameters, device=device)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
