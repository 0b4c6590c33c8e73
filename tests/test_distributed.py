"""Ranks together compute what one process computes with the whole batch: losses, statistics and gradients."""

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing

from groupvit_torch.distributed import gather, num_replicas, replica_sum
from groupvit_torch.loss import contrastive_loss

RANKS = 2


def features() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    return images.requires_grad_(), texts.requires_grad_()


def rank(number: int, port: int, directory: str) -> None:
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=number, world_size=RANKS)
    images, texts = (whole.detach().chunk(RANKS)[number].requires_grad_() for whole in features())
    loss = contrastive_loss(gather(images), gather(texts), 7.0)
    # As data-parallel training does it: every rank's loss, the gradients' mean.
    (loss / num_replicas()).backward()
    total = replica_sum(images.detach().sum(dim=0).requires_grad_())
    np.savez(
        Path(directory) / f"{number}.npz",
        loss=loss.detach().numpy(),
        images=images.grad.numpy(),
        texts=texts.grad.numpy(),
        total=total.detach().numpy(),
    )
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")
def test_two_ranks_are_one_process_with_the_whole_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(rank, (port, str(tmp_path)), nprocs=RANKS)
    answers = [np.load(tmp_path / f"{number}.npz") for number in range(RANKS)]

    images, texts = features()
    loss = contrastive_loss(images, texts, 7.0)
    loss.backward()
    exact = {"rtol": 0, "atol": 1e-12}  # float64, another order of summation
    for answer in answers:
        np.testing.assert_allclose(answer["loss"], loss.item(), **exact)
        np.testing.assert_allclose(answer["total"], images.detach().sum(dim=0), **exact)
    for name, whole in (("images", images), ("texts", texts)):
        np.testing.assert_allclose(np.concatenate([a[name] for a in answers]), whole.grad, **exact)


def test_alone_nothing_happens() -> None:
    images, _ = features()
    assert num_replicas() == 1
    assert gather(images) is images
    assert replica_sum(images) is images
