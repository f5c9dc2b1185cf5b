"""Single samples to a batch, for a DataLoader that reads them one by one."""

import torch

from ldm.data.dataset import Batch, TextImageItem, join_items


def collate(items: list[TextImageItem]) -> Batch:
    return join_items(items, torch.stack([item["images"] for item in items]))
