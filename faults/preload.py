"""What the server of `processes` imports once, for all the runs that are forked from it."""

import gc

from orpo_lab.upstream import silence

silence()

import bitsandbytes  # noqa: E402, F401
import matplotlib.backends.backend_agg  # noqa: E402
import matplotlib.pyplot  # noqa: E402, F401
import peft.tuners.lora.bnb  # noqa: E402, F401
import torch  # noqa: E402
import wandb  # noqa: E402, F401

from orpo_lab import data, engine, evaluate, tracker  # noqa: E402, F401
from orpo_lab.compare import page  # noqa: E402, F401
from orpo_lab.engine import shared_prefix  # noqa: E402, F401
from orpo_lab.model import adapter, weights  # noqa: E402, F401
from orpo_lab.records import results  # noqa: E402, F401
from orpo_lab.training import trainer  # noqa: E402, F401

# A thread that exists at a fork is lost in the child
torch.set_num_threads(1)

# A run asks for collections, which would look at every object that is imported, and copy its page
gc.collect()
gc.freeze()
