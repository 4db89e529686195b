"""`--graph` replays whole steps as a CUDA graph. On a CPU these tests record the operators of a step and rerun them."""

import sys
from functools import partial

import pretrain as pretrain_script
import pytest
import torch
from scripts import TINY_PRETRAIN, metrics, refused, run_here
from test_resume import same_numbers, same_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import training.cuda_graph as graphs
from pipelines import pretraining
from training.checkpoints import Checkpoints
from training.cuda_graph import GraphedUpdate
from training.schedule import Schedule

pretrain = partial(run_here, pretrain_script.main)
COMMON = [*TINY_PRETRAIN, "--data", "sprites:64", "--steps", 8, "--save-every", 4]
READS = ("_local_scalar_dense", "item", "nonzero", "equal")


class Recording(TorchDispatchMode):
    """A CUDA graph as a plain list of operators. A replay runs each operator again on the same tensors and writes its
    results into the same tensors. Python does not run again, and no operator may read from the device."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func.overloadpacket.__name__ not in READS, f"{func} reads from the device"
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for then, now in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(then, torch.Tensor) and then.data_ptr() != now.data_ptr():
                    then.copy_(now)


def capture(update, parts):
    """Stands in for the real capture. Here the capture runs the step, so the first replay does nothing."""
    with Recording() as recording:
        update(parts)
    runs = iter([lambda: None])
    return lambda: next(runs, recording.replay)()


@pytest.fixture
def recorded(monkeypatch):
    for module in [each for name, each in sys.modules.items() if name.startswith("adamae_sampler")]:
        if hasattr(module, "free_to_read"):  # values are checked on a CPU and not on a GPU
            monkeypatch.setattr(module, "free_to_read", lambda _: False)
    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "aside", lambda update, parts: update(parts))
    monkeypatch.setattr(pretraining, "check_graph", lambda *_: None)
    rate = Schedule.lr_at  # rounded to fp32 in every run, since the graph reads it from an fp32 tensor
    monkeypatch.setattr(Schedule, "lr_at", lambda self, step: float(torch.tensor(rate(self, step))))


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--effective-batch", 8, "--score-network", "pooled", "--num-masks", 2],
        ["--masking", "hard", "--score-network", "pooled"],
        ["--masking", "motion"],
    ],
)
def test_replayed_steps_train_as_usual_ones(recorded, tmp_path, options):
    """Bit for bit, in weights and metrics. Each step has its own mask, dropout and learning rate."""
    for name, graph in (("usual", []), ("graph", ["--graph"])):
        pretrain(*COMMON, *options, *graph, "--output", tmp_path / name)
    same_numbers(tmp_path / "usual", tmp_path / "graph")
    same_weights(tmp_path / "usual", tmp_path / "graph")
    assert len({line["coverage"] for line in metrics(tmp_path / "graph")}) > 1


@pytest.mark.parametrize(("first", "then"), [([], ["--graph"]), (["--graph"], ["--no-graph"])])
def test_a_run_goes_on_with_a_graph_and_without(recorded, tmp_path, first, then):
    pretrain(*COMMON, "--output", tmp_path / "whole")
    pretrain(*COMMON, *first, "--output", tmp_path / "parts")
    Checkpoints(tmp_path / "parts" / "checkpoints").begin(4)
    pretrain("--resume", "auto", *then, "--output", tmp_path / "parts")
    same_numbers(tmp_path / "whole", tmp_path / "parts")
    same_weights(tmp_path / "whole", tmp_path / "parts")


def test_a_bad_step_is_skipped_in_a_graph_too(recorded, tmp_path, monkeypatch):
    factor = torch.ones(())
    forward = pretraining.AdaMAELoss.forward

    def spoilt(self, *args):
        out = forward(self, *args)
        return out._replace(loss=out.loss * factor)

    step = GraphedUpdate.__call__

    def call(self, parts):
        factor.fill_(torch.nan if self._calls == 5 else 1.0)
        step(self, parts)

    monkeypatch.setattr(pretraining.AdaMAELoss, "forward", spoilt)
    monkeypatch.setattr(GraphedUpdate, "__call__", call)
    pretrain(*COMMON, "--graph", "--output", tmp_path)
    assert [line["skipped_steps"] for line in metrics(tmp_path)] == [0, 0, 0, 0, 0, 1, 0, 0]
    assert [line["nonfinite_in_a_row"] for line in metrics(tmp_path)] == [0, 0, 0, 0, 0, 1, 0, 0]


def test_a_batch_of_another_shape_is_refused(monkeypatch):
    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "aside", lambda update, parts: update(parts))
    seen = torch.zeros(2)
    step = GraphedUpdate(lambda parts: [seen.add_(batch["video"]) for batch, _ in parts])
    for _ in range(6):
        step([({"video": torch.ones(2)}, 0)])
    assert seen.tolist() == [6, 6]
    with pytest.raises(ValueError, match=r"video is \(1,\), expected \(2,\)"):
        step([({"video": torch.ones(1)}, 0)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_graph_needs_a_gpu(tmp_path):
    message = refused(pretrain_script.main, *COMMON, "--graph", "--checkpoint-activations", "--output", tmp_path)
    assert "--graph needs a CUDA device (found cpu); a run without --checkpoint-activations" in message


@pytest.mark.gpu
def test_steps_on_a_gpu_train_as_usual_ones(tmp_path):
    for name, graph in (("usual", []), ("graph", ["--graph"])):
        pretrain(*COMMON, "--precision", "fp32", *graph, "--output", tmp_path / name)
    one, two = (metrics(tmp_path / name) for name in ("usual", "graph"))
    for mine, theirs in zip(one, two, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert mine["coverage"] == theirs["coverage"]
