"""Recognise handwritten digits, and count every test image exactly once.

The 1,797 images ship with scikit-learn, which must be installed. The 360 test images do not
make whole global batches, so on several ranks the last one is filled up; `gather_for_metrics` drops the filler samples.

    paceline launch examples/vision.py
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline import Accelerator, set_seed


def build_model() -> nn.Module:
    """Build a small convolutional network for 8 x 8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def load(
    batch_size: int,
) -> tuple[DataLoader[tuple[torch.Tensor, ...]], DataLoader[tuple[torch.Tensor, ...]]]:
    """Load the images as [n, 1, 8, 8] in 0..1; every fifth is a test image."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    held_out = torch.arange(len(labels)) % 5 == 0
    train = TensorDataset(images[~held_out], labels[~held_out])
    test = TensorDataset(images[held_out], labels[held_out])
    return DataLoader(train, batch_size, shuffle=True), DataLoader(test, batch_size)


def main() -> None:
    """Train, and count the correct answers on the test images after each epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8, help="epochs (default 8)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per rank and step (default 32)")
    args = parser.parse_args()

    set_seed(0)
    accelerator = Accelerator()
    train, test = load(args.batch_size)
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer, train, test = accelerator.prepare(model, optimizer, train, test)
    accelerator.print(accelerator.describe())

    for epoch in range(args.epochs):
        model.train()
        for images, labels in train:
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        right = seen = 0
        for images, labels in test:
            with torch.no_grad():
                answers = model(images).argmax(dim=1)
            answers, labels = accelerator.gather_for_metrics((answers, labels))
            right += int((answers == labels).sum())
            seen += len(labels)
        accelerator.print(f"epoch {epoch + 1}: {right} of {seen} test images correct ({right / seen:.1%})")


if __name__ == "__main__":
    main()
