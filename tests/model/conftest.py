"""Tiny tensors: a second thread only waits for a core."""

import torch

torch.set_num_threads(1)
