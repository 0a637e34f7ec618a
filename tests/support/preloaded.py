"""Imported by the process that ranks are forked from (``support/forked.py``): what they would import one by one."""

import torch
import torch._inductor.compile_fx  # DeepSpeed's first engine imports it
import torch.distributed.fsdp

import anemoi_dist.data.loader
import anemoi_dist.engines.fsdp2
import anemoi_dist.evaluation.validator
import anemoi_dist.models.latlon
import anemoi_dist.preflight.ranks
import anemoi_dist.tasks.forecast.module
import anemoi_dist.train
import anemoi_dist.training.setup  # noqa: F401
from anemoi_dist.engines.zero import _import_deepspeed

_import_deepspeed()
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1).step()  # with it comes torch._dynamo
